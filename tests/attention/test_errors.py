"""Bad input: the type of the exception, and that its message names the argument and states what
was expected and what was given. After each error the next good call works."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support.cases import BY_NAME, WEIGHT_KINDS, WEIGHT_NAMES, Inputs, make_inputs
from support.tolerance import make_cotangents
from torch import Tensor

from epsa_fused import psa_attention, psa_attention_reference

OP = torch.ops.epsa_fused.psa_attention.default
BACKWARD = torch.ops.epsa_fused.psa_attention_backward.default

CASE = BY_NAME["odd"]  # 3 branches of [3, 5, 5, 3], r = 2
PER_BRANCH = next(kind for kind in WEIGHT_KINDS if kind.name == "per_branch")
KINDS = {"shared": WEIGHT_KINDS[0], "per_branch": PER_BRANCH}


@dataclass(frozen=True)
class Bad:
    """One change to a good call, and what it must raise."""

    change: Callable[[Inputs], Inputs]
    error: type[Exception]
    message: str
    kind: str = "shared"


def feats(change: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: Inputs(change(inputs.feats), inputs.weights)


def feat(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return feats(lambda maps: [change(f) if s == index else f for s, f in enumerate(maps)])


def every_feat(change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return feats(lambda maps: [change(f) for f in maps])


def weight(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: Inputs(
        inputs.feats,
        [change(w) if n == name else w for n, w in zip(WEIGHT_NAMES, inputs.weights, strict=True)],
    )


def reshaped(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.zeros(shape, dtype=t.dtype, device=t.device)


HALVES = every_feat(Tensor.half)

BAD = {
    # the number of branches
    "no_branch": Bad(feats(lambda f: []), ValueError, r"feats has 0 branches, expected 2 to 8"),
    "one_branch": Bad(feats(lambda f: f[:1]), ValueError, r"feats has 1 branches, expected 2 to 8"),
    "nine_branches": Bad(
        feats(lambda f: f * 3), ValueError, r"feats has 9 branches, expected 2 to 8"
    ),
    # the features' shapes
    "rank_3": Bad(
        every_feat(lambda f: f[0]),
        ValueError,
        r"feats\[0\] has shape \[5, 5, 3\], expected 4 dimensions \[N, C, H, W\]",
    ),
    "rank_5": Bad(
        every_feat(lambda f: f[None]),
        ValueError,
        r"feats\[0\] has shape \[1, 3, 5, 5, 3\], expected 4 dimensions",
    ),
    "rank_of_one": Bad(
        feat(1, lambda f: f[0]),
        ValueError,
        r"feats\[1\] has shape \[5, 5, 3\], expected \[3, 5, 5, 3\], the shape of feats\[0\]",
    ),
    "shapes_differ": Bad(
        feat(2, lambda f: f[:, :, 1:]),
        ValueError,
        r"feats\[2\] has shape \[3, 5, 4, 3\], expected \[3, 5, 5, 3\], the shape of feats\[0\]",
    ),
    "batches_differ": Bad(
        feat(1, lambda f: f[:1]),
        ValueError,
        r"feats\[1\] has shape \[1, 5, 5, 3\], expected \[3, 5, 5, 3\]",
    ),
    "no_rows": Bad(
        every_feat(lambda f: f[:, :, :0]),
        ValueError,
        r"feats\[0\] has shape \[3, 5, 0, 3\], expected.*spatial size of at least 1 x 1",
    ),
    "no_columns": Bad(
        every_feat(lambda f: f[..., :0]),
        ValueError,
        r"feats\[0\] has shape \[3, 5, 5, 0\], expected.*spatial size of at least 1 x 1",
    ),
    "no_channels": Bad(
        every_feat(lambda f: f[:, :0]),
        ValueError,
        r"feats\[0\] has shape \[3, 0, 5, 3\], expected at least one channel",
    ),
    # dtypes
    "dtypes_differ": Bad(
        feat(1, Tensor.double),
        TypeError,
        r"feats\[1\] has dtype Double, expected Float, the dtype of feats\[0\]",
    ),
    "integer": Bad(
        every_feat(Tensor.int),
        TypeError,
        r"feats\[0\] has dtype Int, expected Float, Double, BFloat16 or Half",
    ),
    "boolean": Bad(
        every_feat(Tensor.bool),
        TypeError,
        r"feats\[0\] has dtype Bool, expected Float, Double, BFloat16 or Half",
    ),
    "complex": Bad(
        every_feat(lambda f: f.to(torch.complex64)),
        TypeError,
        r"feats\[0\] has dtype ComplexFloat, expected Float, Double, BFloat16 or Half",
    ),
    "float8": Bad(
        every_feat(lambda f: f.to(torch.float8_e4m3fn)),
        TypeError,
        r"feats\[0\] has dtype Float8_e4m3fn, expected Float, Double, BFloat16 or Half",
    ),
    "double_weights": Bad(
        lambda inputs: Inputs(inputs.feats, [w.double() for w in inputs.weights]),
        TypeError,
        r"fc1_weight has dtype Double, expected Float beside features of Float",
    ),
    "half_weights_beside_float": Bad(
        lambda inputs: Inputs(inputs.feats, [w.half() for w in inputs.weights]),
        TypeError,
        r"fc1_weight has dtype Half, expected Float beside features of Float",
    ),
    "float_weights_beside_double": Bad(
        every_feat(Tensor.double),
        TypeError,
        r"fc1_weight has dtype Float, expected Double beside features of Double",
    ),
    "bfloat16_weights_beside_half": Bad(
        lambda inputs: Inputs(HALVES(inputs).feats, [w.bfloat16() for w in inputs.weights]),
        TypeError,
        r"fc1_weight has dtype BFloat16, expected Half or Float beside features of Half",
    ),
    "half_weight_of_four": Bad(
        lambda inputs: weight("fc2_weight", Tensor.half)(HALVES(inputs)),
        TypeError,
        r"fc2_weight has dtype Half, expected Float, the dtype of fc1_weight",
    ),
    "bias_dtype": Bad(
        weight("fc1_bias", Tensor.double),
        TypeError,
        r"fc1_bias has dtype Double, expected Float, the dtype of fc1_weight",
    ),
    "second_bias_dtype": Bad(
        weight("fc2_bias", Tensor.double),
        TypeError,
        r"fc2_bias has dtype Double, expected Float, the dtype of fc1_weight",
    ),
    # the weights' shapes
    "fc1_channels": Bad(
        weight("fc1_weight", reshaped(2, 6)),
        ValueError,
        r"fc1_weight has shape \[2, 6\], expected \[r, C\] or.*\[S, r, C\].*S = 3, C = 5",
    ),
    "fc1_no_hidden_unit": Bad(
        weight("fc1_weight", reshaped(0, 5)),
        ValueError,
        r"fc1_weight has shape \[0, 5\], expected.*at least one hidden unit",
    ),
    "fc1_rank": Bad(
        weight("fc1_weight", reshaped(5)),
        ValueError,
        r"fc1_weight has shape \[5\], expected \[r, C\]",
    ),
    "fc1_scalar": Bad(
        weight("fc1_weight", reshaped()),
        ValueError,
        r"fc1_weight has shape \[\], expected \[r, C\]",
    ),
    "fc1_kernel": Bad(
        weight("fc1_weight", reshaped(2, 5, 3, 3)),
        ValueError,
        r"fc1_weight has shape \[2, 5, 3, 3\], expected.*two trailing dimensions of 1",
    ),
    "fc1_branches": Bad(
        weight("fc1_weight", reshaped(4, 2, 5)),
        ValueError,
        r"fc1_weight has shape \[4, 2, 5\], expected.*with S = 3",
        "per_branch",
    ),
    "fc2_hidden": Bad(
        weight("fc2_weight", reshaped(5, 3)),
        ValueError,
        r"fc2_weight has shape \[5, 3\], expected \[C, r\].*C = 5 and r = 2",
    ),
    "fc2_transposed": Bad(
        weight("fc2_weight", Tensor.t),
        ValueError,
        r"fc2_weight has shape \[2, 5\], expected \[C, r\].*C = 5 and r = 2",
    ),
    "fc2_per_branch_alone": Bad(
        weight("fc2_weight", reshaped(3, 5, 2)),
        ValueError,
        r"fc2_weight has shape \[3, 5, 2\], expected \[C, r\]",
    ),
    "fc2_shared_alone": Bad(
        weight("fc2_weight", reshaped(5, 2)),
        ValueError,
        r"fc2_weight has shape \[5, 2\], expected \[S, C, r\], since fc1_weight has a leading S",
        "per_branch",
    ),
    "fc1_bias_length": Bad(
        weight("fc1_bias", reshaped(3)),
        ValueError,
        r"fc1_bias has shape \[3\], expected \[2\]",
    ),
    "fc2_bias_length": Bad(
        weight("fc2_bias", reshaped(1)),
        ValueError,
        r"fc2_bias has shape \[1\], expected \[5\]",
    ),
    "fc1_bias_per_branch": Bad(
        weight("fc1_bias", reshaped(3, 2)),
        ValueError,
        r"fc1_bias has shape \[3, 2\], expected \[2\] \(SE weights shared by all branches\)",
    ),
    "fc1_bias_shared": Bad(
        weight("fc1_bias", reshaped(2)),
        ValueError,
        r"fc1_bias has shape \[2\], expected \[3, 2\] \(SE weights of each branch\)",
        "per_branch",
    ),
    "fc2_bias_shared": Bad(
        weight("fc2_bias", reshaped(5)),
        ValueError,
        r"fc2_bias has shape \[5\], expected \[3, 5\] \(SE weights of each branch\)",
        "per_branch",
    ),
}


@pytest.mark.parametrize("requires_grad", (False, True), ids=("no_grad", "grad"))
@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad, requires_grad, device):
    bad = BAD[bad]
    good = make_inputs(CASE, kind=KINDS[bad.kind], device=device)
    inputs = bad.change(good)
    if requires_grad:
        inputs = inputs.map(lambda t: t.requires_grad_() if t.is_floating_point() else t)
    before = psa_attention(*good.args)
    with pytest.raises(bad.error, match="psa_attention: " + bad.message):
        psa_attention(*inputs.args)
    assert torch.equal(psa_attention(*good.args), before)


@pytest.mark.parametrize("bad", BAD)
def test_the_backward_op_checks_the_same_arguments(bad, device):
    bad = BAD[bad]
    good = make_inputs(CASE, kind=KINDS[bad.kind], device=device)
    _, pooled, attention = OP(*good.args, True)
    rest = (pooled, attention, True, [True] * 7)
    with pytest.raises(bad.error, match="psa_attention_backward: " + bad.message):
        BACKWARD(None, None, *bad.change(good).args, *rest)


# ---- devices ----


@pytest.mark.parametrize("name", ("feats[1]", *WEIGHT_NAMES))
def test_tensors_on_different_devices(name):
    inputs = make_inputs(CASE)
    moved = dict(zip(inputs.names(), inputs.tensors(), strict=True))
    moved[name] = moved[name].to("meta")
    tensors = list(moved.values())
    message = rf"psa_attention: {name.replace('[', '.').replace(']', '.')} is on meta, expected cpu"
    with pytest.raises(RuntimeError, match=message):
        psa_attention(tensors[:3], *tensors[3:])


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


# ---- the operators' further arguments ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (lambda t: t[:2], ValueError, r"\[2, 3, 5\], expected \[3, 3, 5\]"),
        (lambda t: t[..., None], ValueError, r"\[3, 3, 5, 1\], expected \[3, 3, 5\]"),
        (Tensor.double, TypeError, r"Double, expected Float, the accumulation type of Float"),
        (lambda t: t.to("meta"), RuntimeError, r"meta, expected cpu"),
    ),
    ids=("shape", "rank", "dtype", "device"),
)
@pytest.mark.parametrize("name", ("given pooled", "pooled", "attention", "grad_attention"))
def test_vectors_of_the_branches(name, change, error, message):
    inputs = make_inputs(CASE)
    grad_out, grad_attention = make_cotangents(CASE, torch.float32)
    _, pooled, attention = OP(*inputs.args, True)
    given = {"grad_attention": grad_attention, "pooled": pooled, "attention": attention}
    if name == "given pooled":
        with pytest.raises(error, match=rf"psa_attention: pooled (has|is).*{message}"):
            OP(*inputs.args, True, change(pooled))
        return
    given[name] = change(given[name])
    first, *rest = given.values()
    with pytest.raises(error, match=rf"psa_attention_backward: {name} (has|is).*{message}"):
        BACKWARD(grad_out, first, *inputs.args, *rest, True, [True] * 7)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_pooled_has_the_accumulation_type(dtype, device):
    inputs = make_inputs(CASE, dtype, device=device)
    expected = "Double" if dtype == torch.float64 else "Float"
    wrong = torch.zeros(CASE.attention_shape, dtype=torch.float16, device=device)
    with pytest.raises(TypeError, match=f"pooled has dtype Half, expected {expected}"):
        OP(*inputs.args, True, wrong)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (lambda t: t[:, 1:], ValueError, r"has shape \[3, 14, 5, 3\], expected \[3, 15, 5, 3\]"),
        (Tensor.half, TypeError, r"has dtype Half, expected Float, the dtype of the features"),
        (lambda t: t.to("meta"), RuntimeError, r"is on meta, expected cpu"),
    ),
    ids=("shape", "dtype", "device"),
)
def test_grad_out(change, error, message):
    inputs = make_inputs(CASE)
    grad_out, _ = make_cotangents(CASE, torch.float32)
    _, pooled, attention = OP(*inputs.args, True)
    with pytest.raises(error, match="psa_attention_backward: grad_out " + message):
        BACKWARD(change(grad_out), None, *inputs.args, pooled, attention, True, [True] * 7)


@pytest.mark.parametrize("length", (0, 6, 8))
def test_output_mask(length, device):
    inputs = make_inputs(CASE, device=device)
    grad_out, _ = make_cotangents(CASE, torch.float32, device=device)
    _, pooled, attention = OP(*inputs.args, True)
    message = rf"psa_attention_backward: output_mask has {length} entries, expected 7"
    with pytest.raises(ValueError, match=message):
        BACKWARD(grad_out, None, *inputs.args, pooled, attention, True, [True] * length)


# ---- without data, where torch.compile would meet the same input first ----


@pytest.mark.parametrize(
    "bad", ("no_branch", "one_branch", "nine_branches", "rank_3", "shapes_differ", "rank_of_one")
)
def test_meta_tensors_are_checked_too(bad):
    bad = BAD[bad]
    inputs = make_inputs(CASE, kind=KINDS[bad.kind])
    meta = bad.change(inputs).map(lambda t: t.to("meta"))
    with pytest.raises(bad.error, match="psa_attention: " + bad.message):
        psa_attention(*meta.args)


def test_a_compiled_call_raises_the_same_error(device):
    """The fake kernel lets weights pass; the real one meets them when the graph runs."""
    compiled = torch.compile(psa_attention, backend="eager", fullgraph=True)
    inputs = BAD["fc1_channels"].change(make_inputs(CASE, device=device))
    with pytest.raises(ValueError, match=BAD["fc1_channels"].message):
        compiled(*inputs.args)
