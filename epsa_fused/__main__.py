"""`python -m epsa_fused`: the build, this machine, and a self-check of the operator."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _C, _facts, psa_attention, psa_attention_reference, winograd_allowed
from ._commands import while_read

# Rounding explains errors up to these, relative to a result's largest value. The float64 reference
# counts as exact.
LIMITS = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _aligned(facts: dict[str, str]) -> list[str]:
    return [f"{name:<15}{' '.join(value.split())}" for name, value in facts.items()]


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


def _check_devices() -> bool:
    devices = ["cpu"]
    if _C.build_info()["cuda"] and torch.cuda.is_available():
        devices.append("cuda")
    # A list, not a generator: every device is checked, also after a failure.
    return all([_self_check(device) for device in devices])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the facts and the self-check.

    Returns the exit code. 0: all is well. 1: a result is wrong. 2: a variable is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m epsa_fused",
        description="Says what was built and what runs here, and checks the operator.",
    )
    parser.add_argument(
        "--report", action="store_true", help="print all that a bug report needs, to paste into it"
    )
    options = parser.parse_args(arguments)
    try:
        winograd_allowed()  # EPSA_WINOGRAD
        facts = _facts.report() if options.report else _facts.short()
    except (RuntimeError, ValueError) as error:  # EPSA_CPU_ISA names none of this machine
        print(f"error: {error}", file=sys.stderr)
        return 2
    fence = ["```"] if options.report else []  # Markdown keeps the columns
    print(*fence, *_aligned(facts), sep="\n")
    fine = _check_devices()
    print(*fence)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(while_read(main))
