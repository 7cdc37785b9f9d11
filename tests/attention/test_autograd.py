"""Autograd: derivatives of any order, the rules of saved tensors, and what is not supported."""

import pytest
import torch
from support.cases import (
    BY_NAME,
    CHANNELS_LAST,
    CONTIGUOUS,
    ORDERS,
    PLAIN_LAYOUTS,
    QUICK,
    WEIGHT_KINDS,
    Case,
    Inputs,
    make_inputs,
    name_of,
)
from support.gradients import CHECK
from support.tolerance import assert_close, make_cotangents, run

from epsa_fused import FusedPSAModule, psa_attention, psa_attention_reference

pytestmark = pytest.mark.emulated

TINY = Case("tiny", 2, 2, 3, 2, 3, 2)


def tiny_inputs(layout=CONTIGUOUS, kind=WEIGHT_KINDS[0], device="cpu") -> Inputs:
    return make_inputs(TINY, torch.float64, layout, kind, device=device).leaves()


def call(inputs: Inputs, function=psa_attention, **options):
    """A function of the given tensors alone, for gradcheck."""

    def of_tensors(*tensors):
        rest = iter(tensors[len(inputs.feats) :])
        weights = [None if w is None else next(rest) for w in inputs.weights]
        return function(tensors[: len(inputs.feats)], *weights, **options)

    return of_tensors


# ---- derivatives against numeric ones ----


@QUICK
@pytest.mark.parametrize("return_attention", (False, True), ids=("out", "out_and_attention"))
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_gradcheck(layout, order, return_attention, device):
    inputs = tiny_inputs(layout, device=device)
    function = call(inputs, branch_order=order, return_attention=return_attention)
    assert torch.autograd.gradcheck(function, inputs.tensors(), **CHECK)


@pytest.mark.parametrize("kind", WEIGHT_KINDS, ids=name_of)
def test_gradcheck_of_every_kind_of_weights(kind, device):
    inputs = tiny_inputs(kind=kind, device=device)
    function = call(inputs, return_attention=True)
    assert torch.autograd.gradcheck(function, inputs.tensors(), **CHECK)


@pytest.mark.parametrize("return_attention", (False, True), ids=("out", "out_and_attention"))
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_gradgradcheck(layout, order, return_attention, device):
    inputs = tiny_inputs(layout, device=device)
    function = call(inputs, branch_order=order, return_attention=return_attention)
    assert torch.autograd.gradgradcheck(function, inputs.tensors(), **CHECK)


@pytest.mark.parametrize("kind", WEIGHT_KINDS, ids=name_of)
def test_gradgradcheck_of_every_kind_of_weights(kind, device):
    inputs = tiny_inputs(kind=kind, device=device)
    function = call(inputs, return_attention=True)
    assert torch.autograd.gradgradcheck(function, inputs.tensors(), **CHECK)


# ---- higher derivatives against the reference's ----


def nested_gradients(function, inputs: Inputs, depth: int) -> list[torch.Tensor]:
    """The gradient of the sum of squares of the gradient of ... of a loss, `depth` times."""
    out, attention = function(*inputs.args, return_attention=True)
    value = out.sin().sum() + attention.square().sum()
    for _ in range(depth):
        grads = torch.autograd.grad(value, inputs.tensors(), create_graph=True)
        value = sum(g.square().sum() for g in grads)
    return [g.detach() for g in grads]


@pytest.mark.parametrize("depth", (1, 2, 3))
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_higher_derivatives_are_those_of_the_reference(layout, depth):
    inputs = tiny_inputs(layout)
    fused = nested_gradients(psa_attention, inputs, depth)
    expected = nested_gradients(psa_attention_reference, inputs, depth)
    for name, a, b in zip(inputs.names(), fused, expected, strict=True):
        # each order multiplies the number of terms
        size = torch.full_like(b, 10.0**depth * max(1.0, b.abs().max().item()))
        assert_close(a, b, torch.float64, magnitude=size, name=name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
def test_second_derivatives_of_other_dtypes(dtype):
    """A gradient penalty, in the dtype that training runs in, with float32 weights."""
    inputs = make_inputs(TINY, dtype, weight_dtype=torch.float32).leaves()
    exact = inputs.double().leaves()

    def penalty_gradients(function, x: Inputs):
        (grad,) = torch.autograd.grad(function(*x.args).sum(), x.feats[0], create_graph=True)
        return torch.autograd.grad(grad.float().square().sum(), x.weights)

    fused = penalty_gradients(psa_attention, inputs)
    expected = penalty_gradients(psa_attention_reference, exact)
    for a, b in zip(fused, expected, strict=True):
        # the first gradient is rounded to the features' dtype on its way
        assert a.dtype == torch.float32
        assert (a.double() - b).abs().max() <= 4 * torch.finfo(dtype).eps * b.abs().max()


def test_a_frozen_input_takes_part_in_second_derivatives():
    """The features' gradient, differentiated by the weights."""
    inputs = tiny_inputs()
    for w in inputs.weights[1:]:
        w.requires_grad_(False)

    def second(function):
        (first,) = torch.autograd.grad(
            function(*inputs.args).sin().sum(), inputs.feats[0], create_graph=True
        )
        return torch.autograd.grad(first.square().sum(), inputs.weights[0])[0]

    assert_close(second(psa_attention), second(psa_attention_reference), torch.float64)


# ---- autograd's rules ----


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_one_tensor_as_several_branches(layout):
    """Its gradient is the sum of the branches'."""
    inputs = make_inputs(BY_NAME["odd"], torch.float64, layout)
    grad_out, _ = make_cotangents(BY_NAME["odd"], torch.float64)
    shared = Inputs([inputs.feats[0]] * 3, inputs.weights)
    apart = run(psa_attention, Inputs([f.clone() for f in shared.feats], inputs.weights), grad_out)
    leaf = inputs.feats[0].requires_grad_()
    (grad,) = torch.autograd.grad(psa_attention(*shared.args), leaf, grad_out)
    expected = sum(apart[f"grad of feats[{s}]"] for s in range(3))
    assert_close(grad, expected, torch.float64)

    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = [w.detach() for w in tiny_inputs().weights]
    function = lambda x: psa_attention([x, x], *weights)  # noqa: E731
    assert torch.autograd.gradcheck(function, x, **CHECK)
    assert torch.autograd.gradgradcheck(function, x, **CHECK)


def test_one_tensor_as_weight_of_both_layers():
    """With C = r the two matrices may be the same parameter."""
    inputs = make_inputs(Case("square", 2, 2, 3, 2, 2, 3), torch.float64)
    w = inputs.weights[0].requires_grad_()
    function = lambda w: psa_attention(inputs.feats, w, None, w, None)  # noqa: E731
    assert torch.autograd.gradcheck(function, w, **CHECK)
    assert torch.autograd.gradgradcheck(function, w, **CHECK)


def test_the_attention_changed_before_backward_is_an_error():
    inputs = make_inputs(BY_NAME["odd"]).leaves()
    out, attention = psa_attention(*inputs.args, return_attention=True)
    attention.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_in_place_relu_right_behind_the_module():
    """The published network's blocks do that, so `out` must not be needed for backward."""
    module = FusedPSAModule(16, 64, conv_groups=(1, 2, 4, 8)).double()
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.relu(module(x)).square().sum(), x)
    (grad,) = torch.autograd.grad(torch.relu_(module(x)).square().sum(), x)
    assert torch.equal(grad, expected)


def test_unused_gradients_are_none_not_zero_tensors():
    inputs = make_inputs(BY_NAME["odd"]).leaves()
    out, attention = psa_attention(*inputs.args, return_attention=True)
    # a loss that uses neither result
    loss = (out.detach().sum() + inputs.feats[0].sum()) + attention.detach().sum()
    grads = torch.autograd.grad(loss, inputs.tensors(), allow_unused=True)
    assert [g is None for g in grads] == [False] + [True] * (len(grads) - 1)


def test_gradient_hooks_and_accumulation():
    inputs = make_inputs(BY_NAME["odd"]).leaves()
    seen = []
    inputs.feats[0].register_hook(lambda g: seen.append(g.shape))
    for _ in range(2):
        psa_attention(*inputs.args).sum().backward()
    once = run(psa_attention, inputs, torch.ones(BY_NAME["odd"].out_shape))
    assert seen == [inputs.feats[0].shape] * 2
    assert torch.equal(inputs.weights[0].grad, 2 * once["grad of fc1_weight"])


def test_channels_last_gradients_of_gradients_keep_their_layout():
    inputs = make_inputs(BY_NAME["stage3"], layout=CHANNELS_LAST).leaves()
    (grad,) = torch.autograd.grad(
        psa_attention(*inputs.args).sum(), inputs.feats[0], create_graph=True
    )
    assert grad.is_contiguous(memory_format=torch.channels_last)
    grad.square().sum().backward()
    assert inputs.weights[0].grad.abs().max() > 0
