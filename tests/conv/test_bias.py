"""Biases of the convolutions: of spc_conv, of psa_forward and of the module."""

import copy
import re

import pytest
import torch
from support.cases import DTYPES, FORMATS, name_of
from support.convolutions import (
    BY_NAME,
    OP,
    PLAIN_LAYOUTS,
    Call,
    make_inputs,
    run,
    same,
    spc,
)
from support.gradients import CHECK
from support.tolerance import assert_close, assert_near, assert_no_worse
from torch import nn

import epsa_fused
from epsa_fused import FusedPSAModule, PSAModule, psa_attention_reference

NAMES = ("stage_64x14_batch7", "branches_8", "stride_2_odd", "dilated", "one_pixel", "row")
NAMES += ("winograd", "even", "stride_3", "one_channel_out", "empty_batch", "branches_1")
CALLS = [BY_NAME[name] for name in NAMES]
PSA_FORWARD = torch.ops.epsa_fused.psa_forward.default


def bias_of(call: Call, dtype: torch.dtype) -> torch.Tensor:
    """Between the elements of other memory: the operator takes any strides."""
    count = len(call.branches) * call.channels
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    return (4 * values).to(dtype)[:, 0]


@pytest.mark.per_isa
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_each_channel_gets_its_own(call, dtype, layout):
    """The maps are rounded once, and the means are those of maps with a bias."""
    inputs, bias = make_inputs(call, dtype, layout), bias_of(call, dtype)
    feats, pooled = spc(call, inputs.x, inputs.weights, bias)
    exact = inputs.map(torch.Tensor.double)
    maps, means = OP(exact.x, exact.weights, *call.settings)
    own = bias.double().chunk(len(call.branches))
    plain, _ = OP(inputs.x, inputs.weights, *call.settings)
    for s, (f, b) in enumerate(zip(feats, own, strict=True)):
        assert f.dtype == dtype and f.stride() == plain[s].stride()
        expected = maps[s] + b[:, None, None]
        eager = (plain[s].to(pooled.dtype) + b[:, None, None].to(pooled.dtype)).to(dtype)
        terms = inputs.weights[s][0].numel()
        assert_no_worse(f, eager, expected, terms=terms)
        size = maps[s].abs().mean((2, 3)) + b.abs()
        assert_close(pooled[:, s], means[:, s] + b, pooled.dtype, magnitude=terms**0.5 * size)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
def test_a_bias_of_minus_zero_changes_no_bit(dtype):
    for call in CALLS[:4]:
        inputs = make_inputs(call, dtype)
        inputs.weights[0].zero_()  # sums of both zeros
        zeros = -torch.zeros(len(call.branches) * call.channels, dtype=dtype)
        expected = OP(inputs.x, inputs.weights, *call.settings)[0]
        actual = spc(call, inputs.x, inputs.weights, zeros)[0]
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_special_values_stay_in_their_channel(value):
    call = CALLS[0]
    inputs, bias = make_inputs(call), bias_of(call, torch.float32)
    bias[call.channels + 3] = value
    feats, pooled = spc(call, inputs.x, inputs.weights, bias)
    special = torch.full((), value)
    assert torch.equal(feats[1][:, 3].isnan(), special.isnan().expand_as(feats[1][:, 3]))
    assert not feats[1][:, 3].isfinite().any() and not pooled[:, 1, 3].isfinite().any()
    feats[1][:, 3] = 0
    assert all(f.isfinite().all() for f in feats)


TINY = Call("tiny", 2, 4, 4, 3, 4, (same(3, 1), same(1, 2), same(5, 4)))


@pytest.mark.parametrize("wanted", ("bias", "bias and x", "all"))
@pytest.mark.parametrize("check", (torch.autograd.gradcheck, torch.autograd.gradgradcheck))
def test_derivatives(check, wanted):
    inputs, bias = make_inputs(TINY, torch.float64), bias_of(TINY, torch.float64)
    tensors = [inputs.x, *inputs.weights, bias]
    chosen = {"bias": [bias], "bias and x": [inputs.x, bias], "all": tensors}[wanted]
    for t in chosen:
        t.requires_grad_()
    function = lambda x, *rest: tuple(spc(TINY, x, rest[:-1], rest[-1])[0])  # noqa: E731
    assert check(function, tensors, **CHECK)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
def test_the_other_gradients_are_those_without(dtype):
    inputs, bias = make_inputs(TINY, dtype), bias_of(TINY, dtype).clone().requires_grad_()
    leaves = inputs.leaves()
    feats, _ = spc(TINY, leaves.x, leaves.weights, bias)
    grads = torch.autograd.grad(feats, [*leaves.tensors(), bias], inputs.grads)
    expected = list(run(TINY, inputs, [True] * 4).values())[-4:]
    assert all(map(torch.equal, grads[:-1], expected))
    assert torch.equal(grads[-1], torch.cat([g.sum((0, 2, 3)) for g in inputs.grads]))


def test_a_frozen_bias_has_no_gradient():
    leaves, bias = make_inputs(TINY).leaves(), bias_of(TINY, torch.float32)
    feats, _ = spc(TINY, leaves.x, leaves.weights, bias)
    sum(f.sum() for f in feats).backward()
    assert bias.grad is None and leaves.x.grad.abs().max() > 0


def test_opcheck():
    inputs, bias = make_inputs(TINY), bias_of(TINY, torch.float32).requires_grad_()
    for given in (inputs, inputs.leaves()):
        torch.library.opcheck(OP, (given.x, given.weights, *TINY.settings, True, bias))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)
def test_autocast_casts_it_as_conv2d_does(dtype):
    inputs, bias = make_inputs(TINY), bias_of(TINY, torch.float32).clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        feats, _ = spc(TINY, inputs.x, inputs.weights, bias)
    cast = inputs.map(lambda t: t.to(dtype))
    expected, _ = spc(TINY, cast.x, cast.weights, bias.to(dtype))
    assert all(map(torch.equal, feats, expected))
    sum(f.float().sum() for f in feats).backward()
    assert bias.grad.dtype == torch.float32


# ---- the module ----


def modules(which: str = "all") -> tuple[FusedPSAModule, PSAModule]:
    """A fused module and the reference of the same layers, in float64."""
    torch.manual_seed(0)
    plain = PSAModule(16, 64, conv_groups=(1, 2, 4, 8))
    for i in (1, 2, 3, 4) if which == "all" else (2,):
        conv = getattr(plain, f"conv_{i}")
        options = {"padding": conv.padding, "groups": conv.groups}
        setattr(plain, f"conv_{i}", nn.Conv2d(16, 16, conv.kernel_size, **options))
    fused = FusedPSAModule(16, 64, conv_groups=(1, 2, 4, 8))
    for name, child in plain.named_children():
        setattr(fused, name, copy.deepcopy(child))
    return fused.double(), plain.double()


@pytest.mark.parametrize("which", ("all", "one"))
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("grad", (False, True), ids=("no_grad", "grad"))
def test_a_module_is_the_reference(grad, memory_format, which):
    """In one operator; a branch without a bias counts as one of zeros."""
    fused, plain = modules(which)
    x = torch.randn(3, 16, 9, 8, dtype=torch.float64).contiguous(memory_format=memory_format)
    results = []
    for module in (fused, plain):
        leaf = x.detach().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            out = module(leaf)
        grads = torch.autograd.grad(out.sin().sum(), [leaf, *module.parameters()]) if grad else ()
        results.append([out, *grads])
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected)
    single = fused.float()
    with torch.profiler.profile() as profile, torch.set_grad_enabled(grad):
        out, attention = single(x.float()), single(x.float(), return_attention=True)[1]
    called = {event.key for event in profile.key_averages()}
    assert "epsa_fused::psa_forward" in called and "aten::conv2d" not in called
    assert_no_worse(out, plain.float()(x.float()), results[1][0].detach(), terms=16 * 81)
    assert_near(attention, plain.double()(x, return_attention=True)[1], limit=1e-5)


@pytest.mark.parametrize("frozen", (False, True))
def test_a_packed_module_sees_a_new_bias(frozen):
    """The packs hold weights alone."""
    fused, _ = modules()
    fused, x = fused.float().eval(), torch.randn(2, 16, 9, 8)
    fused.prepack(9, 8, frozen=frozen)
    with torch.no_grad():
        before = fused(x)
        fused.conv_3.bias.data += 1
        after = fused(x)
        expected = fused.unpack()(x)
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_the_operator_with_an_epilogue():
    fused, plain = modules()
    fused, x = fused.float().eval(), torch.randn(2, 16, 9, 8)
    scale, shift = torch.randn(64), torch.randn(64)
    with torch.no_grad():
        convs = [getattr(fused, f"conv_{i}") for i in (1, 2, 3, 4)]
        arguments, bias = fused._arguments(x, convs)
        out = PSA_FORWARD(*arguments, None, True, scale, shift, True, bias)
        exact = plain.double()(x.double())
        expected = torch.relu(exact * scale.double()[:, None, None] + shift[:, None, None])
        eager = torch.relu(fused(x) * scale[:, None, None] + shift[:, None, None])
    assert_no_worse(out, eager, expected)


@pytest.mark.parametrize("given", ("bias alone", "all"))
def test_opcheck_of_the_module(given):
    fused, _ = modules()
    fused = fused.float().requires_grad_(given == "all")
    convs = [getattr(fused, f"conv_{i}") for i in (1, 2, 3, 4)]
    arguments, bias = fused._arguments(torch.randn(2, 16, 5, 6), convs)
    rest = (None, True, None, None, False, bias.detach().requires_grad_())
    torch.library.opcheck(PSA_FORWARD, (*arguments, *rest))


def test_compiled_and_exported(tmp_path):
    fused, _ = modules()
    fused, x = fused.float().eval(), torch.randn(2, 16, 9, 8)
    with torch.no_grad():
        expected = fused(x)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        program = torch.export.export(fused, (x,))
        torch.export.save(program, tmp_path / "module.pt2")
        loaded = torch.export.load(tmp_path / "module.pt2").module()
        assert torch.equal(loaded(x), expected)
        decomposed = program.run_decompositions(torch._decomp.decomposition_table)
        assert not [n for n in decomposed.graph.nodes if "epsa" in str(n.target)]
        assert_near(decomposed.module()(x), psa_reference(fused, x), limit=1e-5)


def psa_reference(module: FusedPSAModule, x: torch.Tensor) -> torch.Tensor:
    exact = copy.deepcopy(module).double()
    feats = [getattr(exact, f"conv_{i}")(x.double()) for i in (1, 2, 3, 4)]
    fc1, fc2 = exact.se.fc1, exact.se.fc2
    return psa_attention_reference(feats, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


@pytest.mark.parametrize(
    ("change", "why"),
    (
        (lambda m: setattr(m.conv_1, "bias", nn.Parameter(torch.randn(15))),
            r"conv_1\.bias is torch\.float32 \[15\], expected torch\.float32 \[16\]"),
        (lambda m: setattr(m.conv_3, "bias", nn.Parameter(torch.randn(16).bfloat16())),
            r"conv_3\.bias is torch\.bfloat16 \[16\], expected torch\.float32 \[16\]"),
    ),
    ids=("length", "dtype"),
)  # fmt: skip
def test_biases_that_do_not_fit_go_to_the_layers(change, why):
    """Lengths that only add up would move every bias behind them."""
    fused = modules()[0].float()
    change(fused)
    fused.conv_2.bias = nn.Parameter(torch.randn(17 if "15" in why else 16))
    assert re.fullmatch(why, epsa_fused.why_not_fused(fused))
    with torch.no_grad(), pytest.raises(RuntimeError, match="bias"):
        fused(torch.randn(2, 16, 5, 6))


def test_the_weights_tell_the_channels():
    """Where only some branches have a bias, also after a change of the weights."""
    fused, plain = modules("one")
    for module in (fused, plain):
        module.conv_1.out_channels = 999
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    assert_near(fused(x), plain(x))
