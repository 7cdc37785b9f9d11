"""The main job on real input: the operator's latency, then EPSANet-50 on photographs.

    make demo

First the quick setting of the latency benchmark runs and draws its chart. Then EPSANet-50 gets two
photographs that scikit-learn ships, whole and as a batch of crops. It runs in plain PyTorch and as
epsa_fused.fuse() makes it, both in channels_last. Logits and gradients are compared, and the
forward pass is timed. The last line is the path of the chart.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import epsa_fused

sys.path.insert(0, str(Path(__file__).parent))
import latency

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's
CROP = 224
# Rounding in float32 over 50 layers explains such relative errors. Gradients differ more, since
# inputs of ReLUs may round to either side of zero.
LOGITS_LIMIT, GRADIENTS_LIMIT = 1e-5, 2e-3
ROUNDS = 3


def photographs() -> dict[str, Tensor]:
    """The photographs, normalised, each [1, 3, H, W]."""
    sample = load_sample_images()
    images = {}
    for name, image in zip(sample.filenames, sample.images, strict=True):
        pixels = torch.from_numpy(np.array(image)).float() / 255
        images[Path(name).name] = ((pixels - MEAN) / STD).permute(2, 0, 1).unsqueeze(0)
    return images


def center_crop(image: Tensor) -> Tensor:
    top, left = ((side - CROP) // 2 for side in image.shape[2:])
    return image[:, :, top : top + CROP, left : left + CROP]


def networks(images: Tensor) -> tuple[nn.Module, nn.Module]:
    """EPSANet-50 fused and plain, with equal random weights: no public ones are known.

    BatchNorm gets the statistics of `images`; those that it starts with normalise nothing.
    """
    plain = epsa_fused.epsanet50(fused=False).to(memory_format=torch.channels_last)
    with torch.no_grad():
        plain.train()(images)
    plain.eval()
    fused = epsa_fused.fuse(copy.deepcopy(plain), inplace=True)
    print(str(fused.fuse_report).splitlines()[0])
    return fused, plain


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def gradients(model: nn.Module, x: Tensor) -> Tensor:
    """All as one vector, since some parameters' own gradients cancel to nothing."""
    model.zero_grad()
    model(x).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def forward(models: tuple[nn.Module, ...], x: Tensor) -> tuple[list[Tensor], list[float]]:
    """Each model's logits, and the median milliseconds of its forward; they run in turn."""
    outs, times = [], [[] for _ in models]
    with torch.no_grad():
        for _ in range(ROUNDS):
            outs.clear()
            for model, measured in zip(models, times, strict=True):
                start = time.perf_counter()
                outs.append(model(x))
                measured.append(1e3 * (time.perf_counter() - start))
    return outs, [statistics.median(measured) for measured in times]


def report(name: str, x: Tensor, error: float, limit: float, times: str = "") -> bool:
    good = error <= limit
    print(
        f"  {name:<24}{list(x.shape)!s:<19}error {error:.0e}  {'ok' if good else 'WRONG'}  {times}",
        flush=True,
    )
    return good


def main() -> int:
    print("Latency of the attention step, quick setting, about a minute:\n", flush=True)
    table = latency.main(["--quick", "--out", "build/demo", "--name", "latency"])

    torch.manual_seed(0)
    images = photographs()
    crops = torch.cat([center_crop(image) for image in images.values()])
    images["batch of 8 crops"] = batch = torch.cat([crops] * 4)
    print("\nEPSANet-50 on photographs, fused against plain PyTorch, equal weights:", flush=True)
    models = networks(batch)
    good = True
    for name, x in images.items():
        (out, expected), (fused, plain) = forward(models, x)
        times = f"fused {fused:,.0f} ms, plain {plain:,.0f} ms"
        good &= report(name, x, relative_error(out, expected), LOGITS_LIMIT, times)
    error = relative_error(*(gradients(model, crops) for model in models))
    good &= report("gradients of 2 crops", crops, error, GRADIENTS_LIMIT)
    if not good:
        print("FAILED: the errors are larger than rounding explains")
        return 1
    print(f"\nThe chart of the latencies:\n{table.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
