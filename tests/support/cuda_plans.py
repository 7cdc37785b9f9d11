"""Questions to the launch plan of the CUDA kernels, and the shapes that the tests ask about."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from devices import BRANCHES, LARGE_STAGES, STAGES

from epsa_fused import _C

SIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
LAYOUTS = ("contiguous", "channels_last")
PASSES = ("forward", "backward")

# The registers of a multiprocessor on all these devices, and the shared memory that the system adds
# to each block.
REGISTERS = 65536
SYSTEM_SHARED = 1024


@dataclass(frozen=True)
class Problem:
    pass_: str
    samples: int
    branches: int
    channels: int
    pixels: int
    hidden: int
    shared: bool = True
    dtype: str = "float32"
    layout: str = "contiguous"
    aligned: bool | None = None
    pooled_given: bool = False
    grad_out_given: bool = True
    feats_wanted: bool = True
    weights_wanted: bool = True

    @property
    def vector(self) -> int:
        return self.branches * self.channels

    @property
    def accumulator(self) -> int:
        return 8 if self.dtype == "float64" else 4

    def may_align(self) -> bool:
        """Are the slots of one [N, S*C, H, W] tensor whole multiples of 16 bytes?"""
        run = self.channels * (self.pixels if self.layout == "contiguous" else 1)
        return self.dtype != "float64" and run * SIZE[self.dtype] % 16 == 0


def plans(device: _C.CudaDevice, problem: Problem) -> list[dict]:
    return _C.cuda_plans(device, **vars(problem))


def combinations(shapes: list[tuple[int, ...]], dtypes: tuple[str, ...]) -> Iterator[Problem]:
    """Every pass, layout and dtype for (samples, branches, channels, pixels)."""
    for shape, dtype, layout, pass_ in itertools.product(shapes, dtypes, LAYOUTS, PASSES):
        hidden = max(1, min(64, shape[2] // 16))
        yield Problem(pass_, *shape, hidden, dtype=dtype, layout=layout)


def stage_shapes(stages, batches: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [
        (n, BRANCHES, planes // BRANCHES, height * width)
        for n in batches
        for planes, height, width in stages
    ]


def stage(planes: int, height: int, width: int, n: int, pass_: str, **options) -> Problem:
    channels = planes // BRANCHES
    return Problem(pass_, n, BRANCHES, channels, height * width, channels // 16, **options)


EPSANET = [(planes, size, size) for planes, size in (*STAGES, *LARGE_STAGES)]


def piece_bytes(problem: Problem, split: dict) -> int:
    """The bytes of the largest part."""
    pixels_last = problem.layout == "channels_last"
    unit = problem.vector if pixels_last else split["planes"] * problem.pixels
    return ceil(split["units"] / split["parts"]) * unit * SIZE[problem.dtype]


def blocks_on_multiprocessor(device: _C.CudaDevice, problem: Problem, plan: dict) -> int:
    registers = plan["threads"] * (128 if problem.dtype == "float64" else 64)
    return min(
        REGISTERS // registers,
        device.threads_per_multiprocessor // plan["threads"],
        device.shared_per_multiprocessor // (plan["shared_bytes"] + SYSTEM_SHARED),
        device.blocks_per_multiprocessor,
    )
