"""EPSANet: against the published figures and the published code, its checkpoints, its feature
pyramid, and as torchvision uses it."""

import copy
import io
import re

import pytest
import torch
from support import published
from support.networks import on_meta, psa_modules, tiny, unchanged
from support.optional import optional
from support.tolerance import assert_near
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from epsa_fused import (
    EPSABlock,
    EPSANet,
    FusedPSAModule,
    PSAModule,
    epsanet50,
    epsanet50_large,
    epsanet101,
)
from epsa_fused.models import FIGURES as REGISTERED
from epsa_fused.models import MODELS

# Parameters; multiply-adds at 224x224 of the convolutions (without the SE's) and the classifier;
# both as the paper gives them, in millions and billions.
FIGURES = {
    MODELS[name]: (
        figures.parameters,
        figures.multiply_adds,
        figures.published_parameters,
        figures.published_multiply_adds,
    )
    for name, figures in REGISTERED.items()
}


# ---- the published figures ----


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "plain"))
@pytest.mark.parametrize("build", FIGURES, ids=lambda build: build.__name__)
def test_parameters_and_multiply_adds(build, fused):
    parameters, multiply_adds, published_millions, published_billions = FIGURES[build]
    model = on_meta(build, fused=fused)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(parameters / 1e6, 2) == published_millions
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    # each SE runs two matrices of channels x hidden on every branch
    se = sum(2 * m.branches * m.se.fc1.weight.numel() for m in psa_modules(model))
    assert counter.get_total_flops() == 2 * (multiply_adds + se)
    # the paper's count is 0.5% to 0.6% larger and does not say why
    assert 0.993 < multiply_adds / 1e9 / published_billions < 1


@pytest.mark.parametrize("build", FIGURES, ids=lambda build: build.__name__)
@pytest.mark.parametrize(("fused", "expected"), ((True, FusedPSAModule), (False, PSAModule)))
def test_fused_chooses_the_module(build, fused, expected):
    modules = psa_modules(on_meta(build, fused=fused))
    assert modules and {type(m) for m in modules} == {expected}
    assert len(modules) == (16 if "50" in build.__name__ else 33)


def test_fused_is_the_default():
    assert {type(m) for m in psa_modules(on_meta(epsanet50))} == {FusedPSAModule}


# ---- the published code ----


@pytest.mark.parametrize(
    ("fused", "theirs"), ((epsanet50, published.epsanet50), (epsanet101, published.epsanet101))
)
def test_the_keys_are_the_published_ones(fused, theirs):
    expected = {k: v.shape for k, v in on_meta(theirs).state_dict().items()}
    actual = {k: v.shape for k, v in on_meta(fused).state_dict().items()}
    assert list(actual.items()) == list(expected.items())
    assert "layer1.0.conv2.conv_1.weight" in actual and "layer4.2.conv2.se.fc2.bias" in actual


def test_one_seed_gives_the_published_weights():
    """The same layers are made in the same order, and initialised alike."""
    torch.manual_seed(1)
    expected = published.epsanet50().state_dict()
    torch.manual_seed(1)
    actual = epsanet50().state_dict()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


@pytest.fixture(scope="module")
def pair():
    """The published EPSANet-50 and the fused one, of the same weights, in float64."""
    torch.manual_seed(0)
    theirs = published.epsanet50().double()
    fused = epsanet50().double()
    fused.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, fused


def test_evaluation_gives_what_the_published_code_gives(pair):
    theirs, fused = pair
    x = torch.randn(2, 3, 64, 80, dtype=torch.float64)
    with torch.no_grad():
        assert_near(fused.eval()(x), theirs.eval()(x))


def test_training_gives_what_the_published_code_gives(pair):
    """Output, statistics of the BatchNorms, and all gradients as one vector."""
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    results = []
    for model in map(copy.deepcopy, pair):
        out = model.train()(x)
        out.square().mean().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((out.detach(), grads, model.layer4[2].bn3.running_var))
    for expected, actual in zip(*results, strict=True):
        assert_near(actual, expected)


# ---- checkpoints ----


def through_a_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.mark.parametrize("parallel", (False, True), ids=("plain", "DataParallel"))
def test_published_checkpoints_load(parallel):
    theirs = published.epsanet50()
    checkpoint = through_a_file(
        {
            "arch": "epsanet50",
            "state_dict": (nn.DataParallel(theirs) if parallel else theirs).state_dict(),
        }
    )["state_dict"]
    keys, metadata = list(checkpoint), list(checkpoint._metadata)
    assert all(k.startswith("module.") == parallel for k in keys)
    model = epsanet50()
    result = model.load_state_dict(checkpoint, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert unchanged(model, theirs.state_dict())
    # the caller's checkpoint is as it was
    assert (list(checkpoint), list(checkpoint._metadata)) == (keys, metadata)


def test_a_checkpoint_from_before_num_batches_tracked_loads():
    """nn.BatchNorm2d fills that in, for state_dicts without metadata."""
    model, other = tiny(), tiny()
    old = {k: v for k, v in other.state_dict().items() if not k.endswith("num_batches_tracked")}
    model.load_state_dict(old, strict=True)
    assert torch.equal(model.conv1.weight, other.conv1.weight)


class Frozen(nn.Module):
    """The state of torchvision's FrozenBatchNorm2d, which drops the key that it lacks."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(channels))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_a_checkpoint_loads_into_frozen_normalisations():
    model, other = tiny(norm_layer=Frozen), tiny()
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(model.layer1[0].bn1.weight, other.layer1[0].bn1.weight)


WRONG = {
    "depth": (lambda: on_meta(epsanet101), epsanet50,
        r"425 unexpected: layer3\.6\.conv1\.weight \[256, 1024, 1, 1\], .* and 421 more$"),
    "size": (lambda: on_meta(epsanet50_large), epsanet50,
        r"of another shape: layer1\.0\.conv1\.weight \[128, 64, 1, 1\], expected \[64, 64, 1, 1\]"),
    "missing": (lambda: on_meta(epsanet50), epsanet101,
        r"missing: layer3\.6\.conv1\.weight \[256, 1024, 1, 1\], "),
    "classes": (lambda: on_meta(epsanet50, num_classes=10), epsanet50,
        r"2 of another shape: fc\.weight \[10, 2048\], expected \[1000, 2048\], "
        r"fc\.bias \[10\], expected \[1000\]$"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_checkpoint_of_another_architecture_is_refused_and_nothing_loaded(wrong):
    other, build, message = WRONG[wrong]
    model = build()
    before = copy.deepcopy(model.state_dict())
    state = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in other().state_dict().items()}
    with pytest.raises(RuntimeError, match=message) as error:
        model.load_state_dict(state, strict=True)
    assert "does not fit this architecture, nothing was loaded" in str(error.value)
    assert unchanged(model, before)


UNCOPYABLE = {
    "meta": (lambda t: t.to("meta"), r"without data \(on meta\)"),
    "sparse": (torch.Tensor.to_sparse, r"sparse_coo, expected torch\.float32 in torch\.strided"),
    "mkldnn": (torch.Tensor.to_mkldnn, r"_mkldnn, expected torch\.float32"),
    "quantized": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        r"quantized, expected torch\.float32",
    ),
    "complex": (lambda t: t.to(torch.complex64), r"torch\.complex64, expected torch\.float32"),
    "integers": (torch.Tensor.int, r"torch\.int32, expected torch\.float32"),
    "bool": (torch.Tensor.bool, r"torch\.bool, expected torch\.float32"),
    "fake": (lambda t: FakeTensorMode().from_tensor(t), r"that cannot be copied \(FakeTensor: "),
}


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*:UserWarning")
@pytest.mark.parametrize("kind", UNCOPYABLE)
@pytest.mark.parametrize("options", ({}, {"strict": False}), ids=("strict", "not_strict"))
def test_a_value_that_cannot_be_copied_is_refused_and_nothing_loaded(kind, options):
    change, message = UNCOPYABLE[kind]
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    state = {k: torch.zeros_like(v) for k, v in before.items()}
    last = "fc.weight"
    state[last] = change(state[last])
    with pytest.raises(RuntimeError, match=rf"1 of another kind: fc\.weight {message}") as error:
        model.load_state_dict(state, **options)
    assert "nothing was loaded" in str(error.value)
    assert unchanged(model, before)


def test_a_float_count_of_batches_is_refused():
    model = tiny()
    state = model.state_dict() | {"bn1.num_batches_tracked": torch.tensor(3.5)}
    with pytest.raises(RuntimeError, match=r"bn1\.num_batches_tracked torch\.float32, expected"):
        model.load_state_dict(state)


def test_a_nested_value_is_of_another_shape():
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    nested = torch.nested.as_nested_tensor([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(RuntimeError, match=r"of another shape: fc\.bias Tensor, expected \[10\]"):
        model.load_state_dict(before | {"fc.bias": nested})
    assert unchanged(model, before)


def test_a_key_that_is_no_string_is_named():
    with pytest.raises(TypeError, match=r"expected strings as keys of the state_dict, got 3, "):
        tiny().load_state_dict({3: torch.zeros(1)})


def test_other_floating_types_are_taken():
    model, other = tiny(), tiny()
    model.load_state_dict(
        {k: v.half() if v.is_floating_point() else v for k, v in other.state_dict().items()}
    )
    assert torch.equal(model.fc.weight, other.fc.weight.half().float())


def test_a_whole_training_checkpoint_says_what_to_load():
    model = tiny()
    checkpoint = {"epoch": 3, "state_dict": model.state_dict()}
    with pytest.raises(RuntimeError, match=r'epoch int.*load its entry "state_dict"$'):
        model.load_state_dict(checkpoint)


def test_without_strict_keys_may_differ_and_shapes_not():
    model, other = tiny(), tiny(num_classes=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"2 of another shape: fc\.weight \[3, 256\]"):
        model.load_state_dict(other.state_dict(), strict=False)
    assert unchanged(model, before)
    backbone = {k: v for k, v in other.state_dict().items() if not k.startswith("fc.")}
    result = model.load_state_dict(backbone | {"extra": torch.ones(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["fc.weight", "fc.bias"], ["extra"])
    assert torch.equal(model.conv1.weight, other.conv1.weight)
    with pytest.raises(RuntimeError, match=r"2 missing: fc\.weight .*; 1 unexpected: extra \[1\]$"):
        model.load_state_dict(backbone | {"extra": torch.ones(1)})


def test_hooks_may_convert_a_checkpoint():
    """weight_norm converts its predecessor's keys like this."""
    model, state = tiny(), tiny().state_dict()
    state["head.weight"] = state.pop("fc.weight")

    def rename(module, state_dict, prefix, *args):
        state_dict["fc.weight"] = state_dict.pop("head.weight")

    model.register_load_state_dict_pre_hook(rename)
    model.load_state_dict(state)
    assert torch.equal(model.fc.weight, state["head.weight"])


def test_a_path_is_no_state_dict():
    with pytest.raises(TypeError, match=r"state_dict to be dict-like"):
        tiny().load_state_dict("epsanet50.pth")


def test_assign_takes_the_tensors_themselves():
    model, state = on_meta(tiny), tiny().state_dict()
    model.load_state_dict(state, assign=True)
    assert model.conv1.weight.data_ptr() == state["conv1.weight"].data_ptr()


# ---- the classifier, the image's channels, dropout, normalisation ----


@pytest.mark.parametrize("in_chans", (1, 4))
def test_in_chans(in_chans):
    assert tiny(in_chans=in_chans)(torch.randn(2, in_chans, 32, 32)).shape == (2, 10)


def test_no_classes_give_the_pooled_features():
    model = tiny(num_classes=0).eval()
    x = torch.randn(2, 3, 32, 32)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(x), model.forward_features(x).mean((2, 3)))


def test_the_head_is_the_pool_and_the_classifier():
    model = tiny().eval()
    x = torch.randn(2, 3, 32, 32)
    maps = model.forward_features(x)
    pooled = model.forward_head(maps, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(model(x), model.get_classifier()(pooled))
    assert torch.equal(model(x), model.forward_head(maps))


def test_a_new_classifier():
    model = tiny().double()
    model.reset_classifier(3)
    assert model.num_classes == 3 and model(torch.randn(2, 3, 32, 32).double()).shape == (2, 3)
    model.reset_classifier(0, "avg")
    assert model.num_classes == 0 and isinstance(model.fc, nn.Identity)
    model.reset_classifier(7)
    assert model.fc.weight.shape == (7, 256) and model.fc.weight.dtype == torch.float64
    assert model.to("meta").reset_classifier(2) is None and model.fc.weight.device.type == "meta"


@pytest.mark.parametrize(
    ("args", "error", "message"),
    (
        ((-1,), ValueError, r"num_classes: expected at least 0, got -1"),
        ((1.5,), TypeError, r"num_classes: expected an int, got 1\.5"),
        ((3, "mean"), ValueError, r"global_pool: expected one of .*, got 'mean'"),
        ((3, ""), ValueError, r"global_pool: expected 'avg' or 'max' before a classifier, got ''"),
    ),
)
def test_a_refused_classifier_leaves_the_old_one(args, error, message):
    model = tiny()
    fc = model.fc
    with pytest.raises(error, match=message):
        model.reset_classifier(*args)
    assert model.fc is fc and model.num_classes == 10


def test_dropout_acts_in_training_alone():
    model = tiny(drop_rate=0.5)
    maps = model.forward_features(torch.randn(4, 3, 32, 32)).detach().abs() + 1
    dropped = (model.forward_head(maps, pre_logits=True) == 0).float().mean()
    assert 0.3 < dropped < 0.7
    assert (model.eval().forward_head(maps, pre_logits=True) != 0).all()


def test_another_normalisation():
    model = tiny(norm_layer=lambda channels: nn.GroupNorm(4, channels))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"in_chans": 0}, ValueError, r"in_chans: expected at least 1, got 0"),
        ({"in_chans": 3.0}, TypeError, r"in_chans: expected an int, got 3\.0"),
        ({"num_classes": -1}, ValueError, r"num_classes: expected at least 0, got -1"),
        ({"drop_rate": 1.0}, ValueError, r"drop_rate: expected a number in \[0, 1\), got 1\.0"),
        ({"layers": (3, 4, 6)}, ValueError, r"layers: expected one number for each of 4 stages"),
        ({"layers": (3, 0, 6, 3)}, ValueError, r"layers\[1\]: expected at least 1, got 0"),
        ({"planes": (64,)}, ValueError, r"planes: expected one number for each of 4 stages"),
        ({"expansion": 0}, ValueError, r"expansion: expected at least 1, got 0"),
        ({"conv_kernels": (3, 5)}, ValueError, r"conv_kernels and conv_groups: expected equal"),
        ({"drop_path_rate": -0.1}, ValueError, r"drop_path_rate: expected a number in \[0, 1\), "),
        ({"drop_path_rate": None}, TypeError, r"drop_path_rate: expected a number, got None"),
        ({"act_layer": "relu"}, TypeError, r"act_layer: expected a callable .*, got 'relu'"),
        (
            {"global_pool": "avgmax"},
            ValueError,
            r"global_pool: expected one of \('avg', 'max', ''\)",
        ),
        ({"global_pool": ["avg"]}, ValueError, r"global_pool: expected one of .*, got \['avg'\]"),
        ({"global_pool": ""}, ValueError, r"global_pool: expected 'avg' or 'max' before a class"),
        ({"output_stride": 7}, ValueError, r"output_stride: expected one of \(8, 16, 32\), got 7"),
        ({"output_stride": 8.0}, TypeError, r"output_stride: expected an int, got 8\.0"),
        ({"reduction": 32}, ValueError, r"reduction: expected at most planes // branches = 16, "),
        ({"aa_layer": None}, TypeError, r"unexpected keyword argument 'aa_layer'"),
    ),
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_networks_that_cannot_be_built(options, error, message):
    with pytest.raises(error, match=message):
        EPSANet(**({"layers": (1, 1, 1, 1)} | options))


def test_a_block_alone():
    block = EPSABlock(256, 64)
    assert block(torch.randn(2, 256, 8, 8)).shape == (2, 256, 8, 8)


# ---- the feature pyramid ----


@pytest.mark.parametrize("size", ((64, 64), (97, 65), (33, 130)))
def test_the_pyramid(size):
    model = tiny()
    maps = model.forward_pyramid(torch.randn(2, 3, *size))
    assert list(maps) == ["0", "1", "2", "3"]
    assert model.pyramid_channels == (128, 128, 128, 256)
    assert model.pyramid_strides == (4, 8, 16, 32)
    for i, out in enumerate(maps.values()):
        stride = model.pyramid_strides[i]
        expected = [-(-side // stride) for side in size]
        assert out.shape == (2, model.pyramid_channels[i], *expected)


def test_the_pyramids_of_the_published_models():
    for build in FIGURES:
        assert on_meta(build).pyramid_channels == (256, 512, 1024, 2048)


def test_feature_info_describes_what_its_modules_give():
    model, seen = tiny(), {}
    for name in (info["module"] for info in model.feature_info):

        def record(module, x, y, name=name):
            seen.setdefault(name, y.shape)

        model.get_submodule(name).register_forward_hook(record)
    model(torch.randn(1, 3, 64, 64))
    for info in model.feature_info:
        side = 64 // info["reduction"]
        assert seen[info["module"]] == (1, info["num_chs"], side, side)
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]


def test_torchvisions_fpn():
    ops = optional("torchvision.ops")
    model = tiny()
    fpn = ops.FeaturePyramidNetwork(list(model.pyramid_channels), 24)
    maps = fpn(model.forward_pyramid(torch.randn(2, 3, 64, 64)))
    assert [tuple(m.shape) for m in maps.values()] == [(2, 24, s, s) for s in (16, 8, 4, 2)]


def test_a_torchvision_detector():
    """Its backbone helper runs the model's children in their order."""
    backbones = optional("torchvision.models.detection.backbone_utils")
    model = tiny().eval()
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = backbones.BackboneWithFPN(model, layers, list(model.pyramid_channels), 24).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_pyramid(x)
    for name, actual in backbone.body(x).items():
        assert torch.equal(actual, expected[name])
    assert list(backbone(x)) == ["0", "1", "2", "3", "pool"]


def test_the_docstrings_give_the_figures():
    for build, (parameters, multiply_adds, _, _) in FIGURES.items():
        millions, billions = re.search(r"([\d.]+) M param.*?([\d.]+) G", build.__doc__).groups()
        assert (millions, billions) == (f"{parameters / 1e6:.2f}", f"{multiply_adds / 1e9:.2f}")
