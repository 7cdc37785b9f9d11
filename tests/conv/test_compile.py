"""spc_conv without data or ahead of time: opcheck, fake tensors, torch.compile, autocast and FLOP
counts."""

import pytest
import torch
from support.cases import DTYPES, FORMATS, name_of
from support.compiling import (
    _no_caches,  # noqa: F401  (the fixture)
    assert_fakes_look_real,
    assert_one_graph_serves_every_size,
)
from support.convolutions import (
    BACKWARD,
    BY_NAME,
    CONTIGUOUS,
    LAYOUTS,
    OP,
    PLAIN_LAYOUTS,
    WEIGHT_LAYOUTS,
    Branch,
    Call,
    make_inputs,
    run,
    same,
    spc,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from epsa_fused import FusedPSAModule

# a branch of each method, and one of PyTorch's library
MIXED = Call("mixed", 2, 16, 32, 6, 7, (same(3, 1), same(5, 4), same(3, 16), same(1, 2)))
STRIDE_2 = Call("stride_2", 3, 12, 20, 7, 9, (same(3, 4), Branch((1, 1), 1, 0)), 2)
STRIDE_3 = Call("stride_3", 2, 8, 8, 7, 9, (same(3, 4), same(5, 1)), 3)
CALLS = (MIXED, STRIDE_2, STRIDE_3)


# ---- torch.library.opcheck: schema, autograd registration, fake kernels, AOT dispatch ----


@pytest.mark.parametrize("requires_grad", (False, True), ids=("no_grad", "grad"))
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_opcheck_forward(call, layout, requires_grad):
    inputs = make_inputs(call, layout=layout)
    inputs = inputs.leaves() if requires_grad else inputs
    torch.library.opcheck(OP, (inputs.x, inputs.weights, *call.settings))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", ("empty_batch", "one_pixel", "one_channel", "branches_8"))
def test_opcheck_forward_of_shapes_on_the_edge(name, dtype):
    call = BY_NAME[name]
    inputs = make_inputs(call, dtype)
    torch.library.opcheck(OP, (inputs.x, inputs.weights, *call.settings))


MASKS = {"all": [True] * 5, "x": [True] + [False] * 4, "weights": [False] + [True] * 4}
MASKS |= {"some": [True, False, True, False, True], "none": [False] * 5}


@pytest.mark.parametrize("requires_grad", (False, True), ids=("no_grad", "grad"))
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("mask", MASKS)
def test_opcheck_backward(mask, layout, requires_grad):
    inputs = make_inputs(MIXED, layout=layout)
    if requires_grad:
        if any(MASKS[mask]) and torch.__version__ < "2.13":
            pytest.skip("torch before 2.13 differentiates no convolution_backward symbolically")
        inputs = inputs.map(lambda t: t.requires_grad_())
    arguments = (inputs.grads, inputs.x, inputs.weights, *MIXED.settings, MASKS[mask])
    torch.library.opcheck(BACKWARD, arguments)


# ---- shapes without data ----


def assert_fake_outputs_look_real(call, inputs, mask):
    assert_fakes_look_real(lambda change: run(call, inputs.map(change), mask).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_fake_and_meta_tensors_look_like_real_ones(layout, dtype):
    names = ("one_pixel", "one_channel", "one_channel_in", "one_channel_out", "one_pixel_out")
    names += ("row", "column", "column_out", "empty_batch", "stride_3")
    for call in (MIXED, STRIDE_2, *(BY_NAME[name] for name in names)):
        mask = [True, False, *[True] * (len(call.branches) - 1)]
        assert_fake_outputs_look_real(call, make_inputs(call, dtype, layout), mask)


@pytest.mark.parametrize("weight_layout", WEIGHT_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_fake_and_meta_weights_look_like_real_ones(call, weight_layout):
    inputs = make_inputs(call, torch.float32, CONTIGUOUS, weight_layout)
    assert_fake_outputs_look_real(call, inputs, [True] * (1 + len(call.branches)))


# ---- torch.compile ----


def gradients_of(function, call, inputs):
    feats, pooled = function(call, inputs.x, inputs.weights)
    return [*feats, pooled, *torch.autograd.grad(feats, inputs.tensors(), inputs.grads)]


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_one_dynamic_graph_serves_every_size(call):
    weights = make_inputs(call).weights

    def maps_and_means(x):
        feats, pooled = spc(call, x, weights)
        return *feats, pooled

    assert_one_graph_serves_every_size(maps_and_means, call.in_channels)


# ---- autocast: as conv2d's ----


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)
@pytest.mark.parametrize("given", (torch.float32, torch.bfloat16, torch.float64), ids=name_of)
def test_autocast_casts_what_conv2d_casts(given, dtype):
    inputs = make_inputs(MIXED, given).leaves()
    b = MIXED.branches[0]
    with torch.autocast("cpu", dtype=dtype):
        expected = torch.conv2d(inputs.x, inputs.weights[0], None, 1, b.padding, 1, b.groups)
        feats, pooled = spc(MIXED, inputs.x, inputs.weights)
    assert {f.dtype for f in feats} == {expected.dtype}
    cast = inputs.map(lambda t: t.detach().to(expected.dtype))
    same_feats, same_pooled = spc(MIXED, cast.x, cast.weights)
    assert all(map(torch.equal, [*feats, pooled], [*same_feats, same_pooled]))
    grads = torch.autograd.grad(feats, inputs.tensors(), cast.grads)
    assert {g.dtype for g in grads} == {given}
    results = list(run(MIXED, cast, [True] * 5).values())[-5:]
    assert all(torch.equal(a, b.to(given)) for a, b in zip(grads, results, strict=True))


def test_autocast_casts_mixed_inputs_to_one_dtype():
    inputs = make_inputs(MIXED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        feats, _ = spc(MIXED, inputs.x.bfloat16(), inputs.weights)
    with pytest.raises(TypeError, match="weights"):
        spc(MIXED, inputs.x.bfloat16(), inputs.weights)
    assert feats[0].dtype == torch.bfloat16


def test_autocast_switched_off_inside():
    inputs = make_inputs(MIXED)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        feats, _ = spc(MIXED, inputs.x, inputs.weights)
    assert feats[0].dtype == torch.float32


def test_a_training_step_under_autocast():
    """The weights' casts are cached for the region; their gradients are float32."""
    module = FusedPSAModule(16, 64, conv_groups=(1, 2, 4, 8))
    x = torch.randn(2, 16, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = module(x), module(x)
    assert torch.equal(first, second) and first.dtype == torch.bfloat16
    (first.float().sum() + second.float().sum()).backward()
    for conv in (m for m in module.modules() if isinstance(m, nn.Conv2d)):
        assert conv.weight.grad.dtype == torch.float32 and conv.weight.grad.abs().max() > 0


# ---- floating-point operations ----


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_flop_count(call, memory_format):
    """Two per multiply-add, as PyTorch counts. Each gradient costs as much as the forward."""
    inputs = make_inputs(call).leaves()
    x = inputs.x.contiguous(memory_format=memory_format)
    with FlopCounterMode(display=False) as counter:
        feats, _ = spc(call, x, inputs.weights)
    n, c, h, w = call.map_shape
    branches = [
        2 * n * c * h * w * shape[1:].numel() for shape in map(torch.Size, call.weight_shapes)
    ]
    assert counter.get_total_flops() == sum(branches)
    with FlopCounterMode(display=False) as counter:
        for b, weight in zip(call.branches, inputs.weights, strict=True):
            torch.conv2d(x, weight, None, call.stride, b.padding, b.dilation, b.groups)
    assert counter.get_total_flops() == sum(branches)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(feats, inputs.tensors(), inputs.grads)
    assert counter.get_total_flops() == 2 * sum(branches)
    mask = [False, True] + [False] * (len(branches) - 1)
    with FlopCounterMode(display=False) as counter:
        run(call, inputs.map(torch.Tensor.detach), mask)
    assert counter.get_total_flops() == sum(branches) + branches[0]
