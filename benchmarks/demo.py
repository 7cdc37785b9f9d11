"""The main job on real input: an EPSANet stem and PSA block on photographs, fused and plain.

    make demo

Two photographs that scikit-learn ships go, alone and as a batch, through the same network twice:
with epsa_fused.FusedPSAModule and with the plain PyTorch module. Outputs and gradients are
compared, then the quick setting of the latency benchmark runs and draws its chart.
"""

from __future__ import annotations

import sys
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
# Two computations in float32 that round differently: the relative error that is rounding.
LIMIT = 1e-4


class StemAndBlock(nn.Module):
    """EPSANet's stem and the first block of its first stage (arXiv 2105.14447, section 3.3)."""

    def __init__(self, psa: type[nn.Module], planes: int = 64, expansion: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.body = nn.Sequential(
            nn.Conv2d(64, planes, 1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            psa(planes, planes),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes, planes * expansion, 1, bias=False),
            nn.BatchNorm2d(planes * expansion),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(64, planes * expansion, 1, bias=False), nn.BatchNorm2d(planes * expansion)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3, H, W] -> [N, 256, H/4, W/4]."""
        x = self.stem(x)
        return torch.relu(self.body(x) + self.shortcut(x))


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


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def compare(name: str, x: Tensor, fused: nn.Module, plain: nn.Module) -> bool:
    """Run both networks forward and backward on x; print and judge how far they are apart."""
    results = []
    for model in (fused, plain):
        model.zero_grad()
        out = model(x)
        out.square().mean().backward()
        results.append((out.detach(), [p.grad for p in model.parameters()]))
    (out, grads), (expected, expected_grads) = results
    forward = relative_error(out, expected)
    # all gradients as one vector: some parameters' own are sums that cancel to nothing
    backward = relative_error(
        *(torch.cat([g.flatten() for g in gs]) for gs in (grads, expected_grads))
    )
    good = forward <= LIMIT and backward <= LIMIT
    print(
        f"  {name:<22}{list(x.shape)!s:<20}-> {list(out.shape)!s:<20}"
        f"error: output {forward:.0e}, gradients {backward:.0e}  {'ok' if good else 'WRONG'}",
        flush=True,
    )
    return good


def main() -> int:
    torch.manual_seed(0)
    plain = StemAndBlock(epsa_fused.PSAModule)
    fused = StemAndBlock(epsa_fused.FusedPSAModule)
    fused.load_state_dict(plain.state_dict())

    print("EPSANet's stem and first PSA block, fused against plain PyTorch, same weights:")
    images = photographs()
    inputs = dict(images)
    inputs["batch of crops"] = torch.cat([center_crop(image) for image in images.values()] * 4)
    good = all([compare(name, x, fused, plain) for name, x in inputs.items()])
    if not good:
        print(f"FAILED: expected errors of at most {LIMIT:.0e}")
        return 1

    print("\nLatency of the attention step (quick setting; results/ holds the full benchmark):\n")
    latency.main(["--quick", "--out", "build/demo", "--name", "latency"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
