"""EPSANet in torchvision's detectors: the published numbers of parameters, what is frozen, and a
training step and an inference on photographs."""

import copy
import sys

import pytest
import torch
from support.optional import optional
from support.paths import ROOT
from support.processes import run_code
from support.tolerance import assert_near
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from epsa_fused import EPSANet, epsanet50, epsanet50_large
from epsa_fused.detection import FixedBatchNorm2d, foreground_only, fpn_backbone

PAGE = (ROOT / "docs" / "detection.md").read_text()
# Trainable parameters of the paper's detectors: exactly, and in millions as published.
FIGURES = {
    ("FasterRCNN", epsanet50): (38_561_624, 38.56),
    ("FasterRCNN", epsanet50_large): (43_852_048, 43.85),
    ("MaskRCNN", epsanet50): (41_204_904, 41.20),
    ("MaskRCNN", epsanet50_large): (46_495_328, 46.50),
    ("RetinaNet", epsanet50): (34_777_260, 34.78),
    ("RetinaNet", epsanet50_large): (40_067_684, 40.07),
}
DETECTORS = ("FasterRCNN", "MaskRCNN", "RetinaNet")
# Relative error of two detectors in float64 whose backbones round differently. In float32 they
# would choose other regions.
LIMIT = 1e-9


def tiny(**options) -> EPSANet:
    """One narrow block a stage."""
    options = {"num_classes": 10, "planes": (64, 64, 64, 128), "expansion": 2} | options
    return EPSANet((1, 1, 1, 1), **options)


def build(detector: str, model: EPSANet, classes: int, *, backbone=None, **options) -> nn.Module:
    """As the docstring's example, for `classes` classes besides the background."""
    detection = optional("torchvision.models.detection")
    pyramids = optional("torchvision.ops.feature_pyramid_network")
    backbone = backbone or {}
    if detector == "RetinaNet":
        p6 = pyramids.LastLevelP6P7(model.num_features, 256)
        backbone = fpn_backbone(model, returned_layers=(2, 3, 4), extra_blocks=p6, **backbone)
        return detection.RetinaNet(backbone, num_classes=classes, **options)
    backbone = fpn_backbone(model, **backbone)
    return getattr(detection, detector)(backbone, num_classes=classes + 1, **options)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- the published figures ----


@pytest.mark.parametrize(
    ("detector", "build_model"), FIGURES, ids=lambda v: v if isinstance(v, str) else v.__name__
)
def test_the_published_parameters(detector, build_model):
    expected, millions = FIGURES[detector, build_model]
    with torch.device("meta"):
        model = build(detector, build_model(), 80)
    if detector != "RetinaNet":
        foreground_only(model)
    assert trainable(model) == expected and round(expected / 1e6, 2) == millions


def test_faster_rcnn_misses_the_published_parameters_with_the_background():
    with torch.device("meta"):
        models = [build("FasterRCNN", make(), 80) for make in (epsanet50, epsanet50_large)]
    small, large = (f"{trainable(model) / 1e6:.2f}" for model in models)
    assert f"Faster R-CNN has {small} and {large} M without" in PAGE


def test_what_the_published_parameters_leave_out():
    """The frozen stem and layer1, the background's box, and in Mask R-CNN its mask."""
    with torch.device("meta"):
        model = build("MaskRCNN", epsanet50(), 80)
        body = model.backbone.body
    frozen = [body.conv1, body.bn1, body.layer1]
    frozen = sum(p.numel() for module in frozen for p in module.parameters())
    assert frozen == 196_115
    everything = sum(p.numel() for p in model.parameters())
    assert (
        everything == 41_204_904 + frozen + 4 * 1025 + 257
        and f"has {everything / 1e6:.2f} M" in PAGE
    )


# ---- the backbone ----


def test_importing_the_package_does_not_import_torchvision():
    code = "import sys, epsa_fused.detection; print('torchvision' in sys.modules)"
    assert run_code(code).strip() == "False"


def test_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    message = r"needs torchvision.*made for torch .*pip install torchvision.*The import failed: "
    with pytest.raises(ImportError, match=message):
        fpn_backbone(tiny())


@pytest.mark.parametrize("layers", ((1, 2, 3, 4), [2, 3, 4], (4,)), ids=str)
def test_the_maps(layers):
    ops = optional("torchvision.ops")
    model = tiny().double().eval()
    backbone = fpn_backbone(model, returned_layers=layers, out_channels=24).double().eval()
    assert backbone.out_channels == 24
    x = torch.randn(2, 3, 97, 65, dtype=torch.float64)
    maps = backbone(x)
    assert list(maps) == [*map(str, range(len(layers))), "pool"]
    for layer, actual in zip(layers, maps.values(), strict=False):
        stride = model.pyramid_strides[layer - 1]
        assert actual.shape == (2, 24, -(-97 // stride), -(-65 // stride))
    # the same pyramid of the network's own maps
    fpn = ops.FeaturePyramidNetwork([model.pyramid_channels[i - 1] for i in layers], 24)
    fpn = fpn.double()
    fpn.load_state_dict(backbone.fpn.state_dict())
    own = list(model.forward_pyramid(x).values())
    expected = fpn({str(i): own[layer - 1] for i, layer in enumerate(layers)})
    for name, value in expected.items():
        assert_near(maps[name], value)


def test_p6_from_c5():
    pyramids = optional("torchvision.ops.feature_pyramid_network")
    p6 = pyramids.LastLevelP6P7(256, 24)
    backbone = fpn_backbone(
        tiny(), returned_layers=(2, 3, 4), extra_blocks=p6, out_channels=24
    ).eval()
    x = torch.randn(1, 3, 256, 256)
    maps = backbone(x)
    assert list(maps) == ["0", "1", "2", "p6", "p7"]
    assert [m.shape[-1] for m in maps.values()] == [32, 16, 8, 4, 2]
    assert torch.equal(maps["p6"], p6.p6(backbone.body(x)["2"]))


def test_the_model_is_copied():
    optional("torchvision")
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    backbone = fpn_backbone(model, trainable_layers=0)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, FixedBatchNorm2d) for m in model.modules())
    with torch.no_grad():
        for p in backbone.parameters():
            p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("frozen_statistics", (True, False))
def test_the_keys_are_the_models(frozen_statistics):
    optional("torchvision")
    model = tiny()
    keys = fpn_backbone(model, frozen_statistics=frozen_statistics).state_dict()
    expected = [f"body.{key}" for key in model.state_dict() if not key.startswith("fc.")]
    assert [key for key in keys if key.startswith("body.")] == expected


def test_dtype_and_device():
    optional("torchvision")
    backbone = fpn_backbone(tiny().double())
    assert {p.dtype for p in backbone.parameters()} == {torch.float64}
    backbone = fpn_backbone(tiny().to("meta"))
    assert {p.device.type for p in backbone.parameters()} == {"meta"}


def test_other_channels_of_the_images():
    optional("torchvision")
    backbone = fpn_backbone(tiny(in_chans=1), in_chans=1)
    assert backbone(torch.randn(1, 1, 64, 64))["0"].shape == (1, 256, 16, 16)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    (
        (nn.Linear(1, 1), {}, TypeError, r"expected an epsa_fused\.EPSANet, got torch\..*Linear"),
        (epsanet50, {}, TypeError, r"expected an epsa_fused\.EPSANet, got builtins\.function"),
        (tiny(in_chans=4), {}, ValueError, r"of 3 channels, got one for 4; .*in_chans=4.*of 4 va"),
        (tiny(), {"in_chans": 1}, ValueError, r"in_chans: expected .* of 1 channels, got .* 3"),
        (tiny(), {"trainable_layers": 6}, ValueError, r"trainable_layers: .* at most 5, got 6"),
        (tiny(), {"trainable_layers": -1}, ValueError, r"trainable_layers: .* least 0, got -1"),
        (tiny(), {"trainable_layers": 2.0}, TypeError, r"trainable_layers: .* int, got 2\.0"),
        (tiny(), {"out_channels": 0}, ValueError, r"out_channels: .* at least 1, got 0"),
        *(
            (tiny(), {"returned_layers": layers}, ValueError, r"layers 1 to 4, .*, got "
)
            for layers in ((), (0, 1), (4, 5), (3, 2), (2, 2), "34", 4, None)
        ),
    ),
)  # fmt: skip
def test_backbones_that_cannot_be_built(model, options, error, message):
    """The errors do not need torchvision."""
    with pytest.raises(error, match=message):
        fpn_backbone(model, **options)


# ---- what is frozen ----

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


def stage(name: str) -> str:
    """The stage that a parameter or buffer of a body is in."""
    first = name.split(".")[0]
    return "stem" if first in ("conv1", "bn1") else first


def assert_trained(name: str, parameter: nn.Parameter) -> None:
    assert parameter.grad.isfinite().all(), name
    # an SE may have a single hidden unit, and its ReLU be off for all images
    assert parameter.grad.any() or ".se.fc" in name, name


@pytest.mark.parametrize("frozen_statistics", (True, False))
@pytest.mark.parametrize("trainable_layers", range(6))
def test_a_step_changes_the_trained_layers_alone(trainable_layers, frozen_statistics):
    optional("torchvision")
    backbone = fpn_backbone(
        tiny(),
        trainable_layers=trainable_layers,
        frozen_statistics=frozen_statistics,
        out_channels=24,
    ).train()
    body = backbone.body
    before = copy.deepcopy(dict(body.named_buffers()))
    sum(m.square().mean() for m in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    trained = STAGES[len(STAGES) - trainable_layers :]
    for name, parameter in body.named_parameters():
        assert parameter.requires_grad == (stage(name) in trained), name
        if stage(name) in trained:
            assert_trained(name, parameter)
        else:
            assert parameter.grad is None, name
    for name, buffer in body.named_buffers():
        changes = stage(name) in trained and not frozen_statistics
        assert torch.equal(buffer, before[name]) != changes, name


def test_other_normalisations_stay():
    optional("torchvision")
    model = tiny(norm_layer=lambda channels: nn.GroupNorm(4, channels))
    body = fpn_backbone(model, trainable_layers=0).body
    assert {type(m) for m in body.modules() if "Norm" in type(m).__name__} == {nn.GroupNorm}


@pytest.mark.parametrize("affine", (True, False))
def test_fixed_batch_norm(affine):
    norm = nn.BatchNorm2d(8, eps=1e-3, affine=affine)
    norm(torch.randn(4, 8, 5, 5) * 3 + 1)
    norm.eval()
    x = torch.randn(4, 8, 5, 5)
    state = copy.deepcopy(norm.state_dict())
    fixed = FixedBatchNorm2d(norm).train()
    assert torch.equal(fixed(x), norm(x))
    assert fixed.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in fixed.state_dict().items())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(fixed))
    assert converted[0] is fixed


class ActivatedBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    "norm",
    (ActivatedBatchNorm(8), nn.BatchNorm2d(8, track_running_stats=False), nn.GroupNorm(4, 8)),
    ids=lambda norm: type(norm).__name__,
)
def test_norms_that_cannot_be_fixed(norm):
    with pytest.raises(TypeError, match=r"expected an nn\.BatchNorm2d .* statistics, got "):
        FixedBatchNorm2d(norm)


def test_a_batch_norm_that_does_more_is_not_replaced_silently():
    optional("torchvision")
    with pytest.raises(TypeError, match=r"got ActivatedBatchNorm"):
        fpn_backbone(tiny(norm_layer=ActivatedBatchNorm))


def test_as_torchvisions_frozen_batch_norm():
    """In evaluation, and of a frozen stage in training too."""
    misc = optional("torchvision.ops.misc")
    model, theirs = tiny(), tiny(norm_layer=misc.FrozenBatchNorm2d)
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    theirs.load_state_dict(model.state_dict())
    model, theirs = model.double(), theirs.double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    fused = fpn_backbone(model, trainable_layers=0).train().body(x)
    for actual, expected in zip(fused.values(), theirs.forward_pyramid(x).values(), strict=True):
        assert_near(actual, expected)


# ---- on photographs ----


@pytest.fixture(scope="module")
def photographs():
    """Two, [3, 427, 640] from 0 to 1, and what is on them: two dahlias (1), a pavilion (2). Masks
    are the boxes' ellipses."""
    datasets = optional("sklearn.datasets")
    optional("PIL")
    things = {
        "flower.jpg": ([[168.0, 84, 447, 359], [287, 374, 469, 427]], [1, 1]),
        "china.jpg": ([[62.0, 29, 373, 412]], [2]),
    }
    images, targets = [], []
    for name, (boxes, labels) in things.items():
        image = torch.tensor(datasets.load_sample_image(name)).permute(2, 0, 1) / 255
        y, x = torch.meshgrid(
            *(torch.arange(side) + 0.5 for side in image.shape[1:]), indexing="ij"
        )
        masks = [
            ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
            for x0, y0, x1, y1 in boxes
        ]
        images.append(image)
        targets.append(
            {
                "boxes": torch.tensor(boxes),
                "labels": torch.tensor(labels),
                "masks": torch.stack(masks).to(torch.uint8),
            }
        )
    return images, targets


@pytest.fixture(scope="module")
def network(photographs):
    """EPSANet-50 of random weights, with the photographs' statistics. Initial statistics would
    normalise nothing."""
    torch.manual_seed(0)
    model = epsanet50()
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        norm.momentum = 1.0
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        model.train()((torch.stack(photographs[0])[:, :, ::3, ::3] - mean) / std)
    return model


@pytest.fixture
def compiled_operators():
    """Skips where torchvision imports, but without its compiled operators (NMS, RoIAlign)."""
    ops = optional("torchvision.ops")
    try:
        ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"torchvision's compiled operators do not load: {str(error)[:100]}")


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_training_step_and_an_inference(detector, photographs, network, compiled_operators):
    images, targets = photographs
    every = {"score_thresh" if detector == "RetinaNet" else "box_score_thresh": 0.0}
    model = build(detector, network, 3, min_size=160, max_size=240, **every).train()
    body, before = model.backbone.body, copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)

    losses = model(images, targets)
    assert len(losses) == {"FasterRCNN": 4, "MaskRCNN": 5, "RetinaNet": 2}[detector]
    assert all(loss.isfinite() and loss > 0 for loss in losses.values()), losses
    sum(losses.values()).backward()
    for name, parameter in body.named_parameters():
        if stage(name) in ("stem", "layer1"):
            assert parameter.grad is None, name
        else:
            assert_trained(name, parameter)
    optimizer.step()
    changed = {name for name, v in model.state_dict().items() if not torch.equal(v, before[name])}
    assert not any(
        stage(name) in ("stem", "layer1") or "running" in name
        for name in changed
        if name.startswith("backbone.body.")
    )
    assert any(name.startswith("backbone.body.layer2") for name in changed)

    with torch.no_grad():
        results = model.eval()(images)
    for result in results:
        count = len(result["boxes"])
        assert count > 0 and result["scores"].shape == result["labels"].shape == (count,)
        assert all(value.isfinite().all() for value in result.values())
        x0, y0, x1, y1 = result["boxes"].unbind(1)
        assert (x0 >= 0).all() and (x1 <= 640).all() and (y0 >= 0).all() and (y1 <= 427).all()
        assert (x0 <= x1).all() and (y0 <= y1).all()
        if detector == "MaskRCNN":
            assert result["masks"].shape == (count, 1, 427, 640)
            assert result["masks"].min() >= 0 and result["masks"].max() <= 1


@pytest.mark.parametrize("detector", ("FasterRCNN", "RetinaNet"))
def test_a_box_is_found(detector, photographs, compiled_operators):
    """The large dahlia, by a narrow network that has seen nothing else."""
    ops = optional("torchvision.ops")
    torch.manual_seed(0)
    options = {"rpn_post_nms_top_n_train": 200, "box_batch_size_per_image": 64}  # for speed
    model = build(
        detector,
        tiny(),
        2,
        backbone={"trainable_layers": 5, "frozen_statistics": False},
        min_size=160,
        max_size=240,
        **(options if detector == "FasterRCNN" else {}),
    )
    images = photographs[0][:1]
    targets = [{name: value[:1] for name, value in photographs[1][0].items()}]
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        sum(model.train()(images, targets).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
    with torch.no_grad():
        (found,) = model.eval()(images)
    # the likeliest comes first
    assert ops.box_iou(targets[0]["boxes"], found["boxes"][:1]) > 0.5 and found["labels"][0] == 1


@pytest.mark.slow
def test_mask_rcnn_learns_two_photographs(photographs, network, compiled_operators):
    """Sixty steps from random weights, after which it finds what it was shown."""
    ops = optional("torchvision.ops")
    images, targets = photographs
    options = {"rpn_post_nms_top_n_train": 200, "box_batch_size_per_image": 64}  # for speed
    model = build("MaskRCNN", network, 3, min_size=160, max_size=240, **options)
    foreground_only(model).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-2, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        nn.utils.clip_grad_norm_(parameters, 10)
        optimizer.step()
    with torch.no_grad():
        results = model.eval()(images)
    for result, target in zip(results, targets, strict=True):
        sure = {name: value[result["scores"] > 0.5] for name, value in result.items()}
        for box, label, mask in zip(
            *(target[k] for k in ("boxes", "labels", "masks")), strict=True
        ):
            overlap, found = ops.box_iou(box[None], sure["boxes"])[0].max(0)
            assert overlap > 0.5 and sure["labels"][found] == label
            expected, actual = mask.bool(), sure["masks"][found, 0] > 0.5
            assert (expected & actual).sum() / (expected | actual).sum() > 0.5


def in_float64(images, targets):
    return [image.double() for image in images], [
        target | {"boxes": target["boxes"].double()} for target in targets
    ]


@pytest.mark.parametrize("detector", ("MaskRCNN", "RetinaNet"))
def test_fused_trains_as_plain(detector, photographs, network, compiled_operators):
    images, targets = in_float64(*photographs)
    plain = epsanet50(fused=False)
    plain.load_state_dict(network.state_dict())
    results = []
    for backbone in (network, plain):
        torch.manual_seed(1)  # the heads' weights, and the regions drawn for the losses
        model = build(detector, backbone, 3, min_size=160, max_size=240).double().train()
        losses = model(images, targets)
        sum(losses.values()).backward()
        results.append((torch.stack(list(losses.values())).detach(), gradients(model)))
    for expected, actual in zip(*results, strict=True):
        assert_near(actual, expected, LIMIT)


def test_foreground_only_changes_no_result(photographs, network, compiled_operators):
    model = build("MaskRCNN", network, 3, min_size=160, max_size=240).double()
    images, targets = in_float64(*photographs)
    other = foreground_only(copy.deepcopy(model))
    assert trainable(model) - trainable(other) == 4 * 1025 + 257
    results = []
    for each in (model, other):
        torch.manual_seed(1)
        losses = each.train()(images, targets)
        sum(losses.values()).backward()
        with torch.no_grad():
            results.append((losses, gradients(each.backbone), each.eval()(images)))
    torch.testing.assert_close(*results, rtol=LIMIT, atol=LIMIT)


def test_foreground_only_refuses_other_detectors():
    with torch.device("meta"):
        retina, faster = (build(name, tiny(), 2) for name in ("RetinaNet", "FasterRCNN"))
    message = r"expected torchvision's, .*box_predictor\.bbox_pred of type Linear, got RetinaNet"
    with pytest.raises(TypeError, match=message):
        foreground_only(retina)
    assert foreground_only(faster) is faster
    with pytest.raises(TypeError, match=r"got FasterRCNN with Sequential there"):
        foreground_only(faster)


def test_foreground_only_refuses_a_whole_or_nothing():
    """A refused mask predictor leaves the box predictor as it was."""
    with torch.device("meta"):
        model = build("MaskRCNN", tiny(), 2)
    model.roi_heads.mask_predictor = nn.Identity()
    with pytest.raises(TypeError, match=r"mask_predictor\.mask_fcn_logits of type Conv2d, got M"):
        foreground_only(model)
    assert model.roi_heads.box_predictor.bbox_pred.out_features == 12
