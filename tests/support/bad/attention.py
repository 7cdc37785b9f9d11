"""What the attention's operators refuse."""

import functools
import re

import torch
from support.cases import BY_NAME, WEIGHT_KINDS, WEIGHT_NAMES, make_inputs
from support.errors import (
    HERE,
    Arguments,
    Bad,
    Refusals,
    at,
    both,
    each,
    item,
    on_meta,
    raising,
    shaped,
)
from support.tolerance import make_cotangents
from torch import Tensor

OP = torch.ops.epsa_fused.psa_attention.default
BACKWARD = torch.ops.epsa_fused.psa_attention_backward.default

CASE = BY_NAME["odd"]  # 3 branches of [3, 5, 5, 3], r = 2
KINDS = {kind.name: kind for kind in WEIGHT_KINDS}


def forward(kind: str, device: str) -> Arguments:
    feats, *weights = make_inputs(CASE, torch.float32, kind=KINDS[kind], device=device).args
    return {"feats": feats, **dict(zip(WEIGHT_NAMES, weights, strict=True)), "reversed": True}


def with_pooled(kind: str, device: str) -> Arguments:
    arguments = forward(kind, device)
    return arguments | {"pooled": OP(*arguments.values())[1]}


def backward(kind: str, device: str) -> Arguments:
    arguments = forward(kind, device)
    order = arguments.pop("reversed")
    grad_out, grad_attention = make_cotangents(CASE, torch.float32, device=device)
    _, pooled, attention = OP(*arguments.values(), order)
    return {
        "grad_out": grad_out,
        "grad_attention": grad_attention,
        **arguments,
        "pooled": pooled,
        "attention": attention,
        "reversed": order,
        "output_mask": [True] * 7,
    }


def weights(change):
    return both(*(at(name, change) for name in WEIGHT_NAMES))


BAD = raising(
    ValueError,
    {
        # the number of branches
        "no_branch": (at("feats", lambda f: []), r"feats has 0 branches, expected 2 to 8"),
        "one_branch": (at("feats", lambda f: f[:1]), r"feats has 1 branches, expected 2 to 8"),
        "nine_branches": (at("feats", lambda f: f * 3), r"feats has 9 branches, expected 2 to 8"),
        # the features' shapes
        "rank_3": (each("feats", lambda f: f[0]),
            r"feats\[0\] has shape \[5, 5, 3\], expected 4 dimensions \[N, C, H, W\]"),
        "rank_5": (each("feats", lambda f: f[None]),
            r"feats\[0\] has shape \[1, 3, 5, 5, 3\], expected 4 dimensions"),
        "rank_of_one": (item("feats", 1, lambda f: f[0]),
            r"feats\[1\] has shape \[5, 5, 3\], expected \[3, 5, 5, 3\], the shape of feats\[0\]"),
        "shapes_differ": (item("feats", 2, lambda f: f[:, :, 1:]),
            r"feats\[2\] has shape \[3, 5, 4, 3\], expected \[3, 5, 5, 3\], the shape of feats\[0"),
        "batches_differ": (item("feats", 1, lambda f: f[:1]),
            r"feats\[1\] has shape \[1, 5, 5, 3\], expected \[3, 5, 5, 3\]"),
        "no_rows": (each("feats", lambda f: f[:, :, :0]),
            r"feats\[0\] has shape \[3, 5, 0, 3\], expected.*spatial size of at least 1 x 1"),
        "no_columns": (each("feats", lambda f: f[..., :0]),
            r"feats\[0\] has shape \[3, 5, 5, 0\], expected.*spatial size of at least 1 x 1"),
        "no_channels": (each("feats", lambda f: f[:, :0]),
            r"feats\[0\] has shape \[3, 0, 5, 3\], expected at least one channel"),
        # the weights' shapes
        "fc1_channels": (at("fc1_weight", shaped(2, 6)),
            r"fc1_weight has shape \[2, 6\], expected \[r, C\] or.*\[S, r, C\].*S = 3, C = 5"),
        "fc1_no_hidden_unit": (at("fc1_weight", shaped(0, 5)),
            r"fc1_weight has shape \[0, 5\], expected.*at least one hidden unit"),
        "fc1_rank": (at("fc1_weight", shaped(5)), r"fc1_weight has shape \[5\], expected \[r, C\]"),
        "fc1_scalar": (at("fc1_weight", shaped()), r"fc1_weight has shape \[\], expected \[r, C\]"),
        "fc1_kernel": (at("fc1_weight", shaped(2, 5, 3, 3)),
            r"fc1_weight has shape \[2, 5, 3, 3\], expected.*two trailing dimensions of 1"),
        "fc2_hidden": (at("fc2_weight", shaped(5, 3)),
            r"fc2_weight has shape \[5, 3\], expected \[C, r\].*C = 5 and r = 2"),
        "fc2_transposed": (at("fc2_weight", Tensor.t),
            r"fc2_weight has shape \[2, 5\], expected \[C, r\].*C = 5 and r = 2"),
        "fc2_per_branch_alone": (at("fc2_weight", shaped(3, 5, 2)),
            r"fc2_weight has shape \[3, 5, 2\], expected \[C, r\]"),
        "fc1_bias_length": (at("fc1_bias", shaped(3)), r"fc1_bias has shape \[3\], expected \[2\]"),
        "fc2_bias_length": (at("fc2_bias", shaped(1)), r"fc2_bias has shape \[1\], expected \[5\]"),
        "fc1_bias_per_branch": (at("fc1_bias", shaped(3, 2)),
            r"fc1_bias has shape \[3, 2\], expected \[2\] \(SE weights shared by all branches\)"),
    },
) | raising(
    TypeError,
    {
        "dtypes_differ": (item("feats", 1, Tensor.double),
            r"feats\[1\] has dtype Double, expected Float, the dtype of feats\[0\]"),
        **{
            name: (
                each("feats", lambda f, dtype=dtype: f.to(dtype)),
                rf"feats\[0\] has dtype {shown}, expected Float, Double, BFloat16 or Half",
            )
            for name, dtype, shown in (
                ("integer", torch.int, "Int"),
                ("boolean", torch.bool, "Bool"),
                ("complex", torch.complex64, "ComplexFloat"),
                ("float8", torch.float8_e4m3fn, "Float8_e4m3fn"),
            )
        },
        "double_weights": (weights(Tensor.double),
            r"fc1_weight has dtype Double, expected Float beside features of Float"),
        "half_weights_beside_float": (weights(Tensor.half),
            r"fc1_weight has dtype Half, expected Float beside features of Float"),
        "float_weights_beside_double": (each("feats", Tensor.double),
            r"fc1_weight has dtype Float, expected Double beside features of Double"),
        "bfloat16_weights_beside_half": (both(each("feats", Tensor.half), weights(Tensor.bfloat16)),
            r"fc1_weight has dtype BFloat16, expected Half or Float beside features of Half"),
        "half_weight_of_four": (both(each("feats", Tensor.half), at("fc2_weight", Tensor.half)),
            r"fc2_weight has dtype Half, expected Float, the dtype of fc1_weight"),
        "bias_dtype": (at("fc1_bias", Tensor.double),
            r"fc1_bias has dtype Double, expected Float, the dtype of fc1_weight"),
        "second_bias_dtype": (at("fc2_bias", Tensor.double),
            r"fc2_bias has dtype Double, expected Float, the dtype of fc1_weight"),
    },
)  # fmt: skip
# beside SE weights of each branch
BAD_PER_BRANCH = raising(
    ValueError,
    {
        "fc1_branches": (at("fc1_weight", shaped(4, 2, 5)),
            r"fc1_weight has shape \[4, 2, 5\], expected.*with S = 3"),
        "fc2_shared_alone": (at("fc2_weight", shaped(5, 2)),
            r"fc2_weight has shape \[5, 2\], expected \[S, C, r\], since fc1_weight has a leading "
            r"S"),
        "fc1_bias_shared": (at("fc1_bias", shaped(2)),
            r"fc1_bias has shape \[2\], expected \[3, 2\] \(SE weights of each branch\)"),
        "fc2_bias_shared": (at("fc2_bias", shaped(5)),
            r"fc2_bias has shape \[5\], expected \[3, 5\] \(SE weights of each branch\)"),
    },
)  # fmt: skip


def vector(name: str) -> dict:
    """The rows of a vector [N, S, C]."""
    rows = {
        "shape": (at(name, lambda t: t[:2]), r"\[2, 3, 5\], expected \[3, 3, 5\]", ValueError),
        "rank": (at(name, lambda t: t[..., None]), r"\[3, 3, 5, 1\], expected \[3", ValueError),
        "dtype": (
            at(name, Tensor.double),
            r"Double, expected Float, the accumulation type of Float",
            TypeError,
        ),
        "device": (at(name, on_meta), rf"meta, expected {HERE}", RuntimeError),
    }
    return {
        f"{name}_{row}": Bad(change, rf"{name} (has|is).*{words}", error)
        for row, (change, words, error) in rows.items()
    }


# The accumulation type follows the features' dtype.
POOLED_OF_OTHERS = raising(
    TypeError,
    {
        f"pooled_beside_{dtype}": (
            both(each("feats", lambda f, dtype=dtype: f.to(dtype)), weights(change),
                at("pooled", Tensor.half)),
            f"pooled has dtype Half, expected {expected}",
        )
        for dtype, change, expected in (
            (torch.bfloat16, Tensor.float, "Float"),
            (torch.float64, Tensor.double, "Double"),
        )
    },
)  # fmt: skip
MASK = {
    f"mask_of_{length}": (
        at("output_mask", lambda _, length=length: [True] * length),
        f"output_mask has {length} entries, expected 7",
    )
    for length in (0, 6, 8)
}
BAD_BACKWARD = (
    vector("pooled")
    | vector("attention")
    | vector("grad_attention")
    | raising(
        ValueError,
        MASK
        | {
            "grad_out_shape": (
                at("grad_out", lambda t: t[:, 1:]),
                r"grad_out has shape \[3, 14, 5, 3\], expected \[3, 15, 5, 3\]",
            )
        },
    )
    | raising(
        TypeError,
        {
            "grad_out_dtype": (
                at("grad_out", Tensor.half),
                r"grad_out has dtype Half, expected Float, the dtype of the features",
            )
        },
    )
    | raising(
        RuntimeError,
        {
            "grad_out_device": (
                at("grad_out", on_meta),
                f"grad_out is on meta, expected {HERE}",
            )
        },
    )
)

ELSEWHERE = {
    f"{name}_device": Bad(change, rf"{re.escape(name)} is on meta, expected {HERE}", RuntimeError)
    for name, change in {
        "feats[1]": item("feats", 1, on_meta),
        **{name: at(name, on_meta) for name in WEIGHT_NAMES},
    }.items()
}


def refusals(operator, good, kind: str, bad: dict[str, Bad]) -> Refusals:
    return Refusals(operator, functools.partial(good, kind), bad, ("cpu", "cuda"))


SUITES = {
    "psa_attention": refusals(OP, forward, "matrices", BAD | ELSEWHERE),
    "psa_attention_per_branch": refusals(OP, forward, "per_branch", BAD_PER_BRANCH),
    "psa_attention_pooled": refusals(
        OP, with_pooled, "matrices", vector("pooled") | POOLED_OF_OTHERS
    ),
    "psa_attention_backward": refusals(
        BACKWARD, backward, "matrices", BAD | ELSEWHERE | BAD_BACKWARD
    ),
    "psa_attention_backward_per_branch": refusals(BACKWARD, backward, "per_branch", BAD_PER_BRANCH),
}
