"""The attention step, modules and networks on a GPU; resumes where it was stopped.

    python benchmarks/gpu.py                 the missing rows, for at most --minutes
    python benchmarks/gpu.py --part network  those of one part
    python benchmarks/gpu.py --help

Each case measures every contender: its time on the device; the wall time of one call; the peak
memory; the kernels and memsets of a call, from the profiler; the error against float64. A time on
the device is that of a replayed CUDA graph. Its input sets together exceed the L2 cache. The parts
"training" and "network" time nothing whose results differ by more than rounding explains.

The parts, most wanted rows first in each:

    epilogue   the attention step with BatchNorm and ReLU behind it, in inference
    module     whole modules in bfloat16, in inference; cuDNN's four convolutions beside the
               attention step, as they are and merged into fewer groups
    attention  the attention step, forward and backward, beside a copy of the features' bytes
    training   whole modules' forward and backward pass with every gradient
    network    EPSANet-50, inference and training steps

A finished row is appended to <out>/<device>-gpu.csv. Rows that the file holds for the same sources
(csrc) are skipped. A row that cannot be measured is named, and the others go on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import gpu_attention
import gpu_convolutions
import gpu_epilogue
import gpu_modules
import gpu_networks
import gpu_training
from gpu_bench import Bench
from gpu_results import Results, facts
from gpu_timing import Meter

from epsa_fused import _C

# The steps of each part: a step is run, or left for another time.
PARTS: dict[str, tuple[Callable[[Bench], Iterator[Callable[[], None]]], ...]] = {
    "epilogue": (gpu_epilogue.steps,),
    "module": (gpu_modules.steps, gpu_convolutions.steps),
    "attention": (gpu_attention.steps,),
    "training": (gpu_training.steps,),
    "network": (gpu_networks.steps,),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=7.5, help="start no case after that [7.5]")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--repeats", type=int, default=15, help="timed replays of each graph [15]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats: expected at least 2, got {options.repeats}")
    gpu, kernels = torch.cuda.is_available(), _C.build_info()["cuda"]
    if not (gpu and kernels):
        parser.error(
            f"expected a GPU and a build with CUDA kernels; found GPU {gpu}, CUDA kernels {kernels}"
        )
    return options


def prepare() -> Meter:
    """Settings of the process that every row is measured with."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    # Autograd runs a backward on its forward's stream, and a graph can't capture the default one.
    torch.cuda.set_stream(torch.cuda.Stream())
    return Meter()


def run_part(part: str, bench: Bench, minutes: float) -> bool:
    """Whether every step began in the time."""
    stop = time.monotonic() + 60 * minutes
    chosen = chain.from_iterable(PARTS.values()) if part == "all" else PARTS[part]
    for step in chain.from_iterable(steps(bench) for steps in chosen):
        if time.monotonic() > stop:
            return False
        step()
    return True


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    meter, known = prepare(), facts()
    meter.repeats = options.repeats
    name = "".join(c if c.isalnum() else "-" for c in known["device"]).lower()
    results = Results(options.out / f"{name}-gpu.csv", known)
    bench = Bench(meter, results, with_compile=not options.no_compile)
    whole = run_part(options.part, bench, options.minutes)
    print(f"complete: {results.path}" if whole else "out of time: run again to go on")
    if bench.failed:
        print("not measured:", *bench.failed, sep="\n")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
