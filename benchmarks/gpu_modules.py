"""Whole modules in bfloat16 on a GPU, in inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_bench import STAGES, Bench
from gpu_results import case_columns
from opponents import LAYOUTS, Case, LayersModule, make_inputs

import epsa_fused

CONTENDERS = {
    "fused": epsa_fused.FusedPSAModule,
    "layers": LayersModule,
    "published eager": epsa_fused.PSAModule,
}


def cases() -> Iterator[Case]:
    """Most wanted first."""
    for n in (64, 8, 1):
        for planes, size in STAGES:
            for layout in LAYOUTS:
                yield Case("module", "forward", layout, "bfloat16", n, planes, size)


def steps(bench: Bench) -> Iterator[Callable[[], None]]:
    for case in cases():
        yield partial(run, case, bench)


def run(case: Case, bench: Bench) -> None:
    if not bench.names_missing(case_columns("module", case), CONTENDERS):
        return
    layout, device = LAYOUTS[case.layout], bench.meter.device

    def module(kind: type[epsa_fused.PSAModule], dtype: torch.dtype) -> torch.nn.Module:
        torch.manual_seed(0)
        built = kind(case.planes, case.planes).to(torch.bfloat16).requires_grad_(False)
        return built.to(device, dtype, memory_format=layout)

    (image,), _, _ = make_inputs(case, device)
    sets = [(image.clone(),) for _ in range(bench.meter.sets(image.nbytes))]
    exact = module(epsa_fused.PSAModule, torch.float64)(image.double())
    contenders = {name: module(kind, torch.bfloat16) for name, kind in CONTENDERS.items()}
    bench.take_inference("module", case, contenders, sets, exact)
