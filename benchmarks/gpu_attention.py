"""The attention step on a GPU, forward and backward, beside a copy of the features' bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from exact import relative_error
from gpu_bench import STAGES, Bench, copied
from gpu_results import case_columns
from opponents import LAYOUTS, Case, Inputs, Runner, make_inputs, make_runner, rewrite
from torch import Tensor

import epsa_fused

# The function of each contender, and the mode of torch.compile; None: eager.
CONTENDERS: dict[str, tuple[Callable, str | None]] = {
    "fused": (epsa_fused.psa_attention, None),
    "rewrite compiled": (rewrite, "default"),
    "published compiled": (epsa_fused.psa_attention_reference, "max-autotune-no-cudagraphs"),
    "published eager": (epsa_fused.psa_attention_reference, None),
    "rewrite eager": (rewrite, None),
}
# All cases of one pass come before the next pass.
PASSES = (
    ("fused",),
    ("rewrite compiled",),
    ("published compiled", "published eager", "rewrite eager"),
)


def cases() -> Iterator[Case]:
    """Most wanted first."""
    for stages, n in ((STAGES[:2], 64), (STAGES[:2], 256), (STAGES, 1), (STAGES[2:], 64)):
        dtypes = ("float32", "bfloat16") if n > 1 else ("float32",)
        for mode, (planes, size), dtype, layout in itertools.product(
            ("forward", "backward"), stages, dtypes, LAYOUTS
        ):
            yield Case("attention", mode, layout, dtype, n, planes, size)


def steps(bench: Bench) -> Iterator[Callable[[], None]]:
    for names in PASSES:
        for case in cases():
            yield partial(run, case, names, bench)


def run(case: Case, names: tuple[str, ...], bench: Bench) -> None:
    base = case_columns("attention", case)
    todo = bench.names_missing(base, names)
    if not todo:
        return
    torch._dynamo.reset()
    sets, device = bench.meter.sets(case.nbytes), bench.meter.device
    inputs = make_inputs(case, device)
    exact = make_runner(
        "",
        epsa_fused.psa_attention_reference,
        replace(case, dtype="float64"),
        device,
        copied(inputs, torch.float64),
    ).result()
    copy = copy_columns(case, sets, bench)
    if bench.missing(base | {"contender": "copy"}):
        bench.take(base | {"contender": "copy"}, lambda: copy)
    for name in todo:
        bench.take(
            base | {"contender": name},
            partial(measure, case, name, inputs, sets, [t.detach() for t in exact], copy, bench),
        )


def measure(
    case: Case,
    name: str,
    inputs: Inputs,
    sets: int,
    exact: list[Tensor],
    copy: dict,
    bench: Bench,
) -> dict:
    kind, mode = CONTENDERS[name]
    function = torch.compile(kind, dynamic=False, mode=mode) if mode else kind
    # The runner gets no name: the function was compiled above, once for all sets.
    runners: list[Runner] = [
        make_runner("", function, case, bench.meter.device, copied(inputs)) for _ in range(sets)
    ]
    error = relative_error([t.detach() for t in runners[0].result()], exact)
    row = bench.meter.columns([runner.run for runner in runners])
    rate = gb_per_s((2 if case.mode == "forward" else 3) * case.nbytes, row["device_us"])
    return row | {
        "gb_per_s": rate,
        "of_copy": round(rate / copy["gb_per_s"], 3),
        "error": f"{error:.2e}",
    }


def copy_columns(case: Case, sets: int, bench: Bench) -> dict:
    """A copy of the features' bytes, into memory that was written before, as in the graphs."""
    device = bench.meter.device
    generator = torch.Generator(device).manual_seed(0)
    pairs = [
        torch.randn(2, case.nbytes // 4, generator=generator, device=device).unbind()
        for _ in range(sets)
    ]
    row = bench.meter.time_columns([lambda p=p: p[1].copy_(p[0]) for p in pairs])
    return row | {"gb_per_s": gb_per_s(2 * case.nbytes, row["device_us"])}


def gb_per_s(nbytes: int, microseconds: float) -> float:
    return round(nbytes / microseconds / 1e3, 1)
