"""unfuse(): what it puts back and keeps, and that the plain model computes the same."""

import copy
import pickle
import warnings

import pytest
import torch
from support.lookalikes.parts import GROUPS, external_psa, published_psa
from support.tolerance import assert_near
from torch import nn
from torch.nn.utils import parametrizations

from epsa_fused import (
    FusedPSAModule,
    FusedSplitPSA,
    PSAModule,
    SplitPSA,
    epsanet50,
    fuse,
    prepack,
    unfuse,
    why_not_fused,
)

ROUNDING = 1e-12


class Wrapper(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def psa(**options):
    return FusedPSAModule(16, 64, conv_groups=GROUPS, **options).double()


def image(channels=16):
    return torch.randn(2, channels, 6, 5, dtype=torch.float64)


def unfused(model, inplace):
    """The plain model; `model` itself if in place."""
    plain = unfuse(model, inplace=inplace)
    assert (plain is model) == inplace
    return plain


ORIGINALS = {
    "reference": (lambda: PSAModule(16, 64, conv_groups=GROUPS), PSAModule, 16),
    "in_order": (lambda: PSAModule(16, 64, conv_groups=GROUPS, branch_order="forward"),
        PSAModule, 16),
    "stride": (lambda: PSAModule(16, 48, (3, 5, 7), 2, (1, 2, 4), reduction=5), PSAModule, 16),
    "published": (published_psa, PSAModule, 16),
    "external": (external_psa, SplitPSA, 64),
}  # fmt: skip


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("original", ORIGINALS)
def test_there_and_back(original, inplace):
    make, cls, channels = ORIGINALS[original]
    model = nn.Sequential(make()).double()
    fused = fuse(model)
    parameters = dict(fused.named_parameters())
    kind = type(fused[0])
    plain = unfused(fused, inplace)
    assert type(plain[0]) is cls and not hasattr(plain, "fuse_report")
    assert type(fused[0]) is (cls if inplace else kind)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert parameters.keys() == dict(plain.named_parameters()).keys()
    assert all(parameters[name] is p for name, p in plain.named_parameters())
    x = image(channels)
    assert_near(plain(x), model(x), ROUNDING)
    again = fuse(plain)
    assert type(again[0]) is kind
    assert_near(again(x), model(x), ROUNDING)


def test_training_one_trains_the_other():
    fused = nn.Sequential(psa())
    plain, x = unfuse(fused), image()
    before = fused(x).detach()
    plain(x).square().mean().backward()
    torch.optim.SGD(fused.parameters(), lr=1.0).step()
    assert not torch.allclose(fused(x), before)
    assert_near(plain(x), fused(x), ROUNDING)


def test_the_module_itself():
    module, x = psa().eval(), image()
    plain = unfuse(module)
    assert type(plain) is PSAModule and not plain.training
    assert_near(plain(x), module(x), ROUNDING)
    with pytest.raises(ValueError, match=r"unfuse: the model is itself a PSA module"):
        unfuse(module, inplace=True)


def test_a_network():
    model, x = epsanet50(num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    plain = unfuse(model)
    kinds = [type(m) for m in plain.modules()]
    assert kinds.count(PSAModule) == 16 and FusedPSAModule not in kinds
    with torch.no_grad():
        assert_near(plain(x), model(x), 1e-5)


@pytest.mark.parametrize("inplace", (False, True))
def test_hooks_and_their_handles_stay(inplace):
    model, x = nn.Sequential(psa()), image()
    calls = []
    handles = [
        model[0].register_forward_hook(lambda m, x, y: calls.append(type(m))),
        model[0].conv_2.register_forward_hook(lambda m, x, y: calls.append(type(m))),
    ]
    plain = unfused(model, inplace)
    plain(x)
    assert calls == [nn.Conv2d, PSAModule]
    if inplace:
        for handle in handles:
            handle.remove()
        plain(x)
        assert len(calls) == 2


def test_changed_layers_stay():
    model, x = nn.Sequential(psa()), image()
    model[0].se.fc1 = Wrapper(model[0].se.fc1)
    parametrizations.weight_norm(model[0].conv_2)
    plain = unfuse(model)
    with pytest.warns(UserWarning, match=r"se\.fc1 is a Wrapper"):
        expected = model(x)
    assert_near(plain(x), expected, ROUNDING)


def test_what_only_the_fused_module_has_is_dropped():
    model = nn.Sequential(psa(save_output=True).float()).eval()
    x = image().float()
    prepack(model, x)
    model[0].note = "kept"
    plain = unfuse(model)
    assert vars(plain[0]).keys() == vars(PSAModule(16, 64, conv_groups=GROUPS)).keys() | {"note"}
    assert "prepacked" in repr(model) and "prepacked" not in repr(plain)
    assert_near(pickle.loads(pickle.dumps(plain))(x), model(x), 1e-5)


def test_the_setting_of_winograds_method_is_kept():
    model = nn.Sequential(psa(winograd=False), psa())
    plain = unfuse(model)
    assert [m.winograd for m in fuse(plain)] == [False, None]
    assert not hasattr(plain[1], "winograd")


def test_a_module_at_two_places_stays_one():
    module = FusedPSAModule(64, 64).double()
    plain = unfuse(nn.Sequential(module, nn.Sequential(module)))
    assert type(plain[0]) is PSAModule and plain[0] is plain[1][0]


def test_the_old_module_keeps_its_layers():
    model = nn.Sequential(psa())
    old = model[0]
    unfuse(model, inplace=True)
    layer = old.conv_1
    model[0].conv_1 = nn.Identity()
    assert old.conv_1 is layer


class Subclass(FusedPSAModule):
    pass


def patched():
    module = psa()
    module.forward = lambda x: x
    return module


def patched_attention():
    module = psa()
    module.attention = lambda feats: feats[0]
    return module


@pytest.mark.parametrize(
    "make", (lambda: Subclass(16, 64, conv_groups=GROUPS), patched, patched_attention)
)
def test_what_may_compute_something_else_is_left_alone(make):
    model = nn.Sequential(make(), psa())
    with pytest.warns(UserWarning, match=r"unfuse: left alone 0, of a subclass or with methods"):
        plain = unfuse(model)
    assert type(plain[0]) is type(model[0]) and type(plain[1]) is PSAModule


def test_nothing_to_unfuse():
    model = nn.Sequential(nn.ReLU())
    with pytest.warns(UserWarning, match=r"unfuse: Sequential has no fused module"):
        plain = unfuse(model)
    assert type(plain[0]) is nn.ReLU


REFUSED = {
    "state_dict": lambda m: m.register_state_dict_post_hook(lambda *args: None),
    "load": lambda m: m.register_load_state_dict_post_hook(lambda *args: None),
    "old_backward": lambda m: m.register_backward_hook(lambda *args: None),
}


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("hook", REFUSED)
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_hooks_that_cannot_be_kept_are_an_error(hook, inplace):
    model = nn.Sequential(psa(), psa())
    REFUSED[hook](model[1])
    with pytest.raises(RuntimeError, match=r"unfuse: 1 has hooks in _.*Nothing was changed"):
        unfuse(model, inplace=inplace)
    assert [type(m) for m in model] == [FusedPSAModule] * 2


def test_other_things_are_refused():
    with pytest.raises(TypeError, match=r"unfuse: model: expected a torch\.nn\.Module, got .*dict"):
        unfuse({})
    hooked = nn.Sequential(psa())
    hooked[0].kept = hooked[0](image()) * 1
    with pytest.raises(RuntimeError, match=r"unfuse: Sequential cannot be copied.*inplace"):
        unfuse(hooked)


def test_split_psa_alone():
    """It is the reference of the fused one, and shows its order."""
    theirs = external_psa(branches=3).double()
    plain = SplitPSA(theirs.convs, theirs.se_blocks, branch_order="reversed")
    fused = FusedSplitPSA(theirs.convs, theirs.se_blocks, branch_order="reversed")
    x = image(48)
    assert why_not_fused(fused) is None and "branch_order='reversed'" in repr(plain)
    assert_near(fused(x), plain(x), ROUNDING)
    expected = torch.cat(theirs(x).chunk(3, 1)[::-1], 1)
    assert_near(plain(x), expected, ROUNDING)
    with pytest.raises(ValueError, match=r"branch_order: expected one of"):
        SplitPSA(theirs.convs, theirs.se_blocks, branch_order="other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(plain)(x)
