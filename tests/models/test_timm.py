"""EPSANet as a model of timm: what timm's own tests ask of each of its models, and more."""

from functools import partial

import pytest
import torch
from support import published
from support.networks import NARROW, on_meta, psa_modules, unchanged
from support.optional import optional
from support.paths import ROOT
from support.processes import python, run_code
from torch import nn

import epsa_fused
from epsa_fused import EPSABlock, FusedPSAModule, PSAModule
from epsa_fused.models import FIGURES


@pytest.fixture
def timm():
    module = optional("timm")
    epsa_fused.register_timm()
    return module


@pytest.fixture
def create(timm):
    def create(**options):
        return timm.create_model("epsanet50", **(NARROW | options))

    return create


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


# ---- the registry ----


def test_importing_the_package_does_not_import_timm():
    assert run_code("import sys, epsa_fused; print('timm' in sys.modules)").strip() == "False"


def test_timm_has_the_models(timm):
    assert set(timm.list_models("epsanet*")) == set(FIGURES)
    epsa_fused.register_timm()  # a second call changes nothing
    for name, figures in FIGURES.items():
        model = on_meta(timm.create_model, model_name=name)
        assert sum(p.numel() for p in model.parameters()) == figures.parameters
        assert {type(m) for m in psa_modules(model)} == {FusedPSAModule}


@pytest.mark.parametrize("name", FIGURES)
def test_the_default_config(timm, name):
    """It says what the model is: timm's test_model_default_cfgs, by shapes alone."""
    model = on_meta(timm.create_model, model_name=name).eval()
    config = model.default_cfg
    assert config["architecture"] == name and config["num_classes"] == model.num_classes
    keys = model.state_dict().keys()
    assert f"{config['classifier']}.weight" in keys and f"{config['first_conv']}.weight" in keys
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    x = torch.empty(2, *config["input_size"], device="meta")
    maps = (2, model.num_features, *config["pool_size"])
    assert model.forward_features(x).shape == maps
    model.reset_classifier(0)
    assert model(x).shape == model.forward_head(model.forward_features(x), True).shape
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(x).shape == maps
    without = on_meta(timm.create_model, model_name=name, num_classes=0, global_pool="").eval()
    assert without(x).shape == maps
    assert not any(key.startswith(config["classifier"]) for key in without.state_dict())


def test_timm_creates_what_it_is_asked_for(timm, create):
    model = create(num_classes=7, in_chans=1, drop_rate=0.2, drop_path_rate=0.3, fused=False)
    assert model.drop_rate == 0.2 and {type(m) for m in psa_modules(model)} == {PSAModule}
    assert model.layer4[-1].drop_path_rate == 0.3
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.485, 0.456, 0.406)


def test_layers_by_timms_names(create, images):
    model = create(act_layer="silu", norm_layer="groupnorm1")
    assert isinstance(model.relu, nn.SiLU) and isinstance(model.bn1, nn.GroupNorm)
    assert model(images).shape == (2, 1000)
    assert isinstance(create(act_layer=nn.Mish).layer1[0].relu, nn.Mish)
    groups = partial(nn.GroupNorm, 8)  # a partial keeps its arguments
    assert create(norm_layer=groups).bn1.num_groups == 8
    for argument in ("act_layer", "norm_layer"):
        words = f"{argument}: expected a layer or timm's name of one, got 'foo'"
        with pytest.raises(ValueError, match=words):
            create(**{argument: "foo"})


def test_a_device_and_a_dtype(create):
    model = create(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert create(dtype=torch.float64).fc.weight.dtype == torch.float64


def test_timm_loads_a_published_checkpoint(timm, tmp_path):
    theirs = published.epsanet50()
    torch.save(
        {"state_dict": nn.DataParallel(theirs).state_dict()}, tmp_path / "checkpoint.pth.tar"
    )
    path = str(tmp_path / "checkpoint.pth.tar")
    assert unchanged(timm.create_model("epsanet50", checkpoint_path=path), theirs.state_dict())
    overlay = {"file": path}
    model = timm.create_model("epsanet50", True, pretrained_cfg_overlay=overlay, num_classes=5)
    assert torch.equal(model.conv1.weight, theirs.conv1.weight) and model.fc.out_features == 5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"aa_layer": nn.AvgPool2d}, TypeError, r"unexpected keyword argument 'aa_layer'"),
        ({"pretrained": True}, RuntimeError, r"No pretrained weights exist for epsanet50"),
        ({"output_stride": 7}, ValueError, r"output_stride: expected one of \(8, 16, 32\), got 7"),
        ({"global_pool": "fast"}, ValueError, r"global_pool: expected one of .*, got 'fast'"),
    ),
    ids=("unknown", "pretrained", "stride", "pool"),
)
def test_what_timm_cannot_give(create, options, error, message):
    with pytest.raises(error, match=message):
        create(**options)


# ---- forward and backward ----


@pytest.mark.parametrize(
    "options",
    ({}, {"global_pool": "max"}, {"output_stride": 8}, {"drop_path_rate": 0.2}),
    ids=str,
)
def test_forward_and_backward(create, images, options):
    model = create(num_classes=11, **options)
    out = model(images)
    assert out.shape == (2, 11) and out.isfinite().all()
    out.mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_timms_drop_path(timm):
    """The same samples are dropped from one seed, and the others scaled alike."""
    block = EPSABlock(64, 64, drop_path_rate=0.4, norm_layer=lambda _: nn.Identity(), expansion=1)
    x = torch.randn(16, 64, 3, 3)
    residual = block.conv3(block.relu(block.conv2(block.relu(block.conv1(x)))))
    torch.manual_seed(5)
    expected = block.relu(timm.layers.DropPath(0.4).train()(residual) + x)
    torch.manual_seed(5)
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("stride", (8, 16, 32))
def test_timms_resnet_has_the_same_strides_and_dilations(timm, stride):
    def settings(model):
        convs = [getattr(b.conv2, "conv_1", b.conv2) for i in range(4) for b in stages(model)[i]]
        shortcuts = [b.downsample for i in range(4) for b in stages(model)[i] if b.downsample]
        return (
            [(c.kernel_size, c.stride, c.padding, c.dilation) for c in convs],
            [s[0].stride for s in shortcuts],
            [info["reduction"] for info in model.feature_info],
        )

    def stages(model):
        return [model.layer1, model.layer2, model.layer3, model.layer4]

    ours, theirs = (
        on_meta(timm.create_model, model_name=name, output_stride=stride)
        for name in ("epsanet50", "resnet50")
    )
    assert settings(ours) == settings(theirs)


# ---- features ----


@pytest.mark.parametrize("kind", ("list", "dict", "hook", "getter", "fx"))
@pytest.mark.parametrize("indices", ((1, 2, 3, 4), (0, 2), (-1,)), ids=str)
def test_features(create, images, kind, indices):
    if kind == "fx":
        optional("torchvision.models.feature_extraction")
    torch.manual_seed(3)
    whole = create().eval()
    torch.manual_seed(3)
    model = create(features_only=True, out_indices=indices, feature_cls=kind).eval()
    out = model(images)
    out = list(out.values()) if isinstance(out, dict) else out
    expected = whole.forward_intermediates(images, indices, intermediates_only=True)
    assert len(out) == len(expected) == len(indices)
    for actual, right in zip(out, expected, strict=True):
        assert torch.equal(actual, right)
    assert model.feature_info.channels() == [m.shape[1] for m in expected]
    assert model.feature_info.reduction() == [64 // m.shape[2] for m in expected]


def test_the_getter_prunes_what_it_needs_not(create):
    model = create(features_only=True, out_indices=(1, 2), feature_cls="getter")
    assert len(psa_modules(model)) == 7


def test_features_of_a_dilated_network(create, images):
    model = create(features_only=True, output_stride=16, feature_cls="getter").eval()
    assert model.feature_info.reduction() == [2, 4, 8, 16, 16]
    assert [m.shape[2] for m in model(images)] == [32, 16, 8, 4, 4]


def test_timms_graph_extractor(timm, create, images):
    """timm's test_model_forward_fx: the last node of the graph in eval mode."""
    optional("torchvision.models.feature_extraction")
    fx = timm.models._features_fx
    model = create().eval()
    _, nodes = fx.get_graph_node_names(model)
    extractor = fx.create_feature_extractor(model, return_nodes=[nodes[-1]])
    assert torch.equal(extractor(images)[nodes[-1]], model(images))
    assert "layer1.0.conv2" in nodes  # the PSA module is one node


# ---- optimizers ----


def test_layer_decay(create):
    model = create(num_classes=5)
    optimizer = optional("timm.optim").create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5)
    names = {p: name for name, p in model.named_parameters()}
    scales = {names[p]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert scales.keys() == set(names.values())
    blocks = [f"layer{i + 1}.{j}." for i, count in enumerate((3, 4, 6, 3)) for j in range(count)]
    layers = [("conv1.", "bn1."), *((block,) for block in blocks), ("fc.",)]
    for name, scale in scales.items():
        (number,) = (i for i, prefixes in enumerate(layers) if name.startswith(prefixes))
        assert scale == 0.5 ** (len(layers) - 1 - number)


def test_an_optimizer_of_timm_trains(create, images):
    model = create(num_classes=5, drop_path_rate=0.1)
    optimizer = optional("timm.optim").create_optimizer_v2(model, "sgd", lr=0.05, layer_decay=0.9)
    labels = torch.tensor([1, 3])
    losses = []
    for _ in range(12):
        losses.append(nn.functional.cross_entropy(model(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


# ---- timm's training script ----

# What timm's train.py asks of a model, and a file beside it as users have.
SCRIPT = """
import argparse
import torch
from timm import create_model
from timm.optim import create_optimizer_v2
from beside import LABELS

parser = argparse.ArgumentParser()
for option, kind in {"model": str, "drop-path": float, "gp": str, "layer-decay": float}.items():
    parser.add_argument(f"--{option}", type=kind)
parser.add_argument("--model-kwargs", type=eval)
args = parser.parse_args()
model = create_model(
    args.model,
    pretrained=False,
    in_chans=3,
    num_classes=2,
    drop_rate=0.0,
    drop_path_rate=args.drop_path,
    drop_block_rate=None,
    global_pool=args.gp,
    bn_momentum=None,
    scriptable=False,
    checkpoint_path="",
    **args.model_kwargs,
)
model.set_grad_checkpointing(enable=True)
optimizer = create_optimizer_v2(model, "lamb", lr=0.01, layer_decay=args.layer_decay)
loss = torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), LABELS)
loss.backward()
optimizer.step()
if __name__ == "__main__":
    print(type(model).__name__, model.global_pool, loss.isfinite().item())
"""


def test_the_example_runs_timms_training_script(timm, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("import torch\nLABELS = torch.tensor([0, 1])\n")
    example = str(ROOT / "examples/timm_train.py")
    options = ("--model", "epsanet50", "--drop-path", "0.1", "--gp", "max", "--layer-decay", "0.8")
    printed = python(example, str(tmp_path / "train.py"), *options, "--model-kwargs", str(NARROW))
    assert printed.splitlines()[-1] == "EPSANet max True"
    assert "usage: timm_train.py SCRIPT" in python(example, check=False)
