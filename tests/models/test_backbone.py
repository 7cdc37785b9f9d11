"""load_backbone: a start from a ResNet's weights, and what it tells of them."""

import copy

import pytest
import torch
from torch import nn

import epsa_fused
from epsa_fused import epsanet50, epsanet50_large, load_backbone


def resnet50(width: int = 64, classes: int = 1000) -> dict[str, torch.Tensor]:
    """Names and shapes of torchvision's ResNet-50, or of its wide one of width 128."""
    random, state = torch.Generator().manual_seed(0), {}

    def add(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=random)

    def norm(name: str, channels: int) -> None:
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            add(f"{name}.{tensor}", channels)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    add("conv1.weight", 64, 3, 7, 7)
    norm("bn1", 64)
    before = 64
    for layer, (blocks, planes) in enumerate(
        zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1
    ):
        inner, after = planes * width // 64, 4 * planes
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            sizes = ((inner, before, 1, 1), (inner, inner, 3, 3), (after, inner, 1, 1))
            for i, size in enumerate(sizes, 1):
                add(f"{name}.conv{i}.weight", *size)
                norm(f"{name}.bn{i}", size[0])
            if block == 0:
                add(f"{name}.downsample.0.weight", after, before, 1, 1)
                norm(f"{name}.downsample.1", after)
            before = after
    add("fc.weight", classes, 2048)
    add("fc.bias", classes)
    return state


@pytest.mark.parametrize(
    ("build", "width", "taken", "values"),
    ((epsanet50, 64, 304, "14.3 of 22.6"), (epsanet50_large, 128, 304, "23.7 of 28.0")),
)
def test_the_counts_of_a_resnet(build, width, taken, values):
    model, state = build(), resnet50(width)
    before = copy.deepcopy(model.state_dict())
    report = load_backbone(model, state)
    assert len(report.taken) == taken and f"{values} M values" in str(report)
    assert str(report).startswith(f"load_backbone: {taken} of 432 tensors taken")
    for name, value in model.state_dict().items():
        right = state[name] if name in report.taken else before[name]
        assert torch.equal(value, right), name
    assert set(report.taken) | set(report.kept) == set(before)
    assert report.unused == [f"layer{i}.{b}.conv2.weight" for i, n in enumerate((3, 4, 6, 3), 1)
                             for b in range(n)]  # fmt: skip
    assert "layer1.0.conv2.weight" in str(report) and " and 12 more" in str(report)


def test_a_classifier_of_another_size_and_a_prefix():
    model = epsanet50(10)
    state = {f"module.{name}": value for name, value in resnet50().items()}
    report = load_backbone(model, state)
    assert len(report.taken) == 302
    assert report.kept["fc.weight"] == "[10, 2048], given [1000, 2048]"
    assert "not fitting: fc.weight [10, 2048], given [1000, 2048], fc.bias" in str(report)


def test_a_prefix_of_the_model_itself():
    model = nn.DataParallel(nn.Sequential(nn.Linear(2, 2)))
    report = load_backbone(model, copy.deepcopy(model.state_dict()))
    assert len(report.taken) == 2 and not report.kept and not report.unused
    linear = nn.Linear(1, 1)
    report = load_backbone(linear, {"weight": torch.ones(1, 1), "module.weight": torch.zeros(1, 1)})
    assert linear.weight.item() == 1 and report.unused == ["module.weight"]


def test_numbers_of_another_kind_are_left():
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    other = {
        "weight": torch.full((2, 2), 77, dtype=torch.int8),
        "bias": torch.ones(2, dtype=torch.complex64),
        "more": torch.ones(1),
    }
    with pytest.raises(ValueError, match="expected some tensor"):
        load_backbone(model, other)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    report = load_backbone(model, other | {"bias": torch.zeros(2, dtype=torch.float64)})
    assert report.taken == ["bias"] and report.kept == {"weight": "torch.float32, given torch.int8"}
    assert report.unused == ["more"]


def test_a_tensor_with_two_names():
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    b.weight = a.weight
    report = load_backbone(nn.Sequential(a, b), {"0.weight": torch.ones(2, 2)})
    assert report.taken == ["0.weight"] and torch.equal(b.weight, torch.ones(2, 2))
    assert report.kept == {"1.weight": "is one with a tensor that was taken"}


def test_dtype_device_and_parameters_stay():
    model = epsanet50().to(torch.bfloat16)
    parameters = list(model.parameters())
    load_backbone(model, resnet50())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.conv1.weight.dtype == torch.bfloat16
    assert torch.equal(model.conv1.weight, resnet50()["conv1.weight"].bfloat16())


def test_packed_weights_are_dropped():
    module = epsa_fused.FusedPSAModule(64, 64).eval().prepack(8, 8)
    x = torch.randn(1, 64, 8, 8)
    other = {name: 2 * value for name, value in module.state_dict().items()}
    load_backbone(module, other)
    right = epsa_fused.PSAModule(64, 64)
    right.load_state_dict(other)
    with torch.no_grad():
        torch.testing.assert_close(module(x), right(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    (
        (lambda: load_backbone(print, {}), TypeError, "model: expected a torch.nn.Module"),
        (lambda: load_backbone(nn.Linear(1, 1), [1]), TypeError, r"expected a mapping, got \[1\]"),
        (
            lambda: load_backbone(nn.Linear(1, 1), {"weight": 1}),
            TypeError,
            r"state_dict: expected Tensors by their names, got 'weight': 1",
        ),
        (
            lambda: load_backbone(nn.Linear(1, 1), {"weight": torch.zeros(1, 1, device="meta")}),
            TypeError,
            r"state_dict\['weight'\]: expected a dense tensor with data, got no data",
        ),
        (
            lambda: load_backbone(nn.Linear(1, 1), {"a": torch.zeros(2)}),
            ValueError,
            r"such as weight \[1, 1\], got a \[2\]",
        ),
        (
            lambda: load_backbone(nn.Linear(1, 1), {1: torch.zeros(1)}),
            TypeError,
            "state_dict: expected Tensors by their names, got 1: ",
        ),
        (
            lambda: load_backbone(nn.Linear(1, 1, device="meta"), {"weight": torch.zeros(1, 1)}),
            ValueError,
            "model: expected tensors with data, got weight without",
        ),
        (
            lambda: load_backbone(nn.LazyLinear(1), {"weight": torch.zeros(1, 1)}),
            ValueError,
            "model: expected tensors with data, got weight without",
        ),
        (lambda: load_backbone(nn.Linear(1, 1), {}), ValueError, "such as weight .*, got none"),
    ),
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=f"load_backbone: .*{words}"):
        call()
