"""The estimate of what ImageNet would cost, in docs/training.md: its arithmetic."""

import csv
import re

import pytest
import torch
from support.pages import PAGES
from support.paths import ROOT
from torch import nn

from epsa_fused import PSAModule, models

STAGES = (64, 128, 256, 512)
IMAGES = 64  # of which the times are
EPOCHS, TRAINING_IMAGES, GPUS = 120, 1_281_167, 8
RESNET50_US, RESNET50_G = GPUS / 15_977 * 1e6, 4.09  # NVIDIA's DGX A100, mixed precision
TAPS = (9 + 25 + 25 + 49) / 81  # of the large models, of the fourth convolution
ROW = r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \| (\S+) \((\S+) to (\S+)\) \| (\d+) \|$"


def measured(kind: str, mode: str, contender: str) -> list[float]:
    """Microseconds in each stage."""
    with (ROOT / "benchmarks/results/nvidia-h200-gpu.csv").open(newline="") as file:
        found = {
            int(row["planes"]): float(row["device_us"])
            for row in csv.DictReader(file)
            if (row["kind"], row["mode"], row["contender"]) == (kind, mode, contender)
            and (row["layout"], row["dtype"], row["n"])
            == ("channels_last", "bfloat16", str(IMAGES))
        }
    return [found[planes] for planes in STAGES]


def outside_of_psa(name: str) -> float:
    """Billions of multiply-adds of an image, without those of the PSA modules."""
    network, total = getattr(models, name)(fused=False).to("meta").eval(), [0]
    inside = {m for psa in network.modules() if isinstance(psa, PSAModule) for m in psa.modules()}

    def count(layer: nn.Module, _, out: torch.Tensor) -> None:
        total[0] += out.numel() * layer.weight[0].numel()

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer not in inside:
            layer.register_forward_hook(count)
    network(torch.zeros(1, 3, 224, 224, device="meta"))
    return total[0] / 1e9


@pytest.mark.parametrize("row", re.findall(ROW, PAGES["docs/training.md"], re.MULTILINE), ids=str)
def test_the_estimate(row):
    name, *numbers = row
    blocks = (3, 4, 23 if "101" in name else 6, 3)
    times = 2 if "large" in name else 1
    convolutions = [measured("share", "forward", f"conv {i}") for i in (1, 2, 3, 4)]
    small = [sum(stage) for stage in zip(*convolutions, strict=True)]
    ours = [2 * TAPS * us for us in convolutions[3]] if times == 2 else small
    step = measured("attention", "backward", "fused")
    rest = RESNET50_US * outside_of_psa(name) / RESNET50_G

    def of_an_image(stages) -> float:
        return sum(n * us for n, us in zip(blocks, stages, strict=True)) / IMAGES

    def backward(passes: int) -> float:
        pairs = zip(ours, step, strict=True)
        return of_an_image([passes * layers + times * us for layers, us in pairs])

    def hours(us: float) -> float:
        return EPOCHS * TRAINING_IMAGES * us / GPUS / 3.6e9

    whole = zip(measured("module", "forward", "fused"), ours, small, strict=True)
    forward = of_an_image([us * layers / own for us, layers, own in whole])
    estimate = forward + backward(2) + rest
    wanted = (
        *(f"{us:.0f}" for us in (forward, backward(2), rest)),
        f"{round(GPUS / estimate * 1e6, -1):,.0f}",
        f"{hours(estimate):.1f}",
        f"{hours(estimate - rest / 2):.1f}",
        f"{hours(forward + backward(5) + rest):.1f}",
        f"{GPUS * hours(estimate):.0f}",
    )
    assert tuple(numbers) == wanted
    assert (
        f"{outside_of_psa(name):.2f}" in PAGES["docs/training.md"].split("of ResNet-50's 4.09 G")[0]
    )


def test_every_model_has_one():
    rows = re.findall(ROW, PAGES["docs/training.md"], re.MULTILINE)
    names = [row[0] for row in rows]
    assert names == ["epsanet50", "epsanet50_large", "epsanet101", "epsanet101_large"]
