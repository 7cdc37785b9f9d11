"""`python -m epsa_fused`: the build, this machine, and a self-check of the operator."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from . import _C, __version__, psa_attention, psa_attention_reference

# Rounding explains errors up to these, relative to a result's largest value. The float64 reference
# counts as exact.
LIMITS = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _describe() -> None:
    info = _C.build_info()
    print(f"epsa_fused {__version__}")
    print(f"built with    torch {info['torch']}, compiler {info['compiler']}")
    print(f"running with  torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"CPU kernels   {', '.join(info['cpu_isas'])}; this machine uses {_C.cpu_isa()}")
    print(f"CPU threads   {torch.get_num_threads()} (OpenMP {info['openmp']})")
    devices = [
        "{} (sm_{}{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]
    print(f"CUDA kernels  {'built' if info['cuda'] else 'not built'}")
    print(f"CUDA devices  {', '.join(devices) or 'none found'}")


def _errors(device: str, dtype: torch.dtype, layout: torch.memory_format) -> tuple[float, float]:
    """Largest relative errors of the output and of the gradients against float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 20, 15, 13)] * 4 + [(5, 20), (5,), (20, 5), (20,)]
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    values[5] += 3  # keeps every hidden unit alive
    grad = torch.randn(3, 80, 15, 13, generator=generator, dtype=torch.float64).to(dtype)
    inputs = [v.to(device, dtype) for v in values]
    inputs = [v.contiguous(memory_format=layout) if v.dim() == 4 else v for v in inputs]
    exact = [v.double().cpu() for v in inputs]

    def run(
        function: Callable[..., Tensor], tensors: list[Tensor], g: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = function(tensors[:4], *tensors[4:])
        return out, torch.autograd.grad(out, tensors, g)

    out, grads = run(psa_attention, inputs, grad.to(device))
    exact_out, exact_grads = run(psa_attention_reference, exact, grad.double())

    def error(a: Tensor, b: Tensor) -> float:
        # The tiny divisor makes every nonzero result wrong where zero is right. max keeps a NaN.
        return ((a.double().cpu() - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()

    errors = torch.tensor(list(map(error, grads, exact_grads)))
    return error(out, exact_out), errors.max().item()


def _self_check(device: str) -> bool:
    print(f"\nself-check on {device}: largest relative error against the float64 reference")
    fine = True
    for dtype, limit in LIMITS.items():
        for name, layout in LAYOUTS.items():
            forward, backward = _errors(device, dtype, layout)
            good = forward <= limit and backward <= limit
            fine &= good
            print(
                f"  {str(dtype).removeprefix('torch.'):<9}{name:<15}forward {forward:.1e}  "
                f"backward {backward:.1e}  {'ok' if good else f'WRONG, expected <= {limit:.0e}'}"
            )
    return fine


def main() -> int:
    _describe()
    devices = ["cpu"]
    if _C.build_info()["cuda"] and torch.cuda.is_available():
        devices.append("cuda")
    # A list, not a generator: every device is checked, also after a failure.
    return 0 if all([_self_check(device) for device in devices]) else 1


if __name__ == "__main__":
    sys.exit(main())
