"""Whole modules on a GPU, for compute-sanitizer to watch: convolutions, attention step, epilogue.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck \
        python benchmarks/sanitize_module.py

Without PyTorch's cache each tensor has memory of its own size, so memcheck sees accesses beside
it. The kernels' case program, which sanitize.sh runs, has no convolutions.
"""

from __future__ import annotations

import torch

from epsa_fused import FusedPSAModule

# planes, H = W, N: EPSANet's stages, lines that fill no tile, and the largest groups
SHAPES = [
    (64, 20, 2),
    (64, 56, 1),
    (128, 28, 1),
    (256, 14, 1),
    (512, 7, 2),
    (1024, 5, 1),
    (64, 61, 1),
]


@torch.no_grad()
def run(module: FusedPSAModule, n: int, size: int, dtype: torch.dtype) -> None:
    """The module with BatchNorm's factors and ReLU behind it."""
    module = module.to("cuda", dtype).to(memory_format=torch.channels_last)
    planes = module.se.fc2.out_channels * 4
    x = torch.randn(n, planes, size, size, device="cuda").to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    convolutions = [getattr(module, f"conv_{i}") for i in (1, 2, 3, 4)]
    scale, shift = torch.randn(2, planes, device="cuda")
    operator = torch.ops.epsa_fused.psa_forward.default
    out = operator(*module._arguments(x, convolutions)[0], None, True, scale, shift, True)
    assert out.isfinite().all()
    assert module(x).isfinite().all()
    print(f"{dtype} ({n}, {planes}, {size}): ok", flush=True)


def main() -> None:
    torch.manual_seed(0)
    for planes, size, n in SHAPES:
        for dtype in (torch.bfloat16, torch.float16):
            run(FusedPSAModule(planes, planes), n, size, dtype)
    odd = FusedPSAModule(96, 96, conv_groups=(1, 6, 12, 24))
    run(odd, 2, 9, torch.bfloat16)


if __name__ == "__main__":
    main()
