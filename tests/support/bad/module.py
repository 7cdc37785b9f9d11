"""What the operators of a whole module refuse. The words name arguments that these operators have:
x and weights, and no feats."""

import torch
from support.cases import WEIGHT_NAMES
from support.errors import (
    HERE,
    Arguments,
    Refusals,
    at,
    both,
    on_meta,
    put,
    raising,
    shaped,
)
from support.modules import arguments, build, image
from torch import Tensor

from epsa_fused import PSAModule

FORWARD = torch.ops.epsa_fused.psa_forward.default
SAVE_OUTPUT = torch.ops.epsa_fused.psa_save_output.default
BACKWARD = torch.ops.epsa_fused.psa_save_output_backward.default

CASE = "two_branches"  # 2 branches of [5, 16, 6, 5] from x [5, 32, 6, 5], r = 4
NAMES = ("x", "weights", "groups", "stride", "padding", "dilation", *WEIGHT_NAMES, "reversed")


def forward(device: str) -> Arguments:
    module, x = build(CASE, PSAModule).to(device), image(CASE).to(device)
    return dict(zip(NAMES, arguments(module, x), strict=True))


def backward(device: str) -> Arguments:
    given = forward(device)
    order = given.pop("reversed")
    out, pooled, attention = SAVE_OUTPUT(*given.values(), order)
    saved = {"out": out, "pooled": pooled, "attention": attention}
    return {"grad_out": out} | given | saved | {"reversed": order, "output_mask": [True] * 7}


def first(name: str):
    return at(name, lambda given: given[:1])


def packed(given: Tensor):
    return lambda arguments: arguments | {"packed": given}


ONE_BRANCH = both(*(first(name) for name in ("weights", "groups", "padding", "dilation")))

BAD = raising(
    ValueError,
    {
        "one_branch": (ONE_BRANCH, r"weights has 1 branches, expected 2 to 8$"),
        "nine_branches": (
            at("weights", lambda given: [given[0]] * 9),
            r"weights has 9 branches, expected 2 to 8$",
        ),
        "stride_0": (put("stride", 0), r"stride is 0, expected at least 1"),
        "groups_short": (first("groups"), r"groups has 1 entries, expected 2"),
        "fc1_channels": (
            at("fc1_weight", shaped(3, 99)),
            r"fc1_weight has shape \[3, 99\], expected \[r, C\] or.*S = 2, C = 16 and at least",
        ),
        "fc2_hidden": (
            at("fc2_weight", shaped(16, 3)),
            r"fc2_weight has shape \[16, 3\], expected",
        ),
        "fc1_bias": (at("fc1_bias", shaped(99)), r"fc1_bias has shape \[99\], expected \[\d+\]"),
        "fc2_bias": (at("fc2_bias", shaped(99)), r"fc2_bias has shape \[99\], expected \[16\]"),
    },
) | raising(
    TypeError,
    {
        "fc1_dtype": (
            at("fc1_weight", Tensor.double),
            r"fc1_weight has dtype Double, expected Float beside features of Float",
        ),
        "fc2_dtype": (at("fc2_weight", Tensor.double), r"fc2_weight has dtype Double, expected"),
    },
)
BAD_BACKWARD = raising(
    ValueError,
    {
        "mask_short": (
            put("output_mask", [True] * 3),
            r"output_mask has 3 entries, expected 7 \(x, the weights and the SE's four\)",
        ),
        "out_shape": (
            at("out", lambda t: t[..., :4]),
            r"out has shape \[5, 32, 6, 4\], expected \[5, 32, 6, 5\]",
        ),
        "grad_out_shape": (
            at("grad_out", lambda t: t[:4]),
            r"grad_out has shape \[4, 32, 6, 5\], expected \[5, 32, 6, 5\]",
        ),
        "attention_shape": (
            at("attention", lambda t: t[:2]),
            r"attention has shape \[2, 2, 16\], expected \[5, 2, 16\]",
        ),
    },
) | raising(
    TypeError,
    {
        "out_dtype": (at("out", Tensor.double), r"out has dtype Double, expected Float"),
        "pooled_dtype": (at("pooled", Tensor.double), r"pooled has dtype Double, expected Float"),
    },
)
BAD_FORWARD = raising(
    ValueError,
    {
        "packed_dtype": (
            packed(torch.zeros(3)),
            r"packed has dtype Float and shape \[3\], expected the bytes",
        ),
        "packed_shape": (
            packed(torch.zeros(3, 1, dtype=torch.uint8)),
            r"packed has dtype Byte and shape \[3, 1\], expected the bytes",
        ),
    },
)
ELSEWHERE = raising(
    RuntimeError,
    {
        f"{name}_device": (at(name, on_meta), rf"{name} is on meta, expected {HERE}, the device of")
        for name in WEIGHT_NAMES
    },
)
# The dispatcher sends a call with any meta tensor to the kernel that only has shapes.
PACKED_ELSEWHERE = raising(
    RuntimeError,
    {
        "packed_device": (
            packed(torch.zeros(64, dtype=torch.uint8, device="meta")),
            rf"packed is on meta, expected {HERE}, the device of x",
        )
    },
)


def with_bias(device: str) -> Arguments:
    rest = {"packed": None, "winograd": True, "scale": None, "shift": None, "relu": False}
    return forward(device) | rest | {"bias": torch.ones(32, device=device)}


SUITES = {
    "psa_forward_bias": Refusals(
        FORWARD,
        with_bias,
        raising(ValueError, {"bias_short": (first("bias"), r"bias has shape \[1\], expected \[32")})
        | raising(TypeError, {"bias_dtype": (at("bias", Tensor.half), r"bias has dtype Half, exp")})
        | raising(RuntimeError, {"bias_device": (at("bias", on_meta), r"bias is on meta, exp")}),
    ),
    "psa_forward": Refusals(FORWARD, forward, BAD | BAD_FORWARD | ELSEWHERE | PACKED_ELSEWHERE),
    "psa_save_output": Refusals(SAVE_OUTPUT, forward, BAD | ELSEWHERE),
    "psa_save_output_backward": Refusals(
        BACKWARD, backward, BAD | BAD_BACKWARD | ELSEWHERE, differentiable=False
    ),
}
