"""fuse() and unfuse(): what a model holds outside of PyTorch's tree, or has compiled."""

from collections import deque, namedtuple
from functools import partial

import pytest
import torch
from support.fusing import without_warning
from support.lookalikes.parts import Shared
from support.tolerance import relative_error
from torch import nn

from epsa_fused import fuse, unfuse
from epsa_fused.modules.adopted import AdoptedPSA, FusedAdoptedPSA


class Holding(nn.Module):
    """It calls its PSA module by what it keeps of it.

    Args:
        keep: makes what it keeps.
        find: gives what it calls.
    """

    def __init__(self, keep, find):
        super().__init__()
        self.psa = Shared()
        self.find = find
        vars(self)["kept"] = keep(self.psa)

    def forward(self, x):
        return self.find(self.kept)(x)


class Hidden(nn.Module):
    def __init__(self, psa):
        super().__init__()
        self.inner = psa

    def forward(self, x):
        return self.inner(x)


def holding_itself(psa):
    held = [psa]
    held.append(held)
    return held


HELD = {
    "attribute": (lambda psa: psa, lambda kept: kept),
    "list": (lambda psa: [nn.Identity(), psa], lambda kept: kept[1]),
    "tuple_in_a_dict": (lambda psa: {"a": (psa, 1)}, lambda kept: kept["a"][0]),
    "list_in_a_tuple": (lambda psa: ([psa],), lambda kept: kept[0][0]),
    "set": (lambda psa: {psa}, lambda kept: next(iter(kept))),
    "key": (lambda psa: {psa: "name"}, lambda kept: next(iter(kept))),
    "deque": (lambda psa: deque([psa], maxlen=3), lambda kept: kept[0]),
    "list_that_holds_itself": (holding_itself, lambda kept: kept[1][0]),
}


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("kind", HELD)
def test_it_is_replaced_wherever_it_is_held(kind, inplace):
    keep, find = HELD[kind]
    model = nn.Sequential(Holding(keep, find)).double()
    kept, container = model[0].psa, model[0].kept
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    expected = model(x)
    fused = without_warning(fuse, model, inplace=inplace)
    assert list(fused.fuse_report.replaced) == ["0.psa"]
    assert type(fused[0].psa) is FusedAdoptedPSA and find(fused[0].kept) is fused[0].psa
    assert inplace or find(model[0].kept) is model[0].psa is kept
    assert not inplace or kind == "attribute" or fused[0].kept is container
    assert relative_error(fused(x), expected) < 1e-12
    plain = without_warning(unfuse, fused, inplace=inplace)
    assert type(plain[0].psa) is AdoptedPSA and find(plain[0].kept) is plain[0].psa


def test_it_is_replaced_in_a_module_that_a_list_hides():
    model = nn.Sequential(Holding(lambda psa: [Hidden(psa)], lambda kept: kept[0]))
    fused = fuse(model)
    assert fused[0].kept[0].inner is fused[0].psa and type(fused[0].psa) is FusedAdoptedPSA
    assert type(model[0].kept[0].inner) is Shared


Pair = namedtuple("Pair", "psa other")
FIXED = {
    "method": (lambda psa: psa.forward, lambda kept: kept),
    "partial": (lambda psa: partial(torch.utils.checkpoint.checkpoint, psa), lambda kept: kept),
    "function": (lambda psa: lambda x: psa(x), lambda kept: kept),
    "function_of_a_list": (lambda psa, *more: lambda x: (psa, more)[0](x), lambda kept: kept),
    "named_tuple": (lambda psa: [Pair(psa, None)], lambda kept: kept[0].psa),
    "function_of_a_module": (
        lambda psa: (lambda m: lambda x: m(x))(Hidden(psa)),
        lambda kept: kept,
    ),
}


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("kind", FIXED)
def test_it_is_left_where_nothing_can_be_put_in_its_place(kind, inplace):
    keep, find = FIXED[kind]
    model = nn.Sequential(Shared(), nn.Conv2d(64, 16, 1), Holding(keep, find))
    with pytest.warns(UserWarning, match=r"left alone 1 .*2 holds it in kept too, where nothing"):
        fused = fuse(model, inplace=inplace)
    assert list(fused.fuse_report.left) == ["2.psa"] and type(fused[2].psa) is Shared
    model[2].psa = fuse(model[2].psa)
    vars(model[2])["kept"] = keep(model[2].psa)
    with pytest.warns(UserWarning, match=r"unfuse: left alone 2\.psa: 2 holds it in kept too"):
        plain = unfuse(model, inplace=inplace)
    assert type(plain[2].psa) is FusedAdoptedPSA


class WithHelper(Shared):
    """Its own methods, and those of its layers that know it, go when it is replaced."""

    def __init__(self):
        super().__init__()
        self.helper = self.mixed
        self.se_block.owner = (self.mixed,)

    def mixed(self, maps):
        return maps

    def forward(self, x):
        return self.helper(super().forward(x))


def test_what_it_holds_of_itself_does_not_matter():
    fused = without_warning(fuse, nn.Sequential(WithHelper()))
    assert list(fused.fuse_report.replaced) == ["0"]


# ---- compiled modules ----


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("kind", ("child", "list"))
def test_a_module_that_torch_compile_wraps_is_left(kind, inplace):
    """The wrapper keeps the call of the module that it was given."""
    model = nn.Sequential(Shared(), nn.Conv2d(64, 16, 1), Shared())
    wrapper = torch.compile(model[2], backend="eager")
    if kind == "child":
        model[2], name = wrapper, r"2\._orig_mod"
    else:
        model.fast, name = [wrapper], "2"
    with pytest.warns(UserWarning, match=rf"left alone 1 .*{name} \(torch\.compile wraps it"):
        fused = fuse(model, inplace=inplace)
    assert list(fused.fuse_report.replaced) == ["0"]


def test_a_model_that_torch_compile_wraps_is_fused():
    model = torch.compile(nn.Sequential(Shared()), backend="eager")
    assert list(without_warning(fuse, model).fuse_report.replaced) == ["_orig_mod.0"]


COMPILED = {
    "the_module": (lambda model: model[0], "0", True),
    "the_model": (lambda model: model, "Sequential", False),
    "a_layer": (lambda model: model[0].conv_branches[1], r"0\.conv_branches\.1", False),
}


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("kind", COMPILED)
def test_a_call_of_compile_that_is_lost_is_told(kind, inplace):
    part, name, replaced = COMPILED[kind]
    model = nn.Sequential(Shared())
    part(model).compile(backend="eager")
    for change in (fuse, unfuse):
        if replaced or not inplace:
            with pytest.warns(
                UserWarning, match=rf"{change.__name__}: compile\(\) was called on {name},"
            ):
                result = change(model, inplace=inplace)
            part(result).compile(backend="eager")
        else:
            result = without_warning(change, model, inplace=inplace)
        x = torch.randn(2, 16, 6, 5)
        assert relative_error(result(x), model(x)) < 1e-5
        assert type(result[0]) is (FusedAdoptedPSA if change is fuse else AdoptedPSA)
        model = result
