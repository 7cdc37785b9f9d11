"""The backward pass: gradients' values, dtypes and strides. Only wanted ones are computed."""

import pytest
import torch
from support.cases import (
    BY_NAME,
    CASES,
    DTYPES,
    HALF_DTYPES,
    LAYOUTS,
    ORDERS,
    PLAIN_LAYOUTS,
    QUICK,
    QUICK_CASES,
    SMALL,
    WEIGHT_KINDS,
    Inputs,
    make_inputs,
    name_of,
    out_format,
    strides_of,
)
from support.memory import allocations
from support.tolerance import (
    accumulation_type,
    assert_no_worse,
    check,
    make_cotangents,
    run,
    special_values,
)

from epsa_fused import psa_attention, psa_attention_reference

pytestmark = pytest.mark.emulated

OP = torch.ops.epsa_fused.psa_attention.default
BACKWARD = torch.ops.epsa_fused.psa_attention_backward.default


@pytest.mark.per_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("case", QUICK_CASES, ids=name_of)
def test_every_shape(case, layout, dtype, device):
    inputs = make_inputs(case, dtype, layout, device=device)
    result = check(inputs, *make_cotangents(case, dtype, layout.out_format, device))
    strides = strides_of(case.map_shape, out_format(case, layout))
    for name, t in zip(inputs.names(), inputs.tensors(), strict=True):
        grad = result[f"grad of {name}"]
        assert (grad.dtype, grad.shape, grad.device) == (t.dtype, t.shape, t.device)
        assert grad.stride() == (strides if "feats" in name else t.stride())


@pytest.mark.per_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize(
    "case", (BY_NAME["stage3"], pytest.param(BY_NAME["not_square"], marks=QUICK)), ids=name_of
)
def test_every_layout(case, layout, dtype, device):
    inputs = make_inputs(case, dtype, layout, device=device)
    result = check(inputs, *make_cotangents(case, dtype, layout.out_format, device))
    for s in range(case.branches):
        strides = strides_of(case.map_shape, layout.out_format)
        assert result[f"grad of feats[{s}]"].stride() == strides


@pytest.mark.per_isa
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", WEIGHT_KINDS, ids=name_of)
@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_every_kind_of_weights(case, kind, order, device):
    inputs = make_inputs(case, kind=kind, device=device)
    check(inputs, *make_cotangents(case, torch.float32, device=device), branch_order=order)


@pytest.mark.per_isa
@pytest.mark.parametrize("kind", WEIGHT_KINDS, ids=name_of)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
def test_float32_weights_beside_half_precision_features(dtype, kind, device):
    """Their gradients are float32, and as exact."""
    case = BY_NAME["stage3"]
    inputs = make_inputs(case, dtype, kind=kind, weight_dtype=torch.float32, device=device)
    result = check(inputs, *make_cotangents(case, dtype, device=device))
    assert result["grad of fc1_weight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES[:4], ids=name_of)
def test_half_precision_is_no_worse_than_eager(case, dtype, device):
    """The promise to users. The rule of tolerance.py is stricter."""
    inputs = make_inputs(case, dtype, device=device)
    grad_out, _ = make_cotangents(case, dtype, device=device)
    exact = run(psa_attention_reference, inputs.double(), grad_out.double())
    fused = run(psa_attention, inputs, grad_out)
    eager = run(psa_attention_reference, inputs, grad_out)
    for name, expected in exact.items():
        if "grad" in name:
            assert_no_worse(fused[name], eager[name], expected)


def test_dead_hidden_units(device):
    """All branches weigh the same: terms of db2 cancel, and no gradient reaches W1, b1 and W2."""
    case = BY_NAME["stage3"]
    inputs = make_inputs(case, device=device)
    inputs.weights[1].fill_(-100)
    result = check(inputs, *make_cotangents(case, torch.float32, device=device))
    for name in ("fc1_weight", "fc1_bias", "fc2_weight"):
        assert not result[f"grad of {name}"].any()


# ---- cotangents ----


def _expanded(shape, *kept: int):
    """Ones in memory only along the dimensions `kept`."""
    small = [size if d in kept else 1 for d, size in enumerate(shape)]
    return torch.randn(small).expand(shape)


GRADIENTS = {
    "contiguous": lambda shape: torch.randn(shape),
    "channels_last": lambda shape: torch.randn(shape).to(memory_format=torch.channels_last),
    "one_value": lambda shape: _expanded(shape),
    "per_sample": lambda shape: _expanded(shape, 0),
    "per_channel": lambda shape: _expanded(shape, 1),
    "per_pixel": lambda shape: _expanded(shape, 2, 3),
    "per_column": lambda shape: _expanded(shape, 0, 1, 3),
    "transposed": lambda shape: torch.randn(shape[0], shape[1], shape[3], shape[2]).transpose(2, 3),
    "channels_of_more": lambda shape: torch.randn(shape[0], shape[1] + 3, *shape[2:])[:, 1:-2],
    "pixels_of_more": lambda shape: torch.randn(shape[0], shape[2], shape[3], shape[1] + 3)[
        ..., 1:-2].permute(0, 3, 1, 2),
    "every_second_sample": lambda shape: torch.randn(2 * shape[0], *shape[1:])[::2],
}  # fmt: skip


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_grad_out_of_any_strides(case, layout, gradient, device):
    grad_out = GRADIENTS[gradient](case.out_shape).to(device)
    result = check(make_inputs(case, layout=layout, device=device), grad_out)
    strides = strides_of(case.map_shape, layout.out_format)
    assert result["grad of feats[0]"].stride() == strides


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_sum_backward(dtype, layout, device):
    """The gradient of sum() is one expanded 1."""
    case = BY_NAME["stage3"]
    inputs = make_inputs(case, dtype, layout, device=device).leaves()
    psa_attention(*inputs.args).sum().backward()
    ones = torch.ones(case.out_shape, dtype=dtype, device=device)
    expected = run(psa_attention, inputs, ones)
    for name, t in zip(inputs.names(), inputs.tensors(), strict=True):
        assert torch.equal(t.grad, expected[f"grad of {name}"]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_loss_on_out_alone(layout, dtype, device):
    case = BY_NAME["not_square"]
    grad_out, _ = make_cotangents(case, dtype, layout.out_format, device)
    check(make_inputs(case, dtype, layout, device=device), grad_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_loss_on_the_attention_alone(layout, dtype, device):
    case = BY_NAME["not_square"]
    _, grad_attention = make_cotangents(case, dtype, device=device)
    result = check(make_inputs(case, dtype, layout, device=device), None, grad_attention)
    strides = strides_of(case.map_shape, layout.out_format)
    assert result["grad of feats[0]"].stride() == strides


def test_strided_grad_attention(device):
    case = BY_NAME["odd"]
    strided = torch.randn(case.attention_shape[::-1], device=device).permute(2, 1, 0)
    check(make_inputs(case, device=device), None, strided)
    check(make_inputs(case, device=device), None, strided[:1, :, :1].expand(case.attention_shape))


def test_pooled_is_not_differentiable(device):
    inputs = make_inputs(BY_NAME["odd"], device=device).leaves()
    out, pooled, attention = OP(*inputs.args, True)
    assert out.requires_grad and attention.requires_grad and not pooled.requires_grad


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_a_given_pooled_passes_its_gradient_to_the_features(layout, device):
    """A given `pooled` stands for the features' mean and takes no gradient itself."""
    case = BY_NAME["stage3"]
    inputs = make_inputs(case, layout=layout, device=device).leaves()
    grad_out, _ = make_cotangents(case, torch.float32, layout.out_format, device)
    out, pooled, _ = OP(*inputs.args, True)
    plain = torch.autograd.grad(out, inputs.tensors(), grad_out)
    given = pooled.clone().requires_grad_()
    out = OP(*inputs.args, True, given)[0]
    *grads, none = torch.autograd.grad(out, [*inputs.tensors(), given], grad_out, allow_unused=True)
    assert none is None
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))


# ---- only what is asked for ----


@QUICK
@pytest.mark.parametrize("kind", (WEIGHT_KINDS[0], WEIGHT_KINDS[7], WEIGHT_KINDS[4]), ids=name_of)
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_any_subset_of_the_gradients(layout, kind, device):
    """Single gradients, all but one, features alone, weights alone: equal to those among all."""
    case = BY_NAME["odd"]
    inputs = make_inputs(case, layout=layout, kind=kind, device=device)
    cotangents = make_cotangents(case, torch.float32, layout.out_format, device)
    full = run(psa_attention, inputs, *cotangents)
    names = inputs.names()
    features = {name for name in names if "feats" in name}
    subsets = [{name} for name in names] + [set(names) - {name} for name in names]
    for wanted in [*subsets, features, set(names) - features]:
        leaves = inputs.leaves()
        for name, t in zip(names, leaves.tensors(), strict=True):
            t.requires_grad_(name in wanted)
        results = psa_attention(*leaves.args, return_attention=True)
        torch.autograd.backward(results, cotangents)
        for name, t in zip(names, leaves.tensors(), strict=True):
            if name in wanted:
                assert torch.equal(t.grad, full[f"grad of {name}"]), (name, wanted)
            else:
                assert t.grad is None


@QUICK
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("unwanted", range(7))
def test_output_mask(unwanted, layout, device):
    """An unwanted gradient is an empty tensor, the others are what they are without a mask."""
    case = BY_NAME["odd"]
    inputs = make_inputs(case, layout=layout, device=device)
    grad_out, grad_attention = make_cotangents(case, torch.float32, layout.out_format, device)
    _, pooled, attention = OP(*inputs.args, True)

    def backward(mask):
        grads, *weights = BACKWARD(
            grad_out, grad_attention, *inputs.args, pooled, attention, True, mask
        )
        return [*grads, *weights]

    every = [True] * 7
    full = backward(every)
    masked = backward([i != unwanted for i in range(7)])
    for i, (a, b) in enumerate(zip(masked, full, strict=True)):
        assert a.shape == (0,) if i == unwanted else torch.equal(a, b)
    assert all(t.shape == (0,) for t in backward([False] * 7))
    memories = [t.data_ptr() for t in masked if t.numel()]
    assert len(set(memories)) == len(memories)


def test_no_cotangent_at_all_gives_zeros(device):
    """Reached by calling the backward op only: autograd would not call it."""
    inputs = make_inputs(BY_NAME["odd"], device=device)
    _, pooled, attention = OP(*inputs.args, True)
    grads, *weights = BACKWARD(None, None, *inputs.args, pooled, attention, True, [True] * 7)
    for grad, t in zip([*grads, *weights], inputs.tensors(), strict=True):
        assert grad.shape == t.shape and not grad.any()


def test_an_empty_batch_gives_zero_weight_gradients(device):
    case = BY_NAME["empty_batch"]
    inputs = make_inputs(case, device=device).leaves()
    out = psa_attention(*inputs.args)
    assert out.shape == case.out_shape
    out.sum().backward()
    for t in inputs.tensors():
        assert t.grad.shape == t.shape and not t.grad.any()


# ---- NaN and Inf ----


@pytest.mark.per_isa
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize(
    "where",
    ("feats[1]", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "grad_out", "grad_attention"),
)
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_nan_and_inf_travel_as_in_eager(layout, where, value, device):
    case = BY_NAME["not_square"]
    inputs = make_inputs(case, layout=layout, device=device)
    cotangents = make_cotangents(case, torch.float32, layout.out_format, device)
    names = [*inputs.names(), "grad_out", "grad_attention"]
    target = dict(zip(names, [*inputs.tensors(), *cotangents], strict=True))[where]
    target[(1,) * target.dim()] = value
    fused = run(psa_attention, inputs, *cotangents)
    eager = run(psa_attention_reference, inputs, *cotangents)
    for name, expected in eager.items():
        assert torch.equal(special_values(fused[name]), special_values(expected)), name


# ---- memory ----


def backward_allocations(inputs: Inputs, grad_out) -> tuple[list[int], int]:
    """The backward's allocations: those of one map or more, and the sum of the others."""
    out = psa_attention(*inputs.args)
    wanted = [t for t in inputs.tensors() if t.requires_grad]
    one_map = inputs.feats[0].numel() * inputs.feats[0].element_size()
    sizes = allocations(lambda: torch.autograd.grad(out, wanted, grad_out, retain_graph=True))
    return sorted(s for s in sizes if s >= one_map), sum(s for s in sizes if s < one_map)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.in_place], ids=name_of)
def test_nothing_of_the_features_size_is_allocated_but_their_gradients(layout, dtype):
    case = BY_NAME["stage1"]
    inputs = make_inputs(case, dtype, layout).leaves()
    grad_out, _ = make_cotangents(case, dtype, layout.out_format)
    one_map = case.batch * case.channels * case.pixels * dtype.itemsize
    large, small = backward_allocations(inputs, grad_out)
    assert large == [one_map] * case.branches
    assert small < one_map


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_an_expanded_grad_out_costs_one_copy_at_most(layout):
    case = BY_NAME["stage1"]
    inputs = make_inputs(case, layout=layout).leaves()
    one_map = case.batch * case.channels * case.pixels * 4
    large, _ = backward_allocations(inputs, torch.ones(()).expand(case.out_shape))
    assert sum(large) <= 2 * case.branches * one_map


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_frozen_features_cost_no_memory(layout):
    case = BY_NAME["stage1"]
    inputs = make_inputs(case, layout=layout).leaves()
    for f in inputs.feats[1:]:
        f.requires_grad_(False)
    grad_out, _ = make_cotangents(case, torch.float32, layout.out_format)
    assert len(backward_allocations(inputs, grad_out)[0]) == 1
    inputs.feats[0].requires_grad_(False)
    assert backward_allocations(inputs, grad_out)[0] == []


def test_nothing_of_the_features_size_is_saved_for_backward():
    """Only the inputs, pooled and attention are saved."""
    case = BY_NAME["stage1"]
    inputs = make_inputs(case).leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        psa_attention(*inputs.args)
    given = {t.data_ptr() for t in inputs.tensors()}
    own = [t for t in saved if t.data_ptr() not in given]
    assert [tuple(t.shape) for t in own] == [case.attention_shape] * 2
    assert all(t.dtype == accumulation_type(torch.float32) for t in own)
