"""fuse(): what a module has beside its forward is kept, or the module is left and named."""

import pytest
import torch
from support.fusing import without_warning
from support.lookalikes.parts import Shared, published_psa, squeeze, with_norm
from torch import nn

from epsa_fused import fuse

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
