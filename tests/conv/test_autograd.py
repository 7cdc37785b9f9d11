"""spc_conv under autograd and in modules: derivatives of any order, what is not supported, and
which convolutions FusedPSAModule hands to it."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support.cases import FORMATS, name_of
from support.convolutions import (
    BACKWARD,
    CHANNELS_LAST,
    CONTIGUOUS,
    PLAIN_LAYOUTS,
    Branch,
    Call,
    exact_results,
    make_inputs,
    run,
    same,
    spc,
)
from support.gradients import CHECK
from support.tolerance import assert_near, assert_no_worse
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from epsa_fused import FusedPSAModule, PSAModule

TINY = Call("tiny", 2, 4, 4, 3, 4, (same(3, 1), same(1, 2), same(5, 4)))
STRIDED = Call("strided", 2, 4, 4, 4, 3, (same(3, 2), Branch((3, 3), 4, 2, 2)), 2)


def feats_of(call: Call):
    """The feature maps as a function of x and the weights."""
    return lambda x, *weights: tuple(spc(call, x, weights)[0])


# ---- derivatives ----


@pytest.mark.parametrize("check", (torch.autograd.gradcheck, torch.autograd.gradgradcheck))
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("call", (TINY, STRIDED), ids=name_of)
def test_derivatives(call, layout, check):
    tensors = make_inputs(call, torch.float64, layout, layout).leaves().tensors()
    assert check(feats_of(call), tensors, **CHECK)


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
def test_autograd_gives_what_the_backward_op_gives(dtype, layout):
    """Every subset of the inputs requires its gradients once."""
    inputs = make_inputs(TINY, dtype, layout)
    for bits in range(1, 16):
        mask = [bool(bits >> i & 1) for i in range(4)]
        expected = list(run(TINY, inputs, mask).values())[-4:]
        tensors = [
            t.detach().requires_grad_(m) for t, m in zip(inputs.tensors(), mask, strict=True)
        ]
        wanted = [t for t in tensors if t.requires_grad]
        feats, pooled = spc(TINY, tensors[0], tensors[1:])
        assert all(f.requires_grad for f in feats) and not pooled.requires_grad
        actual = torch.autograd.grad(feats, wanted, inputs.grads, allow_unused=True)
        for t, grad in zip(wanted, actual, strict=True):
            position = next(i for i, u in enumerate(tensors) if u is t)
            assert torch.equal(grad, expected[position])
            assert grad.stride() == expected[position].stride()


def test_a_loss_of_one_map_alone():
    inputs = make_inputs(TINY, torch.float64).leaves()
    feats, _ = spc(TINY, inputs.x, inputs.weights)
    actual = torch.autograd.grad(feats[1], inputs.tensors(), inputs.grads[1])
    zeros = [torch.zeros_like(g) for g in inputs.grads]
    zeros[1] = inputs.grads[1]
    exact = exact_results(TINY, type(inputs)(inputs.x, inputs.weights, zeros))
    assert_near(actual[0], exact["grad of x"])
    assert not actual[1].any() and not actual[3].any() and actual[2].any()


def test_a_map_may_be_changed_in_place():
    """No map is needed for backward: a ReLU behind it may be in place."""
    inputs = make_inputs(TINY, torch.float64).leaves()
    results = []
    for relu in (torch.relu, torch.relu_):
        feats, _ = spc(TINY, inputs.x, inputs.weights)
        loss = sum(relu(f).square().sum() for f in feats)
        results.append(torch.autograd.grad(loss, inputs.tensors()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("which", ("grad_feats", "x", "weights"))
def test_forward_mode_of_the_backward_op_raises(which):
    inputs = make_inputs(TINY, torch.float64)
    with forward_ad.dual_level():

        def dual(t):
            return forward_ad.make_dual(t, torch.ones_like(t))

        x = dual(inputs.x) if which == "x" else inputs.x
        weights, grads = list(inputs.weights), list(inputs.grads)
        if which == "weights":
            weights[1] = dual(weights[1])
        if which == "grad_feats":
            grads[1] = dual(grads[1])
        with pytest.raises(RuntimeError, match=r"spc_conv_backward: forward-mode"):
            BACKWARD(grads, x, weights, *TINY.settings, [True] * 4)


# ---- FusedPSAModule: the operator for plain convolutions, the layers for all others ----


class Operators(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def uses_the_operator(module: FusedPSAModule, x: torch.Tensor) -> bool:
    with Operators() as seen, torch.no_grad():
        module(x)
    used = "epsa_fused::psa_forward" in seen.names
    layers = sum("conv" in n for n in seen.names)
    assert layers == (0 if used else 4), seen.names
    return used


TERMS = 16 * 9 * 9  # products in the longest sum of these modules


def modules(**options) -> tuple[FusedPSAModule, PSAModule]:
    """A fused module and the reference of the same values, in float64."""
    fused = FusedPSAModule(16, 64, conv_groups=(1, 2, 4, 8), **options).double()
    plain = PSAModule(16, 64, conv_groups=(1, 2, 4, 8), **options).double()
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def assert_same(fused: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    """Outputs and all gradients."""
    results = []
    for module in (fused, plain):
        leaf = x.detach().requires_grad_()
        out = module(leaf)
        out.sin().sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in module.parameters())])
        module.zero_grad()
    for a, b in zip(*results, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("stride", (1, 2, 3))
def test_plain_convolutions_use_the_operator(stride, memory_format):
    fused, plain = modules(stride=stride)
    x = torch.randn(3, 16, 9, 8, dtype=torch.float64).contiguous(memory_format=memory_format)
    assert uses_the_operator(fused, x)
    assert_same(fused, plain, x)
    single, x = fused.float(), x.float()
    assert uses_the_operator(single, x)
    expected = plain(x.double())
    assert_no_worse(single(x), plain.float()(x), expected, terms=TERMS)


@pytest.mark.parametrize("frozen", (False, True))
def test_dilated_convolutions_use_the_operator(frozen):
    fused, plain = modules()
    for module in (fused, plain):
        module.conv_2.dilation, module.conv_2.padding = (2, 2), (4, 4)
        module.conv_2.weight.requires_grad_(not frozen)
    x = torch.randn(2, 16, 9, 8, dtype=torch.float64)
    assert uses_the_operator(fused, x)
    out, expected = fused(x), plain(x)
    assert_near(out, expected)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def replace(module, layer):
    module.conv_3 = layer


def subclassed(module):
    layer = Doubled(16, 16, 7, padding=3, groups=4, bias=False).double()
    layer.load_state_dict(module.conv_3.state_dict())
    module.conv_3 = layer


def patched(module):
    forward = module.conv_3.forward
    module.conv_3.forward = lambda x: 2 * forward(x)


def set_on_conv_3(**values):
    def change(module):
        for name, value in values.items():
            setattr(module.conv_3, name, value)

    return change


CHANGES = {
    "subclass": subclassed,
    "wrapper": lambda m: replace(m, Wrapped(m.conv_3)),
    "patched": patched,
    "reflect": lambda m: replace(m, reflecting(m.conv_3)),
    "same": set_on_conv_3(padding="same"),
    "padding_of_two_sizes": lambda m: replace(m, flat(m.conv_3)),
    "forward_hook": lambda m: m.conv_3.register_forward_hook(lambda m, x, y: 2 * y),
    "forward_pre_hook": lambda m: m.conv_3.register_forward_pre_hook(lambda m, x: (2 * x[0],)),
}


def reflecting(base):
    layer = nn.Conv2d(16, 16, 7, padding=3, groups=4, bias=False, padding_mode="reflect").double()
    layer.load_state_dict(base.state_dict())
    return layer


def flat(base):
    layer = nn.Conv2d(16, 16, (7, 3), padding=(3, 1), groups=4, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(base.weight[..., 2:5])
    return layer


@pytest.mark.parametrize("change", CHANGES)
def test_other_convolutions_are_called(change):
    """The module still computes what the reference computes with the same change."""
    fused, plain = modules()
    x = torch.randn(2, 16, 9, 8, dtype=torch.float64)
    before = fused(x)
    for module in (fused, plain):
        CHANGES[change](module)
    assert not uses_the_operator(fused, x)
    assert_same(fused, plain, x)
    if change != "same":
        assert not torch.allclose(fused(x), before)


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", ("conv_1", "conv_2", "conv_3", "conv_4"))
def test_hooks_of_convolutions_are_called(layer, hook):
    fused, _ = modules()
    x = torch.randn(2, 16, 9, 8, dtype=torch.float64, requires_grad=True)
    expected = fused(x)
    calls = []
    register = getattr(fused.get_submodule(layer), f"register_{hook}")
    handle = register(lambda *args: calls.append(args))
    assert not uses_the_operator(fused, x)
    calls.clear()
    out = fused(x)
    out.sum().backward()
    assert len(calls) == 1
    assert_near(out, expected)
    handle.remove()
    assert uses_the_operator(fused, x)


@pytest.mark.parametrize(
    "parametrization", (parametrizations.weight_norm, parametrizations.spectral_norm)
)
def test_parametrized_convolutions(parametrization):
    """The weight is computed when it is read."""
    fused, plain = modules()
    fused.eval(), plain.eval()
    for module in (fused, plain):
        torch.manual_seed(1)
        parametrization(module.conv_3)
    with torch.no_grad():
        for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
            a.add_(0.01)
            b.copy_(a)
    x = torch.randn(2, 16, 9, 8, dtype=torch.float64)
    assert_same(fused, plain, x)


def test_old_weight_norm():
    """Its hook computes the weight."""
    fused, plain = modules()
    for module in (fused, plain):
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(module.conv_3)
        with torch.no_grad():
            module.conv_3.weight_g.mul_(3)
    x = torch.randn(2, 16, 9, 8, dtype=torch.float64)
    assert not uses_the_operator(fused, x)
    assert_same(fused, plain, x)


@pytest.mark.parametrize("change", ("data", "no_grad", "new_parameter", "load_state_dict"))
def test_changed_weights_are_seen(change):
    """No packed weight outlives its call."""
    fused, plain = modules()
    x = torch.randn(2, 16, 9, 8, dtype=torch.float64)
    fused(x)
    other = copy.deepcopy(fused.conv_3.weight) * 3
    if change == "data":
        fused.conv_3.weight.data.copy_(other)
    elif change == "no_grad":
        with torch.no_grad():
            fused.conv_3.weight.copy_(other)
    elif change == "new_parameter":
        fused.conv_3.weight = nn.Parameter(other.detach())
    else:
        fused.load_state_dict(fused.state_dict() | {"conv_3.weight": other})
    plain.load_state_dict(fused.state_dict())
    assert uses_the_operator(fused, x)
    assert_same(fused, plain, x)


def test_the_layouts_are_not_mixed_up():
    """The gradient has another layout than x and the maps."""
    for layout, other in ((CONTIGUOUS, CHANNELS_LAST), (CHANNELS_LAST, CONTIGUOUS)):
        inputs = make_inputs(TINY, torch.float64, layout, grad_layout=other).leaves()
        feats, _ = spc(TINY, inputs.x, inputs.weights)
        actual = torch.autograd.grad(feats, inputs.tensors(), inputs.grads)
        exact = exact_results(TINY, inputs)
        for grad, expected in zip(actual, list(exact.values())[-4:], strict=True):
            assert_near(grad, expected)
