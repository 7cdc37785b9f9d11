"""fuse(): what it finds, what it keeps, what it refuses, and that the fused model computes the same
as the model that it was given."""

import copy
import io
import re
import warnings

import pytest
import torch
from support import published
from support.tolerance import assert_near
from torch import nn
from torch.nn.utils import parametrizations, prune

from epsa_fused import EPSANet, FusedPSAModule, FusedSplitPSA, PSAModule, fuse

GROUPS = (1, 2, 4, 8)


def published_psa(cls=published.PSAModule):
    return cls(16, 64, conv_groups=GROUPS)


def external_psa(cls=published.ExternalPSA, branches=4):
    return cls(16 * branches, S=branches)


# ---- modules that look like a PSA module: what other people made of it ----


class InOrder(published.PSAModule):
    """The paper's equation: branches in their order."""

    def forward(self, x):
        return torch.cat(super().forward(x).chunk(4, 1)[::-1], 1)


class Overwriting(published.ExternalPSA):
    """Some copies write each convolution's result over the part that it came from."""

    def forward(self, x):
        n, c, h, w = x.shape
        maps = x.view(n, self.S, c // self.S, h, w)
        for i, conv in enumerate(self.convs):
            maps[:, i] = conv(maps[:, i])
        weights = torch.stack([se(maps[:, i]) for i, se in enumerate(self.se_blocks)], dim=1)
        return (maps * self.softmax(weights.expand_as(maps))).view(n, c, h, w)


class WithShortcut(published.PSAModule):
    def forward(self, x):
        return super().forward(x) + self.conv_1(x).repeat(1, 4, 1, 1)


class WithoutSigmoid(published.PSAModule):
    def forward(self, x):
        self.se.sigmoid.forward = lambda x: x
        out = super().forward(x)
        del self.se.sigmoid.forward
        return out


class WithoutReLU(published.PSAModule):
    def forward(self, x):
        self.se.relu.forward = lambda x: x
        out = super().forward(x)
        del self.se.relu.forward
        return out


class Sum(published.PSAModule):
    """Another shape."""

    def forward(self, x):
        return sum(super().forward(x).chunk(4, 1))


class WithDropout(published.PSAModule):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Keeping(published.PSAModule):
    """As visualisations of the attention do."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Failing(published.PSAModule):
    def forward(self, x):
        raise NotImplementedError("of no use")


# ---- helpers ----


def results(model, x):
    """Output, gradient of the input, and all gradients as one vector."""
    x = x.clone().requires_grad_()
    out = model(x * 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grad_x, *grads = torch.autograd.grad(out.sin().sum(), [x, *parameters])
    return out.detach(), grad_x, torch.cat([g.flatten() for g in grads])


def assert_same(fused, model, x):
    for actual, expected in zip(results(fused, x), results(model, x), strict=True):
        assert_near(actual, expected)


def description(model):
    """All that fuse() must leave alone in a model that it does not change."""
    modules = [(name, type(m), id(m), m.training) for name, m in model.named_modules()]
    tensors = [(k, id(v), v._version) for k, v in [*model.named_parameters()]]
    return modules, tensors, [*model.state_dict()]


def without_warning(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **options)


# ---- what is found, and that it computes the same ----

MODULES = {
    "reference": (lambda: PSAModule(16, 64, conv_groups=GROUPS), FusedPSAModule, "reversed"),
    "reference_in_order": (
        lambda: PSAModule(16, 64, conv_groups=GROUPS, branch_order="forward"),
        FusedPSAModule,
        "forward",
    ),
    "reference_of_3_branches": (
        lambda: PSAModule(16, 48, (3, 5, 7), 2, (1, 2, 4), reduction=5),
        FusedPSAModule,
        "reversed",
    ),
    "published": (published_psa, FusedPSAModule, "reversed"),
    "published_in_order": (lambda: published_psa(InOrder), FusedPSAModule, "forward"),
    "stride_2": (lambda: published.PSAModule(64, 64, stride=2), FusedPSAModule, "reversed"),
    "external": (external_psa, FusedSplitPSA, "forward"),
    "external_of_2_branches": (lambda: external_psa(branches=2), FusedSplitPSA, "forward"),
}


@pytest.mark.parametrize("kind", MODULES)
def test_each_kind_is_found_and_computes_the_same(kind):
    make, cls, order = MODULES[kind]
    model = nn.Sequential(nn.Identity(), make()).double()
    inplans = (
        64 if kind in ("stride_2", "external") else {"external_of_2_branches": 32}.get(kind, 16)
    )
    before = description(model)
    fused = without_warning(fuse, model)
    assert description(model) == before
    assert type(fused[1]) is cls and fused[1].branch_order == order
    assert list(fused.fuse_report.replaced) == ["1"] and not fused.fuse_report.left
    # the same tensors, by the same names
    assert list(fused.state_dict()) == list(model.state_dict())
    for (name, a), (other, b) in zip(
        fused.named_parameters(), model.named_parameters(), strict=True
    ):
        assert name == other and a is b
    assert_same(fused, model, torch.randn(3, inplans, 7, 6, dtype=torch.float64))


def test_the_class_may_have_any_name_and_module_path():
    def forward(self, x):
        return published.PSAModule.forward(self, x)

    cls = type("Conv", (nn.Module,), {"forward": forward, "__module__": "somewhere.else"})
    module = cls()
    for name, child in published_psa().named_children():
        module.add_module(name, child)
    module.split_channel = 16
    model = nn.Sequential(module).double()
    fused = fuse(model)
    assert fused.fuse_report.replaced == {
        "0": "FusedPSAModule(branch_order='reversed') for somewhere.else.Conv"
    }
    assert_same(fused, model, torch.randn(2, 16, 6, 6, dtype=torch.float64))


def test_the_published_network_in_evaluation_and_in_training():
    model = published.epsanet50().double()
    fused = fuse(model)
    assert len(fused.fuse_report.replaced) == 16
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    # The two share the BatchNorms' statistics: each run starts from those of the beginning.
    statistics = copy.deepcopy(model.state_dict())
    for train in (False, True):
        pair = []
        for m in (fused, model):
            m.load_state_dict(statistics)
            pair.append(results(m.train(train), x))
        for actual, expected in zip(*pair, strict=True):
            assert_near(actual, expected)


def test_what_was_fused_is_what_would_have_been_built():
    """The reference network, fused, against the same network with fused=True."""
    reference = EPSANet((1, 1, 1, 1), 10, fused=False)
    built = EPSANet((1, 1, 1, 1), 10)
    fused = fuse(reference)
    assert repr(fused) == repr(built)
    for (name, a), (_, b) in zip(fused.named_modules(), built.named_modules(), strict=True):
        # the keys too, so that nothing is forgotten that the constructor sets
        assert vars(a).keys() - {"fuse_report"} == vars(b).keys(), name
    built.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(fused.eval()(x), built.eval()(x))


def test_a_module_that_wrote_over_its_input():
    """The result is the same; that the input is no longer overwritten, the user should know."""
    model = nn.Sequential(external_psa(Overwriting)).double()
    with pytest.warns(UserWarning, match=r"0 wrote over its input, which the fused module leaves"):
        fused = fuse(model)
    x = torch.randn(2, 64, 6, 6, dtype=torch.float64)
    given = x.clone()
    with torch.no_grad():
        out = fused(given)
        assert torch.equal(given, x)
        assert_near(out, model(given))
    assert not torch.equal(given, x)


def test_a_shared_module_stays_shared():
    psa = published.PSAModule(64, 64)
    model = nn.ModuleDict({"a": psa, "b": nn.Sequential(psa)})
    fused = fuse(model)
    assert list(fused.fuse_report.replaced) == ["a", "b.0"]
    assert fused["a"] is fused["b"][0] and type(fused["a"]) is FusedPSAModule


def test_the_model_may_be_the_module():
    module = published_psa().double()
    fused = fuse(module)
    assert type(fused) is FusedPSAModule and list(fused.fuse_report.replaced) == [""]
    assert_same(fused, module, torch.randn(2, 16, 6, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"the model is itself a PSA module"):
        fuse(module, inplace=True)


def test_the_random_generator_is_left_alone():
    model = nn.Sequential(published_psa(), external_psa(), published_psa(WithDropout))
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"left alone 1"):
        fuse(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_kind_is_run_once(monkeypatch):
    """In training and in evaluation. EPSANet-101 has 33 modules of four widths."""
    runs = []
    forward = published.PSAModule.forward
    monkeypatch.setattr(
        published.PSAModule, "forward", lambda self, x: (runs.append(x.shape), forward(self, x))[1]
    )
    with torch.device("meta"):
        model = published.epsanet101()
    fuse(model)
    assert len(runs) == 2 * 4


class Scaled(published.SEWeightModule):
    scale = 1.0

    def forward(self, x):
        return self.scale * super().forward(x)


class Flagged(published.PSAModule):
    _doubled = False

    def forward(self, x):
        return super().forward(x) * (2 if self._doubled else 1)


UNEQUAL = {
    "private": (Flagged, lambda m: setattr(m, "_doubled", True)),
    "se": (published.PSAModule, lambda m: setattr(m.se, "scale", 3.0)),
    "softmax": (published.PSAModule, lambda m: setattr(m.softmax, "dim", 2)),
}


@pytest.mark.parametrize("setting", UNEQUAL)
def test_two_of_one_class_and_unequal_settings_are_each_run(setting):
    cls, change = UNEQUAL[setting]
    model = nn.Sequential(published_psa(cls), published_psa(cls))
    if setting == "se":
        for m in model:
            m.se = Scaled(16)
    change(model[1])
    with pytest.warns(UserWarning, match=r"left alone 1 .*1 \(its forward computes something else"):
        fused = fuse(model)
    assert [type(m) for m in fused] == [FusedPSAModule, cls]


# ---- what is kept ----


def test_flags_dtype_and_frozen_parameters_are_kept():
    model = nn.Sequential(published_psa(), external_psa()).bfloat16()
    model[0].eval()
    model[0].conv_2.train()
    model[1].se_blocks[2].eval()
    for p in model[0].se.parameters():
        p.requires_grad_(False)
    training = {name: m.training for name, m in model.named_modules()}
    fused = fuse(model)
    for name, m in fused.named_modules():
        assert m.training == training[name], name
    assert not any(p.requires_grad for p in fused[0].se.parameters())
    out = fused(torch.randn(2, 16, 6, 6).bfloat16())
    assert out.dtype == torch.bfloat16


def test_a_model_without_data():
    with torch.device("meta"):
        model = nn.Sequential(published.PSAModule(64, 64))
    fused = fuse(model)
    assert {p.device.type for p in fused.parameters()} == {"meta"}
    assert fused(torch.empty(2, 64, 8, 8, device="meta")).shape == (2, 64, 8, 8)


def test_an_optimizer_goes_on():
    """In place and not: the parameters are the ones that it was made for."""
    for inplace in (False, True):
        model = nn.Sequential(published_psa())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fused = fuse(model, inplace=inplace)
        assert (fused is model) == inplace
        before = fused[0].conv_1.weight.detach().clone()
        fused(torch.randn(2, 16, 6, 6)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(fused[0].conv_1.weight, before)


def test_a_deepcopy_is_independent():
    model = nn.Sequential(published_psa())
    other = copy.deepcopy(fuse(model))
    assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in model.parameters())


def test_the_fused_model_can_be_saved():
    model = fuse(nn.Sequential(published_psa(), external_psa()))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(loaded(x), model(x))
    assert loaded.fuse_report == model.fuse_report


@pytest.mark.parametrize("inplace", (False, True))
def test_hooks_on_the_module_and_its_convolutions_stay(inplace):
    model = nn.Sequential(published_psa(), external_psa())
    calls = []
    handles = [
        model[0].register_forward_hook(lambda m, x, y: calls.append(type(m))),
        model[0].register_forward_pre_hook(lambda m, x, k: calls.append("pre"), with_kwargs=True),
        model[0].register_full_backward_hook(lambda m, x, y: calls.append("backward")),
        model[1].convs[3].register_forward_hook(lambda m, x, y: calls.append("conv")),
    ]
    fused = fuse(model, inplace=inplace)
    assert not calls, "fuse() ran the user's hooks"
    x = torch.randn(2, 16, 6, 6, requires_grad=True)
    fused(x).sum().backward()
    assert calls == ["pre", FusedPSAModule, "conv", "backward"]
    if inplace:
        for handle in handles:
            handle.remove()
        calls.clear()
        fused(x).sum().backward()
        assert not calls


def test_parametrized_layers_are_kept():
    model = nn.Sequential(published_psa()).double().eval()
    parametrizations.weight_norm(model[0].se.fc1)
    parametrizations.spectral_norm(model[0].conv_2)
    fused = fuse(model)
    assert_same(fused, model, torch.randn(2, 16, 6, 6, dtype=torch.float64))


# ---- what is refused ----

REFUSED_HOOKS = {
    "se": (lambda m: m.se.register_forward_hook(print), r"0\.se has hooks"),
    "fc2": (lambda m: m.se.fc2.register_full_backward_hook(print), r"0\.se\.fc2 has hooks"),
    "softmax": (lambda m: m.softmax.register_forward_pre_hook(print), r"0\.softmax has hooks"),
    "se_state_dict": (
        lambda m: m.se.register_load_state_dict_post_hook(print),
        r"0 has hooks in _load_state_dict_post_hooks",
    ),
    "state_dict": (
        lambda m: m.register_state_dict_post_hook(lambda *args: None),
        r"0 has hooks in _state_dict_hooks",
    ),
    "load": (
        lambda m: m.register_load_state_dict_post_hook(print),
        r"0 has hooks in _load_state_dict_post_hooks",
    ),
    "old_backward": (
        lambda m: m.register_backward_hook(lambda *args: None),
        r"0 has hooks in _backward_hooks",
    ),
}


@pytest.mark.parametrize("hook", REFUSED_HOOKS)
def test_hooks_that_cannot_be_kept_are_an_error(hook):
    register, message = REFUSED_HOOKS[hook]
    # the first and the last could be fused: nothing may be half-done
    model = nn.Sequential(published_psa(), external_psa(), published.PSAModule(64, 64))
    register(model[0])
    before = [(name, type(m), id(m)) for name, m in model.named_modules()]
    for inplace in (False, True):
        with pytest.raises(RuntimeError, match=rf"fuse: {message}.*remove them first"):
            fuse(model, inplace=inplace)
    assert [(name, type(m), id(m)) for name, m in model.named_modules()] == before


def test_hooks_that_were_removed_are_no_error():
    model = nn.Sequential(published_psa(), external_psa())
    for layer in (model[0].se, model[0].se.fc1, model[0].softmax, model[1].se_blocks[0][1]):
        layer.register_forward_hook(print).remove()
        layer.register_full_backward_hook(print).remove()
    fused = without_warning(fuse, model)
    assert len(fused.fuse_report.replaced) == 2


def test_the_hook_error_of_a_model_that_is_the_module():
    module = published_psa()
    module.se.fc1.register_forward_hook(print)
    with pytest.raises(RuntimeError, match=r"fuse: se\.fc1 has hooks"):
        fuse(module)


def test_hooks_on_a_split_modules_se_are_an_error():
    model = nn.Sequential(external_psa())
    model[0].se_blocks[1][3].register_forward_hook(print)
    with pytest.raises(RuntimeError, match=r"0\.se_blocks\.1\.3 has hooks"):
        fuse(model)


def test_a_model_that_cannot_be_copied():
    model = nn.Sequential(published_psa()).double()
    prune.l1_unstructured(model[0].conv_1, "weight", 0.5)
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    expected = model(x).detach()
    with pytest.raises(RuntimeError, match=r"fuse: Sequential cannot be copied, use .*inplace"):
        fuse(model)
    assert type(model[0]) is published.PSAModule
    fused = fuse(model, inplace=True)
    assert type(fused[0]) is FusedPSAModule
    assert_near(fused(x), expected)


def test_a_module_that_cannot_be_copied():
    model = nn.Sequential(published_psa(), nn.Conv2d(64, 16, 1), published_psa(Keeping))
    model(torch.randn(2, 16, 6, 6))
    with pytest.warns(UserWarning, match=r"left alone 1 .*2 \(it cannot be copied for a trial"):
        fuse(model, inplace=True)
    assert [type(m) for m in model] == [FusedPSAModule, nn.Conv2d, Keeping]


def test_a_thing_that_is_no_module():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        fuse(dict(published_psa().state_dict()))


# ---- what is left alone ----


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def changed(module, change):
    change(module)
    return module


def set_child(path, make):
    def change(module):
        parent, _, name = path.rpartition(".")
        parent = module.get_submodule(parent)
        setattr(parent, name, make(getattr(parent, name)))

    return change


def set_forward(module):
    module.forward = lambda x: x


MISFITS = {
    "another_result": (lambda: published_psa(WithShortcut), r"something else than PSA"),
    "no_sigmoid": (lambda: published_psa(WithoutSigmoid), r"something else than PSA"),
    "no_relu": (lambda: published_psa(WithoutReLU), r"something else than PSA"),
    "another_shape": (lambda: published_psa(Sum), r"something else than PSA"),
    "failing": (lambda: published_psa(Failing), r"a trial on \[4, 16, 3, 2\] failed: of no use"),
    "dropout": (lambda: published_psa(WithDropout).eval(), r"something else than PSA"),
    "patched": (lambda: changed(published_psa(), set_forward), r"forward was replaced"),
    "patched_reference": (
        lambda: changed(PSAModule(64, 64), set_forward),
        r"forward was replaced",
    ),
    "patched_attention_of_the_reference": (
        lambda: changed(PSAModule(64, 64), lambda m: setattr(m, "attention", torch.stack)),
        r"something else than PSA",
    ),
    "lazy": (
        lambda: changed(
            published_psa(), set_child("conv_1", lambda c: nn.LazyConv2d(16, 3, bias=False))
        ),
        r"its parameters are not initialised; run the model once",
    ),
    "lazy_se": (
        lambda: changed(published_psa(), set_child("se.fc1", lambda c: nn.LazyConv2d(1, 1))),
        r"its parameters are not initialised; run the model once",
    ),
    "another_child": (
        lambda: changed(published_psa(), lambda m: m.add_module("bn", nn.BatchNorm2d(64))),
        r"other children too: bn",
    ),
    "a_gap": (
        lambda: changed(published_psa(), lambda m: m.add_module("conv_6", nn.Conv2d(16, 16, 1))),
        r"other children too: conv_6",
    ),
    "parameter": (
        lambda: changed(
            published_psa(), lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(1)))
        ),
        r"parameters or buffers of its own: scale",
    ),
    "parameter_of_the_se": (
        lambda: changed(published_psa(), lambda m: m.se.add_module("bn", nn.BatchNorm2d(16))),
        r"the fused one has not: se\.bn\.bias, se\.bn\.num_batches_tracked",
    ),
    "buffer_of_the_softmax": (
        lambda: changed(
            published_psa(), lambda m: m.softmax.register_buffer("temperature", torch.ones(1))
        ),
        r"the fused one has not: softmax\.temperature",
    ),
    "conv_bias": (
        lambda: changed(
            published_psa(),
            set_child("conv_2", lambda c: nn.Conv2d(16, 16, 5, padding=2, groups=2)),
        ),
        r"conv_2 is Conv2d\(.*groups=2\), expected Conv2d\(.*bias=False\)",
    ),
    "dilation": (
        lambda: changed(
            published_psa(),
            set_child("conv_1", lambda c: nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False)),
        ),
        r"conv_1 is Conv2d\(.*dilation=\(2, 2\)",
    ),
    "even_kernel": (
        lambda: changed(
            published_psa(), set_child("conv_3", lambda c: nn.Conv2d(16, 16, 4, bias=False))
        ),
        r"conv_kernels\[2\]: expected an odd kernel size, got 4",
    ),
    "lora_conv": (
        lambda: changed(published_psa(), set_child("conv_4", Lora)),
        r"conv_4 is a Lora, expected a Conv2d",
    ),
    "lora_se": (
        lambda: changed(published_psa(), set_child("se.fc1", Lora)),
        r"se\.fc1 is a Lora with a forward of its own",
    ),
    "lora_se_of_the_reference": (
        lambda: changed(PSAModule(64, 64), set_child("se.fc1", Lora)),
        r"se\.fc1 is a Lora with a forward of its own",
    ),
    "se_of_another_width": (
        lambda: changed(published_psa(), set_child("se.fc2", lambda c: nn.Conv2d(1, 32, 1))),
        r"a trial on .* failed: ",
    ),
    "gelu": (
        lambda: changed(published_psa(), set_child("se.relu", lambda r: nn.GELU())),
        r"se\.relu is a GELU",
    ),
    "split_lengths": (
        lambda: changed(external_psa(), lambda m: m.se_blocks.append(m.se_blocks[0])),
        r"4 convs and 5 se_blocks",
    ),
    "split_list": (
        lambda: changed(external_psa(), set_child("convs", lambda c: nn.Sequential(*c))),
        r"convs is a Sequential, expected a ModuleList",
    ),
    "split_layers": (
        lambda: changed(external_psa(), lambda m: m.se_blocks[2].append(nn.Identity())),
        r"se_blocks\.2 has 6 layers, expected 5",
    ),
    "split_bias": (
        lambda: changed(external_psa(), set_child("se_blocks.1.1", lambda c: nn.Conv2d(16, 4, 1))),
        r"some of se_blocks\.\*\.1 have a bias",
    ),
    "split_widths": (
        lambda: changed(
            external_psa(),
            lambda m: (
                set_child("se_blocks.1.1", lambda c: nn.Conv2d(16, 2, 1, bias=False))(m),
                set_child("se_blocks.1.3", lambda c: nn.Conv2d(2, 16, 1, bias=False))(m),
            ),
        ),
        r"weights of se_blocks\.\*\.1 have shapes",
    ),
    "split_channels": (
        lambda: changed(external_psa(), set_child("convs.3", lambda c: nn.Conv2d(8, 16, 1))),
        r"\(in_channels, out_channels\).*\(8, 16\)\], expected equal",
    ),
}


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_left_alone_and_named(misfit, inplace):
    make, why = MISFITS[misfit]
    model = nn.ModuleDict({"good": published_psa(), "bad": make()})
    kept = type(model["bad"])
    with pytest.warns(UserWarning, match=rf"left alone 1 .*bad \(.*{why}"):
        fused = fuse(model, inplace=inplace)
    assert type(fused["good"]) is FusedPSAModule and type(fused["bad"]) is kept
    report = fused.fuse_report
    assert list(report.replaced) == ["good"] and list(report.left) == ["bad"]
    assert re.search(why, report.left["bad"])
    assert str(report).splitlines()[0] == "fuse: 1 replaced, 1 left alone"
    assert "  bad: left alone, " in str(report) and "  good: FusedPSAModule" in str(report)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_traced_module_is_left_alone_and_named():
    x = torch.randn(2, 16, 6, 6)
    model = nn.ModuleDict({"good": published_psa(), "bad": torch.jit.trace(published_psa(), x)})
    with pytest.warns(UserWarning, match=r"left alone 1 .*bad \(it was compiled by torch\.jit"):
        fused = fuse(model)
    assert list(fused.fuse_report.replaced) == ["good"]
    assert torch.equal(fused["bad"](x), model["bad"](x))


@pytest.mark.parametrize("inplace", (False, True))
def test_nothing_to_fuse(inplace):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    before = description(model)
    with pytest.warns(UserWarning, match=r"nothing to fuse, Sequential has no PSA module that can"):
        fused = fuse(model, inplace=inplace)
    assert description(model) == before
    assert repr(fused) == repr(model) and not fused.fuse_report.replaced


def test_what_is_fused_already():
    model = fuse(nn.Sequential(published_psa(), external_psa()))
    with pytest.warns(UserWarning, match=r"nothing to fuse.*besides 2 that are fused already"):
        again = fuse(model)
    assert [type(m) for m in again] == [FusedPSAModule, FusedSplitPSA]


# ---- parallel wrappers ----


def test_data_parallel():
    model = nn.DataParallel(nn.Sequential(published_psa()).double())
    fused = fuse(model)
    assert type(fused.module[0]) is FusedPSAModule
    assert list(fused.fuse_report.replaced) == ["module.0"]
    assert list(fused.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    assert_near(fused(x), model(x))


distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)


@pytest.fixture
def one_process():
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@distributed
def test_distributed_data_parallel_in_place(one_process):
    plain = nn.Sequential(published_psa()).double()
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    model(x).sum().backward()  # its buckets exist before it is fused
    model.zero_grad()
    assert fuse(model, inplace=True) is model
    assert type(model.module[0]) is FusedPSAModule
    model(x).sin().sum().backward()
    plain(x).sin().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert_near(a.grad, b.grad)


@distributed
def test_distributed_data_parallel_needs_inplace(one_process):
    model = nn.parallel.DistributedDataParallel(nn.Sequential(published_psa()))
    with pytest.raises(RuntimeError, match=r"the model is a DistributedDataParallel.*inplace=True"):
        fuse(model)
    assert type(model.module[0]) is published.PSAModule


@distributed
def test_a_sharded_module_is_left_alone(one_process):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(published.PSAModule(64, 64), published_psa())
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh)
    with pytest.warns(UserWarning, match=r"0 \(its parameters are shards \(DTensor\)"):
        fuse(model, inplace=True)
    assert list(model.fuse_report.replaced) == ["1"]


def test_a_compiled_model_is_compiled_again():
    compiled = torch.compile(nn.Sequential(published_psa()).double(), backend="aot_eager")
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    expected = compiled(x).detach()
    assert fuse(compiled, inplace=True) is compiled
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_near(compiled(x).detach(), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


# ---- FusedSplitPSA by itself ----


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("order", ("reversed", "forward"))
def test_split_psa(order, bias):
    """Against the module that it is made from; biases and the order are its own."""
    theirs = external_psa(branches=3).double()
    if bias:
        for se in theirs.se_blocks:
            se[1], se[3] = nn.Conv2d(16, 4, 1).double(), nn.Conv2d(4, 16, 1).double()
    ours = FusedSplitPSA(theirs.convs, theirs.se_blocks, branch_order=order)
    x = torch.randn(2, 48, 5, 6, dtype=torch.float64)
    expected = theirs(x)
    if order == "reversed":
        expected = torch.cat(expected.chunk(3, 1)[::-1], 1)
    assert_near(ours(x).detach(), expected.detach())
    assert f"branch_order='{order}'" in repr(ours)


def test_split_psa_refuses_what_it_would_leave_out():
    theirs = external_psa()
    with pytest.raises(ValueError, match=r"branch_order: expected one of"):
        FusedSplitPSA(theirs.convs, theirs.se_blocks, branch_order="other")
    with pytest.raises(ValueError, match=r"FusedSplitPSA: it has 3 convs and 4 se_blocks"):
        FusedSplitPSA(theirs.convs[:3], theirs.se_blocks)
    ours = FusedSplitPSA(theirs.convs, theirs.se_blocks)
    theirs.se_blocks[2][1].register_forward_hook(print)
    with pytest.raises(RuntimeError, match=r"FusedSplitPSA: se_blocks\.2\.1 has hooks"):
        ours(torch.randn(2, 64, 6, 6))


def test_split_psa_compiles():
    ours = fuse(nn.Sequential(external_psa()))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 64, 6, 6)
    assert torch.equal(compiled(x), ours(x))
