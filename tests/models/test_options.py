"""EPSANet's options: stochastic depth, activations, poolings, output stride, narrow networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.networks import NARROW, narrow, on_meta, psa_modules
from support.tolerance import assert_near
from torch import nn

from epsa_fused import EPSABlock, FusedPSAModule, PSAModule, epsanet50, fuse
from epsa_fused.models import small_epsanet


def blocks(model):
    return [m for m in model.modules() if isinstance(m, EPSABlock)]


# ---- stochastic depth ----


def test_the_drop_path_rate_grows_linearly():
    rates = [block.drop_path_rate for block in blocks(narrow((1, 2, 3, 2), drop_path_rate=0.35))]
    assert rates == pytest.approx([0.05 * i for i in range(8)])
    assert "drop_path_rate=0.35" in repr(narrow(drop_path_rate=0.35))


def test_drop_path_leaves_samples_with_their_shortcut_alone():
    options = {"conv_groups": (1, 1, 1, 1), "reduction": 1, "expansion": 1}
    no_norm = {"norm_layer": lambda channels: nn.Identity(), "act_layer": nn.Identity}
    block = EPSABlock(8, 8, drop_path_rate=0.25, **options, **no_norm)
    x = torch.randn(400, 8, 3, 3)
    with torch.no_grad():
        residual = block.eval()(x) - x
        dropped = block.train()(x) - x
    kept = dropped.flatten(1).any(1)
    assert 0.68 < kept.float().mean() < 0.82
    assert torch.allclose(dropped[kept], residual[kept] / 0.75, atol=1e-5)


# ---- activations ----


def test_another_activation():
    model, relu = narrow(act_layer=nn.SiLU).eval(), narrow().eval()
    relu.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    other = model(x)
    assert not torch.allclose(other, relu(x))
    # the SEs keep their ReLUs
    inside = {id(m) for psa in psa_modules(relu) for m in psa.modules()}
    for name, module in list(relu.named_modules()):
        if isinstance(module, nn.ReLU) and id(module) not in inside:
            relu.set_submodule(name, nn.SiLU())
    assert torch.equal(other, relu(x))


# ---- pooling ----


@pytest.mark.parametrize(
    ("pool", "expected"),
    (("avg", lambda x: x.mean((2, 3))), ("max", lambda x: x.amax((2, 3))), ("", lambda x: x)),
)
def test_the_global_pool(pool, expected):
    model = narrow(global_pool=pool, num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    maps = model.forward_features(x)
    assert torch.equal(model(x), expected(maps))
    other = narrow().eval()
    other.load_state_dict(model.state_dict(), strict=False)
    other.reset_classifier(0, pool)
    assert torch.equal(other(x), model(x)) and other.global_pool == pool
    assert not any(m.training for m in other.modules())
    assert model.head_hidden_size == model.num_features == 128


def test_a_new_classifier_keeps_the_pool():
    model = narrow(global_pool="max").eval()
    model.reset_classifier(3)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), model.fc(model.forward_features(x).amax((2, 3))))
    model.reset_classifier(0, "")
    with pytest.raises(ValueError, match=r"global_pool: expected 'avg' or 'max' before"):
        model.reset_classifier(3)
    assert model.global_pool == "" and model.num_classes == 0
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)


# ---- the output stride ----


@pytest.mark.parametrize(
    ("stride", "strides", "dilations"),
    (
        (32, (4, 8, 16, 32), (1, 1, 1, 1, 1, 1)),
        (16, (4, 8, 16, 16), (1, 1, 1, 1, 1, 2)),
        (8, (4, 8, 8, 8), (1, 1, 1, 2, 2, 4)),
    ),
)
def test_the_output_stride(stride, strides, dilations):
    """A stage's first block sees the maps before it, and has their dilation."""
    model = narrow((1, 1, 2, 2), output_stride=stride)
    assert tuple(psa.conv_4.dilation[0] for psa in psa_modules(model)) == dilations
    assert model.pyramid_strides == strides
    assert [info["reduction"] for info in model.feature_info] == [2, *strides]
    for out, expected in zip(
        model.forward_pyramid(torch.randn(1, 3, 64, 96)).values(), strides, strict=True
    ):
        assert out.shape[2:] == (64 // expected, 96 // expected)
    assert model.state_dict().keys() == narrow((1, 1, 2, 2)).state_dict().keys()


@pytest.mark.parametrize("stride", (8, 16))
def test_a_dilated_network_computes_what_the_strided_one_does_in_between(stride):
    """Every other pixel of its maps is that of the strided network, if the SE weigh nothing."""
    model = narrow((1, 1, 2, 2), output_stride=stride).double().eval()
    for psa in psa_modules(model):
        nn.init.zeros_(psa.se.fc2.weight)
    strided = narrow((1, 1, 2, 2)).double().eval()
    strided.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 128, 96, dtype=torch.float64)
    with torch.no_grad():
        dense, expected = model.forward_features(x), strided.forward_features(x)
    step = 32 // stride
    assert dense.shape[2:] == (128 // stride, 96 // stride)
    assert_near(dense[..., ::step, ::step], expected)


def test_a_dilated_network_fused_and_plain():
    fused = narrow(output_stride=8).double()
    plain = narrow(output_stride=8, fused=False).double()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for model in (plain, fused):
        out = model(x)
        out.square().sum().backward()
        results.append((out, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for expected, actual in zip(*results, strict=True):
        assert_near(actual, expected)


def test_a_dilated_plain_network_is_fused():
    model = fuse(narrow(output_stride=8, fused=False))
    assert len(model.fuse_report.replaced) == 6 and not model.fuse_report.left


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("kind", (PSAModule, FusedPSAModule))
def test_a_dilated_module(kind, stride):
    psa = kind(16, 16, (3, 5), stride, (1, 2), reduction=4, dilation=3).double()
    x = torch.randn(2, 16, 9, 12, dtype=torch.float64)
    feats = [
        F.conv2d(x, conv.weight, None, stride, 3 * (k // 2), 3, groups)
        for conv, k, groups in ((psa.conv_1, 3, 1), (psa.conv_2, 5, 2))
    ]
    assert_near(psa(x), PSAModule.attention(psa, feats))


def test_a_wrong_dilation():
    with pytest.raises(ValueError, match=r"dilation: expected at least 1, got 0"):
        FusedPSAModule(64, 64, dilation=0)


# ---- narrow networks ----


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "plain"))
def test_narrow_networks(fused):
    model = epsanet50(10, fused=fused, **NARROW)
    assert sum(p.numel() for p in model.parameters()) < 250_000
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_narrow_network_needs_fewer_groups():
    with pytest.raises(ValueError, match=r"conv_groups\[3\]: expected a divisor of .* 8, got 16"):
        on_meta(epsanet50, planes=(32, 64, 128, 256), reduction=8)


def test_a_narrow_small_network():
    model = small_epsanet(10, planes=(16, 32), conv_groups=(1, 1, 2, 4), reduction=4)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


# ---- networks of an older version ----


def test_a_network_without_the_newer_attributes():
    """Pickles of an older version have none of them."""
    model, old = narrow().eval(), narrow().eval()
    old.load_state_dict(model.state_dict())
    for name in ("global_pool", "grad_checkpointing", "pyramid_strides"):
        old.__dict__.pop(name, None)
    for block in blocks(old):
        del block.drop_path_rate
        assert not block.grad_checkpointing
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy.deepcopy(old)(x), model(x)) and old.pyramid_strides[3] == 32
    old.reset_classifier(3, "max")
    assert old.train()(x).shape == (2, 3)


@pytest.mark.parametrize(
    ("act_layer", "words"),
    (
        (nn.SiLU(), "got an object of type torch.nn.modules.activation.SiLU"),
        ("silu", "got 'silu'"),
        (torch.relu, "got an object of type"),
        (nn.Linear, "missing 2 required positional arguments"),
        (lambda: 3, "got one that returns 3"),
    ),
)
def test_an_activation_that_is_none(act_layer, words):
    expected = "act_layer: expected a callable without arguments that returns a torch.nn.Module, "
    with pytest.raises(TypeError) as error:
        narrow(act_layer=act_layer)
    assert str(error.value).startswith(expected) and words in str(error.value)
