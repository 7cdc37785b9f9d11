"""Layers whose call may mean something else than their weights: the fused modules call them.

Each change is made to the fused module and to the reference, and both must compute the same.
"""

import copy
import pickle
import warnings

import pytest
import torch
from support.lookalikes.parts import external_psa
from support.tolerance import assert_near
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from epsa_fused import FusedPSAModule, FusedSplitPSA, PSAModule, SplitPSA, why_not_fused

GROUPS = (1, 2, 4, 8)
CONVS = ("conv_1", "conv_2", "conv_3", "conv_4")
SE = ("se", "se.avg_pool", "se.fc1", "se.relu", "se.fc2", "se.sigmoid")
ROUNDING = 1e-12  # between two formulations in float64


def pair():
    """A fused module and the reference of the same values, in float64."""
    settings = {"conv_groups": GROUPS, "reduction": 4}
    fused, plain = FusedPSAModule(16, 64, **settings), PSAModule(16, 64, **settings)
    plain.load_state_dict(fused.state_dict())
    return fused.double(), plain.double()


def split_pair():
    """The same for the variant whose parts have an SE each."""
    theirs = external_psa(branches=3).double()
    ours = FusedSplitPSA(theirs.convs, theirs.se_blocks)
    return ours, copy.deepcopy(SplitPSA(theirs.convs, theirs.se_blocks))


def image(channels=16):
    x = torch.randn(2, channels, 6, 5, dtype=torch.float64)
    return x.requires_grad_()


def results(module, x):
    """The output, and the gradients of the image and of all parameters."""
    out = module(x)
    leaves = [x, *module.parameters()]
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


def assert_called(fused, plain, why, x=None):
    """Both compute the same; one warning and the repr give the reason."""
    x = image() if x is None else x
    kind = type(fused).__name__
    with pytest.warns(UserWarning, match=rf"^{kind} calls layers in place of .*: {why}") as caught:
        got = results(fused, x)
        fused(x)
    assert len(caught) == 1, [str(w.message) for w in caught]
    assert why_not_fused(fused) in repr(fused)
    for ours, theirs in zip(got, results(plain, x), strict=True):
        assert_near(ours, theirs, ROUNDING)


def assert_fused(fused, plain, x=None):
    """Nothing warns, and both compute the same."""
    x = image() if x is None else x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = results(fused, x)
    assert why_not_fused(fused) is None and "not fused" not in repr(fused)
    for ours, theirs in zip(got, results(plain, x), strict=True):
        assert_near(ours, theirs, ROUNDING)


# ---- hooks ----

HOOKS = {
    "forward_hook": lambda m, x, y: 2 * y,
    "forward_pre_hook": lambda m, x: (2 * x[0],),
    "full_backward_hook": lambda m, gx, gy: (2 * gx[0],),
    "full_backward_pre_hook": lambda m, gy: (2 * gy[0],),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", (*CONVS, *SE))
def test_a_hook_on_a_layer(layer, hook):
    """It changes values on their way, so a call that left it out would show."""
    fused, plain = pair()
    x = image()
    before = results(fused, x)
    handles = [getattr(m.get_submodule(layer), f"register_{hook}")(HOOKS[hook])
               for m in (fused, plain)]  # fmt: skip
    assert_called(fused, plain, f"{layer} has hooks", x)
    assert not all(map(torch.equal, before, results(fused, x)))
    for handle in handles:
        handle.remove()
    assert_fused(fused, plain, x)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_on_the_module_itself_leaves_it_fused(hook):
    fused, plain = pair()
    for m in (fused, plain):
        getattr(m, f"register_{hook}")(HOOKS[hook])
    assert_fused(fused, plain)


GLOBAL_HOOKS = {
    "forward_hook": module_hooks.register_module_forward_hook,
    "forward_hook_always": lambda f: module_hooks.register_module_forward_hook(f, always_call=True),
    "forward_pre_hook": module_hooks.register_module_forward_pre_hook,
    "full_backward_hook": module_hooks.register_module_full_backward_hook,
    "full_backward_pre_hook": module_hooks.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("hook", GLOBAL_HOOKS)
@pytest.mark.parametrize("make", (pair, split_pair), ids=("psa", "split"))
def test_a_hook_on_all_modules(make, hook):
    """It doubles what passes convolutions, and counts the calls of every module."""
    fused, plain = make()
    for m in (*fused.modules(), *plain.modules()):
        if isinstance(m, nn.ReLU):
            m.inplace = False
    x = image(16 if make is pair else 48)
    counts = {}

    def record(module, *args):
        kind = type(module).__name__
        counts[kind] = counts.get(kind, 0) + 1
        if isinstance(module, nn.Conv2d):
            return HOOKS[hook.removesuffix("_always")](module, *args)
        return None

    handle = GLOBAL_HOOKS[hook](record)
    try:
        assert_called(fused, plain, "hooks are registered for all modules", x)
        totals = []
        for m in (fused, plain):
            counts.clear()
            results(m, x)
            totals.append({kind: n for kind, n in counts.items() if kind != type(m).__name__})
    finally:
        handle.remove()
    assert totals[0] == totals[1] and totals[0]["Conv2d"] > 4 and totals[0]["Sigmoid"] > 2
    assert_fused(fused, plain, x)


@pytest.mark.parametrize("make", (pair, split_pair), ids=("psa", "split"))
def test_counting_operations_leaves_it_fused(make):
    """torch's counter has hooks on all modules, but knows the operators' formulas."""
    fused, plain = make()
    x = image(16 if make is pair else 48)
    totals = []
    for m in (fused, plain):
        with FlopCounterMode(display=False) as counter:
            m(x)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0
    with FlopCounterMode(display=False):
        assert why_not_fused(fused) is None
        with module_hooks.register_module_forward_hook(lambda *args: None):
            assert why_not_fused(fused) == "hooks are registered for all modules"


class Tracker(ModuleTracker):
    """May do more than note which module runs."""


def test_a_tracker_of_a_subclass_is_not_torchs():
    fused, _ = pair()
    with ModuleTracker():
        assert why_not_fused(fused) is None
    with Tracker():
        assert why_not_fused(fused) == "hooks are registered for all modules"


# ---- layers that were replaced, wrapped or patched ----


class Wrapper(nn.Module):
    """LoRA and quantisation wrap layers like this, with the weight in reach."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return 2 * self.base(x)


class DoublingConv2d(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class CallingConv2d(nn.Conv2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


class CallImplConv2d(nn.Conv2d):
    def _call_impl(self, x):
        return 2 * super()._call_impl(x)


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation, where Conv2d.forward calls it."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class RenamedConv2d(nn.Conv2d):
    """A subclass that computes what Conv2d does."""


def replace_by(make):
    def change(module, name):
        parent, _, child = name.rpartition(".")
        parent = module.get_submodule(parent)
        setattr(parent, child, make(getattr(parent, child)))

    return change


wrapped = replace_by(Wrapper)


def patched(module, name):
    layer = module.get_submodule(name)
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def patched_call(module, name):
    layer = module.get_submodule(name)
    call = layer._call_impl
    layer._call_impl = lambda x: 2 * call(x)


def patched_conv_forward(module, name):
    layer = module.get_submodule(name)
    conv = layer._conv_forward
    layer._conv_forward = lambda x, weight, bias: 2 * conv(x, weight, bias)


def of_class(kind):
    def change(module, name):
        module.get_submodule(name).__class__ = kind

    return change


CONVOLUTIONS = (*CONVS, "se.fc1", "se.fc2")
CHANGES = {
    "wrapped": (wrapped, "{} is a Wrapper with a forward of its own", (*CONVS, *SE[1:])),
    "patched": (patched, "{} is a .* with a forward of its own", (*CONVS, *SE)),
    "patched_call": (patched_call, "{} is a .* with a forward of its own", (*CONVS, *SE)),
    "subclass": (of_class(DoublingConv2d), "{} is a DoublingConv2d .* Conv2d", CONVOLUTIONS),
    "call": (of_class(CallingConv2d), "{} is a CallingConv2d .* Conv2d", CONVOLUTIONS),
    "call_impl": (of_class(CallImplConv2d), "{} is a CallImplConv2d .* Conv2d", CONVOLUTIONS),
    "conv_forward": (of_class(StandardisedConv2d), "{} is a .* a _conv_forward", CONVOLUTIONS),
    "patched_conv_forward": (patched_conv_forward, "{} is a .* a _conv_forward", CONVOLUTIONS),
}


@pytest.mark.parametrize(
    ("change", "layer"), [(c, layer) for c, (*_, layers) in CHANGES.items() for layer in layers]
)
def test_a_changed_layer(change, layer):
    fused, plain = pair()
    x = image()
    before = fused(x).detach()
    make, why, _ = CHANGES[change]
    for m in (fused, plain):
        make(m, layer)
    assert_called(fused, plain, why.format(layer), x)
    assert not torch.allclose(fused(x).detach(), before)


def traced(layer):
    return torch.jit.trace(layer, (torch.randn(2, layer.in_channels, 1, 1, dtype=torch.float64),))


@pytest.mark.parametrize("layer", ("conv_2", "se.fc1"))
@pytest.mark.parametrize("compile", (torch.jit.script, traced))
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_a_layer_of_torchscript(compile, layer):
    fused, plain = pair()
    for m in (fused, plain):
        replace_by(compile)(m, layer)
    assert_called(fused, plain, rf"{layer} is a \w+ with a forward of its own")


TORCHS_METHODS = (
    (nn.Conv2d, "forward"),
    (nn.Conv2d, "_conv_forward"),
    (nn.AdaptiveAvgPool2d, "forward"),
    (nn.ReLU, "forward"),
    (nn.Sigmoid, "forward"),
)


@pytest.mark.parametrize(
    ("kind", "name"), TORCHS_METHODS, ids=lambda part: getattr(part, "__name__", part)
)
@pytest.mark.parametrize("make", (pair, split_pair), ids=("psa", "split"))
def test_another_method_of_torchs_class(monkeypatch, make, kind, name):
    """Libraries put theirs into torch's classes, to count, to cast or to quantise."""
    fused, plain = make()
    x = image(16 if make is pair else 48)
    before = fused(x).detach()
    theirs = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *args: 2 * theirs(*args))
    assert_called(fused, plain, rf".* is a {kind.__name__} with a {name} of its own", x)
    assert not torch.allclose(fused(x).detach(), before)


class OwnAttention(FusedPSAModule):
    def attention(self, feats):
        return 2 * super().attention(feats)


@pytest.mark.parametrize("patched", (False, True))
def test_an_attention_of_its_own(patched):
    fused, plain = pair()
    x = image()
    expected = 2 * plain(x)
    if patched:
        attention = fused.attention
        fused.attention = lambda feats: 2 * attention(feats)
    else:
        fused.__class__ = OwnAttention
    with pytest.warns(UserWarning, match=r"calls layers .*: it has an attention of its own"):
        out = fused(x)
    assert_near(out, expected, ROUNDING)


def test_the_attention_alone_warns_too():
    fused, plain = pair()
    feats = [conv(image()) for conv in map(fused.get_submodule, CONVS)]
    for m in (fused, plain):
        m.se.fc1.register_forward_hook(HOOKS["forward_hook"])
    with pytest.warns(UserWarning, match=r"calls layers .*: se\.fc1 has hooks"):
        out = fused.attention(feats)
    assert_near(out, plain.attention(feats), ROUNDING)


# ---- subclasses of Tensor ----


class Twice(torch.Tensor):
    """Doubles convolutions, as a quantised tensor gives them a meaning of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * out.as_subclass(torch.Tensor) if function is nn.functional.conv2d else out


def as_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Twice))


def as_attribute(layer):
    weight = layer.weight.detach().as_subclass(Twice)
    del layer.weight
    layer.weight = weight


def as_buffer(layer):
    weight = layer.weight.detach().as_subclass(Twice)
    del layer.weight
    layer.register_buffer("weight", weight)


def as_original(layer):
    as_parameter(layer)
    parametrize.register_parametrization(layer, "weight", nn.Identity())


@pytest.mark.parametrize("hold", (as_parameter, as_attribute, as_buffer, as_original))
@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_a_weight_of_a_subclass(layer, hold):
    fused, plain = pair()
    x = image()
    before = fused(x).detach()
    for m in (fused, plain):
        hold(m.get_submodule(layer))
    with pytest.warns(UserWarning, match=rf"{layer}\..*weight.* is a Twice, expected a plain"):
        out = fused(x).detach().as_subclass(torch.Tensor)
    assert_near(out, plain(x).detach().as_subclass(torch.Tensor), ROUNDING)
    assert not torch.allclose(out, before)


@pytest.mark.parametrize("make", (pair, split_pair), ids=("psa", "split"))
def test_an_input_of_a_subclass(make):
    fused, plain = make()
    x = image(16 if make is pair else 48).detach()
    before = fused(x).detach()
    x = x.as_subclass(Twice)
    with pytest.warns(UserWarning, match=r"calls layers .*: x is a Twice, expected a plain tensor"):
        out = fused(x).detach().as_subclass(torch.Tensor)
    assert_near(out, plain(x).detach().as_subclass(torch.Tensor), ROUNDING)
    assert not torch.allclose(out, before)


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_a_subclass_that_changes_nothing_leaves_it_fused(layer):
    fused, plain = pair()
    of_class(RenamedConv2d)(fused, layer)
    assert_fused(fused, plain)


def test_settings_that_the_layers_know():
    """Groups in the SE."""
    fused, plain = pair()
    fused.se.fc1 = nn.Conv2d(16, 4, 1, groups=2).double()
    plain.se.fc1 = copy.deepcopy(fused.se.fc1)
    assert_called(fused, plain, r"se\.fc1 has padding \(0, 0\) and groups 2")


BROKEN = {
    "missing": (lambda se: delattr(se, "fc1"), r"se\.fc1 is missing"),
    "output_size": (lambda se: setattr(se, "avg_pool", nn.AdaptiveAvgPool2d(2)),
        r"se\.avg_pool has output_size 2, expected 1"),
    "padding": (lambda se: setattr(se, "fc1", nn.Conv2d(16, 4, 1, padding=1).double()),
        r"se\.fc1 has padding \(1, 1\)"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_what_the_reference_cannot_compute_raises_as_there(broken):
    fused, plain = pair()
    change, why = BROKEN[broken]
    change(fused.se), change(plain.se)
    x = image()
    with pytest.raises((AttributeError, RuntimeError)) as theirs:
        plain(x)
    with (
        pytest.warns(UserWarning, match=why),
        pytest.raises(type(theirs.value)) as ours,
    ):
        fused(x)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_pruning_while_it_is_a_hook(layer):
    fused, plain = pair()
    for m in (fused, plain):
        prune.l1_unstructured(m.get_submodule(layer), "weight", 0.5)
    assert_called(fused, plain, f"{layer} has hooks")


# ---- FusedSplitPSA ----


@pytest.mark.parametrize("layer", ("se_blocks.2", "se_blocks.1.1", "se_blocks.0.4"))
def test_a_hook_in_a_split_module(layer):
    fused, plain = split_pair()
    for m in (fused, plain):
        m.get_submodule(layer).register_forward_hook(HOOKS["forward_hook"])
    assert_called(fused, plain, rf"{layer} has hooks", image(48))


def test_a_hook_on_a_convolution_of_a_split_module():
    """They are called anyway."""
    fused, plain = split_pair()
    for m in (fused, plain):
        m.convs[1].register_forward_hook(HOOKS["forward_hook"])
    assert_fused(fused, plain, image(48))


def test_other_layers_in_a_split_module():
    fused, plain = split_pair()
    for m in (fused, plain):
        wrapped(m, "se_blocks.1.3")
    assert_called(fused, plain, r"se_blocks\.1\.3 is a Wrapper", image(48))


def test_se_networks_that_differ_in_a_split_module():
    fused, plain = split_pair()
    fused.se_blocks[1][1] = nn.Conv2d(16, 3, 1, bias=False).double()
    fused.se_blocks[1][3] = nn.Conv2d(3, 16, 1, bias=False).double()
    plain.se_blocks[1] = copy.deepcopy(fused.se_blocks[1])
    assert_called(fused, plain, r"the weights of se_blocks\.\*\.1 have shapes", image(48))


# ---- the warning and the reason ----


def hook(module, layer="se.fc1"):
    return module.get_submodule(layer).register_forward_hook(lambda *args: None)


def test_each_reason_warns_once():
    fused, _ = pair()
    x = image()
    for layer in ("se.fc1", "se.fc2"):
        handle = hook(fused, layer)
        with pytest.warns(UserWarning, match=f"{layer} has hooks"):
            fused(x)
        handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = hook(fused)
        fused(x)


def test_each_module_warns():
    fused, _ = pair()
    hook(fused)
    with pytest.warns(UserWarning, match="has hooks"):
        fused(image())
    for other in (copy.deepcopy(fused), pair()[0]):
        hook(other)
        with pytest.warns(UserWarning, match="has hooks"):
            other(image())


def test_as_an_error_it_comes_with_every_call():
    fused, _ = pair()
    hook(fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match=r"se\.fc1 has hooks"):
                fused(image())


def test_the_warning_names_the_line_of_the_call():
    fused, _ = pair()
    hook(fused)
    with pytest.warns(UserWarning) as caught:
        fused(image())
    assert caught[0].filename == __file__


def test_a_module_that_warned_is_copied_and_pickled():
    fused, plain = pair()
    for m in (fused, plain):
        wrapped(m, "se.fc1")
    assert_called(fused, plain, "se.fc1 is a Wrapper")
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_called(other, plain, "se.fc1 is a Wrapper")


def test_a_module_of_an_older_version():
    """Its pickle has no attribute that came later."""
    fused, plain = pair()
    for name in ("save_output", "winograd", "_packed", "_frozen"):
        fused.__dict__.pop(name, None)
    assert fused.__dict__.keys() - plain.__dict__.keys() == set()
    assert_fused(fused, plain)


NOT_TAKEN = {
    "padding_mode": (nn.Conv2d(16, 16, 5, padding=2, bias=False, padding_mode="reflect"),
        r"conv_2 has padding_mode 'reflect'"),
    "same": (nn.Conv2d(16, 16, 5, padding="same", bias=False), r"conv_2 has padding 'same'"),
    "oblong": (nn.Conv2d(16, 16, (5, 3), padding=(2, 1), bias=False),
        r"conv_2 has padding \(2, 1\)"),
}  # fmt: skip


@pytest.mark.parametrize("conv", NOT_TAKEN)
def test_why_a_convolution_is_called_without_a_warning(conv):
    """Its settings say all; only the operator has no place for them."""
    fused, plain = pair()
    conv, why = NOT_TAKEN[conv]
    fused.conv_2, plain.conv_2 = copy.deepcopy(conv).double(), copy.deepcopy(conv).double()
    assert why_not_fused(fused) == why.replace("\\", "") and why_not_fused(fused) in repr(fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = results(fused, x := image())
    for ours, theirs in zip(got, results(plain, x), strict=True):
        assert_near(ours, theirs, ROUNDING)


def test_a_stride_of_its_own_is_a_reason():
    fused, _ = pair()
    fused.conv_3.stride = (2, 2)
    assert why_not_fused(fused) == "conv_3 has stride (2, 2), and conv_1 has (1, 1)"


def test_why_not_fused_of_another_module():
    with pytest.raises(TypeError, match=r"got Sequential; ask for each of them in model\.modules"):
        why_not_fused(nn.Sequential(pair()[0]))


# ---- torch.compile ----


def test_a_compiled_module_calls_its_layers_too():
    fused, plain = pair()
    for m in (fused, plain):
        m.se.fc1.register_forward_hook(HOOKS["forward_hook"])
    x = image()
    with pytest.warns(UserWarning, match=r"calls layers .* se\.fc1 has hooks"):
        out = torch.compile(fused, fullgraph=True, backend="aot_eager")(x)
    assert_near(out, plain(x), ROUNDING)


def test_hooks_on_all_modules_are_compiled():
    fused, plain = pair()

    def double(module, x, y):
        return 2 * y if isinstance(module, nn.Conv2d) else None

    x = image()
    with module_hooks.register_module_forward_hook(double):
        expected = plain(x)
        with pytest.warns(UserWarning, match=r"calls layers .* registered for all modules"):
            out = torch.compile(fused.forward, fullgraph=True, backend="aot_eager")(x)
    assert_near(out, expected, ROUNDING)
