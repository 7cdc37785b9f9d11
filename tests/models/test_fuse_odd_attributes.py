"""fuse() of models with attributes that fail when they are read, or that only look like others."""

import copy
import os
import sys
import weakref
from collections import Counter, OrderedDict
from unittest import mock

import pytest
import torch
from support.fusing import without_warning
from support.lookalikes.parts import Shared, convolution, convolutions, squeeze
from support.paths import TESTS
from support.processes import run_code
from torch import nn

from epsa_fused import fuse, why_not_fused
from epsa_fused.modules.adopted import FusedAdoptedPSA


class RefusesReads(dict):
    def items(self):
        raise ValueError("not to be read")


class RefusesItsClass:
    @property
    def __class__(self):
        raise ValueError("of no class")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def dead_proxy():
    return weakref.proxy(nn.Identity())


ODD = {
    "proxy": lambda model: weakref.proxy(model),
    "proxy_in_a_list": lambda model: [weakref.proxy(model)],
    "dead_proxy": lambda model: dead_proxy(),
    "mock": lambda model: mock.Mock(spec=nn.Module),
    "refuses_reads": lambda model: RefusesReads(a=1),
    "refuses_its_class": lambda model: RefusesItsClass(),
    "deep_list": lambda model: nested(2000),
}


@pytest.mark.parametrize("where", ("model", "psa"))
@pytest.mark.parametrize("odd", ODD)
def test_odd_attributes_are_no_error(odd, where):
    model = nn.Sequential(Shared())
    plain = copy.deepcopy(model)
    holder = model if where == "model" else model[0]
    vars(holder)["odd"] = ODD[odd](model)
    with_psa = where == "psa"
    fused = fuse(model, inplace=True) if with_psa else without_warning(fuse, model, inplace=True)
    assert fused is model
    left = with_psa and model.fuse_report.left.keys() == {"0"}
    assert type(model[0]) is (Shared if left else FusedAdoptedPSA)
    x = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("depth", (40, 200))
def test_a_list_in_lists_is_replaced_or_named(depth):
    model = nn.Sequential(Shared())
    held = nested(depth)
    innermost = held
    while innermost[:1]:
        innermost = innermost[0]
    innermost.append(model[0])
    vars(model)["held"] = held
    if depth < 50:
        fused = without_warning(fuse, model, inplace=True)
        assert innermost == [fused[0]] and isinstance(fused[0], FusedAdoptedPSA)
    else:
        with pytest.warns(UserWarning, match="held too, where nothing can be put in its place"):
            fuse(model, inplace=True)
        assert type(model[0]) is Shared and innermost == [model[0]]


@pytest.mark.parametrize("kind", (dict, OrderedDict))
def test_dicts_keep_their_order(kind):
    model = nn.Sequential(Shared(), nn.ReLU())
    vars(model)["held"] = kind([("a", 1), (model[0], model[1]), ("b", model[0])])
    fused = without_warning(fuse, model)
    assert type(fused.held) is kind
    assert list(fused.held.items()) == [("a", 1), (fused[0], fused[1]), ("b", fused[0])]


def test_a_counter_is_left_as_it_is():
    """It counts what it is updated with, as classes of a user's own may do anything."""
    model = nn.Sequential(Shared())
    plain = model[0]
    vars(model)["uses"] = Counter({plain: 3, "other": 2})
    fuse(model, inplace=True)
    assert model.uses == {plain: 3, "other": 2}


# ---- what others read from the module ----


class Reader(nn.Module):
    """As YOLO's parsers do, it notes on each layer where its inputs come from."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(16, 16, 1), Shared()])
        for i, layer in enumerate(self.layers):
            layer.i, layer.f, layer.type = i, -1, type(layer).__name__

    def forward(self, x):
        y = []
        for layer in self.layers:
            assert layer.type in ("Conv2d", "Shared")
            x = layer(x if layer.f == -1 else y[layer.f])
            y.append(x)
            assert layer.i == len(y) - 1
        return x


def test_attributes_that_others_read_stay():
    model = Reader().double()
    fused = without_warning(fuse, model)
    assert isinstance(fused.layers[1], FusedAdoptedPSA)
    x = torch.randn(2, 16, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)
    again = copy.deepcopy(fused)
    assert (again.layers[1].i, again.layers[1].f, again.layers[1].type) == (1, -1, "Shared")


# ---- settings of SE networks, read in each call ----


class SE(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.net = squeeze()
        vars(self).update(settings)

    def forward(self, x):
        return self.net(x)


def test_an_se_that_holds_a_dead_proxy_can_be_called():
    plain = nn.Sequential(Shared(se=SE(owner=weakref.proxy(parent := nn.Identity())))).double()
    fused = fuse(plain, inplace=False)
    del parent
    with pytest.raises(ReferenceError):
        plain[0].se_block.owner.training  # noqa: B018 - the proxy is dead
    x = torch.randn(1, 16, 8, 8, dtype=torch.float64)
    assert isinstance(fused[0], FusedAdoptedPSA) and why_not_fused(fused[0]) is None
    torch.testing.assert_close(without_warning(fused, x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "change"),
    (
        ({"table": {"a": [1, 2]}}, lambda se: se.table["a"].append(3)),
        ({"table": [[1], [2]]}, lambda se: se.table[0].append(3)),
        ({"rate": float("nan")}, lambda se: setattr(se, "rate", 0.5)),
    ),
)
def test_settings_are_compared_by_value(settings, change):
    """torch.export puts equal containers in place of an SE's, and pickle another NaN."""
    fused = fuse(nn.Sequential(Shared(se=SE(**settings))))
    assert isinstance(fused[0], FusedAdoptedPSA)
    torch.export.export(fused, (torch.randn(1, 16, 8, 8),))
    vars(fused[0].se_block).update(copy.deepcopy(settings))
    if "rate" in settings:
        fused[0].se_block.rate = -float("nan")
    assert why_not_fused(fused[0]) is None
    change(fused[0].se_block)
    assert why_not_fused(fused[0]) == "se_block has other settings than when it was fused"


# ---- the trial's own-branches run ----


class OfOneSize(nn.Sequential):
    """A branch with a LayerNorm over maps of 14x14 alone."""

    def __init__(self, kernel, groups):
        super().__init__(convolution(kernel, groups), nn.LayerNorm([16, 14, 14]))


def test_branches_that_take_one_size_alone():
    branches = [OfOneSize(k, g) for k, g in zip((3, 5, 7, 9), (1, 2, 4, 8), strict=True)]
    model = nn.Sequential(Shared(branches)).double()
    fused = without_warning(fuse, model)
    x = torch.randn(2, 16, 14, 14, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)


IN_A_GROUP = """
import tempfile, warnings
import torch
from torch import nn
from support.lookalikes.parts import Shared, with_norm
from epsa_fused import fuse
with tempfile.NamedTemporaryFile() as file:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file.name}.group", rank=0, world_size=1
    )
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(Shared(with_norm())))
    warnings.simplefilter("error")
    fused = fuse(model)
    print(type(fused[0]).__name__, type(fused[0].conv_branches[0][1]).__name__)
    torch.distributed.destroy_process_group()
"""


def test_synchronised_batch_norms_in_a_process_group():
    """They take maps on a GPU alone, and wait for the other processes. A trial does neither."""
    paths = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    output = run_code(IN_A_GROUP, PYTHONPATH=paths)
    assert output.split()[-2:] == ["FusedAdoptedPSA", "SyncBatchNorm"]


def test_plain_convolutions_are_adopted():
    """Nothing of the above is left for another reason."""
    assert isinstance(fuse(nn.Sequential(Shared(convolutions())))[0], FusedAdoptedPSA)
