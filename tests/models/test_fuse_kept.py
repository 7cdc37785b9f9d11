"""fuse(): what a module has beside its forward is kept, or the module is left and named."""

import copy
import pickle

import pytest
import torch
from support.fusing import without_warning
from support.lookalikes.parts import Shared, published_psa, recalibrated, squeeze, with_norm
from support.lookalikes.variants import AtOnce, Gate, Numbered, with_convs
from support.tolerance import relative_error
from torch import nn

from epsa_fused import fuse, unfuse, why_not_fused

# ---- methods of nn.Module ----


class Frozen(Shared):
    """Its BatchNorms stay in evaluation mode."""

    def __init__(self):
        super().__init__(with_norm())

    def train(self, mode=True):
        super().train(mode)
        for branch in self.conv_branches:
            branch[1].eval()  # and it returns nothing, as people forget to


class InFloat32(Shared):
    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.se_block.float()
        return self


class FewParameters(Shared):
    def parameters(self, recurse=True):
        return self.conv_branches.parameters()


class Called(Shared):
    def __call__(self, *args, **options):
        return super().__call__(*args, **options)


class FallsBack(Shared):
    def __getattr__(self, name):
        return None if name == "rate" else super().__getattr__(name)


class SetsItsPart(Shared):
    def __setattr__(self, name, value):
        super().__setattr__("conv_branches" if name == "convs" else name, value)


class Mixin:
    def requires_grad_(self, requires_grad=True):
        return self


class OfMixin(Mixin, Shared):
    pass


def with_own(**methods):
    module = Shared()
    vars(module).update(methods)
    return module


class PublishedSE(type(published_psa().se)):
    def zero_grad(self, set_to_none=True):
        pass


def with_se(se):
    module = published_psa()
    module.se = se
    return module


LOST = {
    "train": (Frozen, "it has train"),
    "_apply": (InFloat32, "it has _apply"),
    "parameters": (FewParameters, "it has parameters"),
    "call": (Called, "it has __call__"),
    "getattr": (FallsBack, "it has __getattr__"),
    "setattr": (SetsItsPart, "it has __setattr__"),
    "mixin": (OfMixin, "it has requires_grad_"),
    "on_the_object": (lambda: with_own(eval=lambda: None), "it has eval"),
    "of_the_se": (lambda: with_se(PublishedSE(16, 8)), "se has zero_grad"),
}


@pytest.mark.parametrize("method", LOST)
def test_a_method_that_would_be_lost_is_named(method):
    make, why = LOST[method]
    model = nn.ModuleList([published_psa(), make()])
    with pytest.warns(UserWarning, match=rf"left alone 1 .*would be lost: {why}\)"):
        fused = fuse(model)
    assert type(fused[1]) is type(model[1]) and list(fused.fuse_report.left) == ["1"]


class Described(Shared):
    """None of its methods has a part in what it computes."""

    def extra_repr(self):
        return "described"

    def __repr__(self):
        return "Described()"

    def __getstate__(self):
        return vars(self)

    def __setstate__(self, state):
        vars(self).update(state)

    def freeze(self):
        self.requires_grad_(False)


class KeptSE(nn.Sequential):
    def train(self, mode=True):
        return super().train(False)


HARMLESS = {
    "described": Described,
    "of_what_is_kept": lambda: Shared(se=KeptSE(*squeeze())),
    "of_the_tools_of_torch": lambda: Shared(
        [torch.nn.utils.parametrizations.weight_norm(b[0]) for b in with_norm()]
    ),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_a_method_that_is_kept_or_does_not_matter_is_none(kind):
    fused = without_warning(fuse, nn.Sequential(HARMLESS[kind]()))
    assert list(fused.fuse_report.replaced) == ["0"]
    if kind == "of_what_is_kept":
        assert not fused.train()[0].se_block.training


# ---- SE networks that are replaced or hooked after fuse ----


class PooledBefore(Shared):
    """Its SE network pools what is pooled already."""

    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        return recalibrated(maps, [self.se_block(m.mean((2, 3), keepdim=True)) for m in maps])


class PublishedPooledBefore(type(published_psa())):
    def forward(self, x):
        maps = [getattr(self, f"conv_{i}")(x) for i in (1, 2, 3, 4)]
        return recalibrated(maps, [self.se(m.mean((2, 3), keepdim=True)) for m in maps])


class OfAPart(Shared):
    """It calls a part of its SE network, and pools by a layer of it."""

    def __init__(self):
        super().__init__(se=Gate())

    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        means = [self.se_block.squeeze(m).flatten(1) for m in maps]
        return recalibrated(maps, [self.se_block.excite(m)[..., None, None] for m in means])


class AlsoHidden(nn.Sequential):
    """An SE network that gives more than its weights."""

    def forward(self, x):
        return super().forward(x), x


class OfTwo(Shared):
    def __init__(self):
        super().__init__(se=AlsoHidden(*squeeze()))

    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        return recalibrated(maps, [self.se_block(m)[0] for m in maps])


def largest_of_each(x):
    """Of the samples; that of a map is not that of its mean."""
    return x.flatten(1).abs().amax(1)


class Watching(nn.Module):
    """An SE network whose weights depend on all that it is given."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        weights = self.base(x)
        return weights * largest_of_each(x).view(-1, *[1] * (weights.dim() - 1))


def raised(module, args):
    (x,) = args
    return (x + 5 + 5 * largest_of_each(x).view(-1, *[1] * (x.dim() - 1)),)


def set_child(path, make):
    def change(module):
        parent, _, name = path.rpartition(".")
        parent = module.get_submodule(parent)
        parent._modules[name] = make(parent._modules[name])

    return change


def with_forward(path):
    def change(module):
        layer = module.get_submodule(path)
        layer.forward = lambda x: torch.sigmoid(
            9 * type(layer).forward(layer, *raised(layer, (x,)))
        )

    return change


def hook(path, register):
    return lambda module: register(module.get_submodule(path))


SE_CALLS = {
    "whole": (Shared, "se_block"),
    "pooled_before": (PooledBefore, "se_block"),
    "published_pooled_before": (lambda: published_psa(PublishedPooledBefore), "se"),
    "sigmoid_outside": (Numbered, "se3"),
    "vectors": (AtOnce, "excite"),
    "a_part": (OfAPart, "se_block.excite"),
    "published": (published_psa, "se"),
    "published_with_norms": (
        lambda: with_convs(with_norm(), published_psa()).eval(), "se"),
}  # fmt: skip
SE_CHANGES = {
    "replaced": lambda path: set_child(path, Watching),
    "pre_hook": lambda path: hook(path, lambda m: m.register_forward_pre_hook(raised)),
    "forward": with_forward,
}


@pytest.mark.parametrize("change", SE_CHANGES)
@pytest.mark.parametrize("kind", SE_CALLS)
@pytest.mark.filterwarnings("ignore:Fused.* calls layers")
def test_an_se_network_is_given_what_the_plain_module_gave_it(kind, change):
    make, path = SE_CALLS[kind]
    torch.manual_seed(0)
    plain = nn.Sequential(make()).double().eval()
    x = torch.randn(2, 16, 7, 6, dtype=torch.float64)
    fused = copy.deepcopy(fuse(plain))
    again = fuse(unfuse(copy.deepcopy(fused)))
    unchanged = plain(x)
    for model in (plain, fused, again):
        SE_CHANGES[change](path)(model[0])
    expected = plain(x)
    assert relative_error(expected, unchanged) > 1e-5
    for model in (fused, again, unfuse(fused)):
        assert relative_error(model(x), expected) < 1e-12


def test_an_se_network_that_only_its_class_can_call():
    model = nn.Sequential(OfTwo())
    fused = without_warning(fuse, model)
    x = torch.randn(2, 16, 7, 6)
    assert relative_error(fused(x), model(x)) < 1e-5
    for m in (fused, fuse(unfuse(fused))):
        m[0].se_block = AlsoHidden(*squeeze())
        with (
            pytest.warns(UserWarning, match="calls layers"),
            pytest.raises(RuntimeError, match=r"se_block is a AlsoHidden.*change it before fuse"),
        ):
            m(x)


# ---- settings of SE networks that change after fuse ----


class ShowsItsWeights(Gate):
    def extra_repr(self):
        return f"mean={float(self.excite[0].weight.detach().mean())}"


class Scaling(Gate):
    """Its extra_repr shows none of its settings."""

    offset = 0.0

    def __init__(self):
        super().__init__()
        self.scale, self.sizes, self.act = 1.0, [1, (2, 3)], torch.sigmoid

    def forward(self, x):
        weights = self.excite[2](self.excite[1](self.excite[0](self.squeeze(x).flatten(1))))
        size = self.scale * len(self.sizes) / 2
        return (size * self.act(weights + self.offset))[..., None, None]


def test_what_an_se_network_shows_of_its_weights_is_no_setting():
    fused = fuse(nn.Sequential(Shared(se=ShowsItsWeights())))
    with torch.no_grad():
        for p in fused.parameters():
            p.mul_(2)
    assert why_not_fused(fused[0]) is None
    without_warning(fused, torch.randn(2, 16, 6, 5))


SETTINGS = {
    "number": lambda se: setattr(se, "scale", 3.0),
    "list": lambda se: se.sizes.append(1),
    "function": lambda se: setattr(se, "act", torch.tanh),
    "of_the_class": lambda se: setattr(se, "offset", 0.5),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("ignore:Fused.* calls layers")
def test_a_setting_of_an_se_network_that_changes_has_its_effect(setting):
    plain = nn.Sequential(Shared(se=Scaling())).double()
    fused = pickle.loads(pickle.dumps(copy.deepcopy(fuse(plain))))
    x = torch.randn(2, 16, 7, 6, dtype=torch.float64)
    assert why_not_fused(fused[0]) is None
    assert torch.equal(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), fused(x))
    before = fused(x)
    for model in (plain, fused):
        SETTINGS[setting](model[0].se_block)
    assert why_not_fused(fused[0]) == "se_block has other settings than when it was fused"
    assert relative_error(fused(x), plain(x)) < 1e-12
    assert relative_error(fused(x), before) > 1e-5


# ---- dropouts that drop nothing yet ----


class DropPath(nn.Identity):
    """As networks have it where its rate is 0."""

    drop_prob = 0.0


class Dropping(Shared):
    def __init__(self, drop):
        super().__init__()
        self.drop = drop

    def forward(self, x):
        return self.drop(super().forward(x))


@pytest.mark.parametrize("kind", (lambda: nn.Dropout(0.0), lambda: nn.Dropout2d(0.0), DropPath))
def test_a_dropout_that_a_schedule_may_raise_is_named(kind):
    model = nn.ModuleList([published_psa(), Dropping(kind()), Dropping(nn.Identity())])
    with pytest.warns(UserWarning, match=r"left alone 1 .*1 \(its drop would be lost, .*Identity"):
        fused = fuse(model)
    assert type(fused[1]) is Dropping and list(fused.fuse_report.replaced) == ["0", "2"]
