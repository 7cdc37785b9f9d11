"""Bad input of the attention: the exception, and a message that names the argument and states what
was expected and what was given."""

import functools

import pytest
import torch
from support.cases import BY_NAME, WEIGHT_KINDS, WEIGHT_NAMES, make_inputs
from support.errors import (
    Arguments,
    assert_raises,
    assert_same_words_on_meta,
    at,
    both,
    each,
    item,
    raising,
    shaped,
)
from support.tolerance import make_cotangents
from torch import Tensor

from epsa_fused import psa_attention, psa_attention_reference

OP = torch.ops.epsa_fused.psa_attention.default
BACKWARD = torch.ops.epsa_fused.psa_attention_backward.default

CASE = BY_NAME["odd"]  # 3 branches of [3, 5, 5, 3], r = 2
KINDS = {kind.name: kind for kind in WEIGHT_KINDS}


def forward(kind: str = "matrices", dtype: torch.dtype = torch.float32, device="cpu") -> Arguments:
    feats, *weights = make_inputs(CASE, dtype, kind=KINDS[kind], device=device).args
    return {"feats": feats, **dict(zip(WEIGHT_NAMES, weights, strict=True)), "reversed": True}


def with_pooled() -> Arguments:
    arguments = forward()
    return arguments | {"pooled": OP(*arguments.values())[1]}


def backward(kind: str = "matrices", device="cpu") -> Arguments:
    arguments = forward(kind, device=device)
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
EVERY = [("matrices", bad) for bad in BAD] + [("per_branch", bad) for bad in BAD_PER_BRANCH]


def vector(name: str) -> dict:
    """The rows of a vector [N, S, C]."""
    rows = {
        "shape": (at(name, lambda t: t[:2]), r"\[2, 3, 5\], expected \[3, 3, 5\]"),
        "rank": (at(name, lambda t: t[..., None]), r"\[3, 3, 5, 1\], expected \[3, 3, 5\]"),
    }
    dtype = (at(name, Tensor.double), r"Double, expected Float, the accumulation type of Float")
    device = (at(name, lambda t: t.to("meta")), r"meta, expected cpu")
    table = raising(ValueError, rows) | raising(TypeError, {"dtype": dtype})
    table |= raising(RuntimeError, {"device": device})
    return {
        f"{name}_{row}": type(bad)(bad.change, rf"{name} (has|is).*{bad.words}", bad.error)
        for row, bad in table.items()
    }


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
                at("grad_out", lambda t: t.to("meta")),
                "grad_out is on meta, expect",
            )
        },
    )
)


@pytest.mark.parametrize("requires_grad", (False, True), ids=("no_grad", "grad"))
@pytest.mark.parametrize(("kind", "bad"), EVERY)
def test_bad_arguments(kind, bad, requires_grad, device):
    row = (BAD | BAD_PER_BRANCH)[bad]
    assert_raises(OP, row, lambda: forward(kind, device=device), requires_grad=requires_grad)


@pytest.mark.parametrize(("kind", "bad"), EVERY)
def test_the_backward_op_checks_the_same_arguments(kind, bad, device):
    assert_raises(BACKWARD, (BAD | BAD_PER_BRANCH)[bad], lambda: backward(kind, device))


@pytest.mark.parametrize("bad", BAD_BACKWARD)
def test_bad_arguments_of_the_backward_op(bad):
    assert_raises(BACKWARD, BAD_BACKWARD[bad], backward)


@pytest.mark.parametrize("bad", vector("pooled"))
def test_a_bad_pooled(bad):
    assert_raises(OP, vector("pooled")[bad], with_pooled)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_pooled_has_the_accumulation_type(dtype, device):
    expected = "Double" if dtype == torch.float64 else "Float"
    wrong = torch.zeros(CASE.attention_shape, dtype=torch.float16, device=device)
    with pytest.raises(TypeError, match=f"pooled has dtype Half, expected {expected}"):
        OP(*forward(dtype=dtype, device=device).values(), wrong)


@pytest.mark.parametrize("name", ("feats[1]", *WEIGHT_NAMES))
def test_tensors_on_different_devices(name):
    change = (
        functools.partial(item, "feats", 1) if name == "feats[1]" else functools.partial(at, name)
    )
    wrong = change(lambda t: t.to("meta"))(forward())
    message = rf"psa_attention: {name.replace('[', '.').replace(']', '.')} is on meta, expected cpu"
    with pytest.raises(RuntimeError, match=message):
        OP(*wrong.values())


# ---- the Python function's own arguments ----


def test_one_tensor_in_place_of_a_list(device):
    """Its first dimension would be taken for the branches."""
    inputs = make_inputs(CASE, device=device)
    with pytest.raises(TypeError, match=r"feats is a Tensor, expected a sequence of 2 to 8.*chunk"):
        psa_attention(torch.cat(inputs.feats, 1), *inputs.weights)


@pytest.mark.parametrize("function", (psa_attention, psa_attention_reference))
@pytest.mark.parametrize("order", ("backward", "", None, True))
def test_unknown_branch_order(order, function, device):
    message = r"branch_order: expected one of \('reversed', 'forward'\), got " + repr(order)
    with pytest.raises(ValueError, match=message):
        function(*make_inputs(CASE, device=device).args, branch_order=order)


def test_things_that_are_no_tensors(device):
    inputs = make_inputs(CASE, device=device)
    with pytest.raises((TypeError, RuntimeError), match="feats"):
        psa_attention([f.tolist() for f in inputs.feats], *inputs.weights)
    with pytest.raises((TypeError, RuntimeError), match="fc1_weight"):
        psa_attention(inputs.feats, None, *inputs.weights[1:])


# ---- without data, where torch.compile would meet the same input first ----

NOT_DEVICE = {name: bad for name, bad in BAD_BACKWARD.items() if not name.endswith("_device")}


@pytest.mark.parametrize(("kind", "bad"), EVERY)
def test_meta_tensors_are_refused_with_the_same_words(kind, bad):
    row = (BAD | BAD_PER_BRANCH)[bad]
    assert_same_words_on_meta(OP, row, lambda: forward(kind))
    assert_same_words_on_meta(BACKWARD, row, lambda: backward(kind))


@pytest.mark.parametrize("bad", NOT_DEVICE)
def test_the_backward_op_refuses_meta_tensors_with_the_same_words(bad):
    assert_same_words_on_meta(BACKWARD, NOT_DEVICE[bad], backward)


@pytest.mark.parametrize("row", ("shape", "rank", "dtype"))
def test_a_bad_pooled_on_meta(row):
    assert_same_words_on_meta(OP, vector("pooled")[f"pooled_{row}"], with_pooled)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_a_compiled_call_is_refused_while_it_is_traced(dynamic, device):
    compiled = torch.compile(lambda *a: OP(*a), backend="eager", fullgraph=True, dynamic=dynamic)
    bad = BAD["fc1_channels"]
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="fc1_weight has shape"):
        compiled(*bad.change(forward(device=device)).values())
