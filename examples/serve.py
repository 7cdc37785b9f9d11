"""Serve a model on the CPU: compiled in Python, or as a package for a C++ program.

python examples/serve.py

examples/run_package.cpp runs epsanet50.pt2 on images.f32; docs/export.md has its commands.
"""

from collections.abc import Callable

import torch
import torch._inductor.config
from torch import Tensor, nn

from epsa_fused import epsanet50, optimize_for_export, optimize_for_inference


def compiled(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Folded, packed and compiled for images of this size."""
    served = optimize_for_inference(model, images)  # dtype=torch.bfloat16 where AMX is
    print(served.report)
    return served


@torch.no_grad()
def package(model: nn.Module, images: Tensor, path: str) -> None:
    """The same as machine code for 1 to 64 images of this size, which needs no Python."""
    batch = torch.export.Dim("batch", min=1, max=64)
    optimized = optimize_for_export(model, images)
    program = torch.export.export(optimized, (images,), dynamic_shapes=({0: batch},))
    with torch._inductor.config.patch(freezing=True):
        torch._inductor.aoti_compile_and_package(program, package_path=path)


if __name__ == "__main__":
    model = epsanet50().eval()  # and load your weights into it
    images = torch.randn(8, 3, 224, 224)
    logits = compiled(model, images)(images)  # [8, 1000]
    package(model, images, "epsanet50.pt2")
    images.numpy().tofile("images.f32")
