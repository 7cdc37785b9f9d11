"""Which rows are missing, and how one is measured, written and printed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from exact import relative_error
from gpu_results import Results, case_columns, key_of
from gpu_timing import Meter
from opponents import Case, Inputs
from torch import Tensor

# (planes, H = W) of EPSANet's stages.
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))


@dataclass
class Bench:
    """A run: what measures, where rows go, and which rows could not be measured."""

    meter: Meter
    results: Results
    with_compile: bool = True
    failed: list[str] = field(default_factory=list)

    def missing(self, row: dict) -> bool:
        wanted = self.with_compile or not row["contender"].endswith("compiled")
        return wanted and key_of(row) not in self.results.done

    def names_missing(self, base: dict, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.missing(base | {"contender": name})]

    def take(self, row: dict, measure: Callable[[], dict]) -> None:
        """Measure a row and write it. One that fails is named, and the others go on."""
        try:
            row = row | measure()
        except RuntimeError as error:
            if is_out_of_memory(error):  # a fact of the device, no fault
                print(f"{described(row)}: left out, {first_line(error)}", flush=True)
            else:
                self.failed.append(f"{described(row)}: {first_line(error)}")
                print(f"FAILED {self.failed[-1]}", file=sys.stderr, flush=True)
        else:
            self.results.add(row)
            print(f"{described(row)}  {figures(row)}", flush=True)
        release_memory()

    def take_inference(
        self,
        kind: str,
        case: Case,
        contenders: dict[str, Callable],
        sets: list[tuple],
        exact: Tensor,
    ) -> None:
        """The missing rows of the contenders, called with each of the sets of arguments."""

        def measure(function: Callable) -> dict:
            calls = [partial(function, *arguments) for arguments in sets]
            error = relative_error([calls[0]()], [exact])
            return self.meter.columns(calls) | {"error": f"{error:.2e}"}

        base = case_columns(kind, case)
        for name in self.names_missing(base, contenders):
            self.take(base | {"contender": name}, partial(measure, contenders[name]))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Did the device lack memory? cuDNN tries one plan after another, and then names no memory."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in text for words in ("unable to find an engine", "ALLOC_FAILED")
    )


def release_memory() -> None:
    """Of networks, which hold each other in cycles, and of graphs that nobody holds."""
    gc.collect()
    torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def described(row: dict) -> str:
    shape = f"({row['n']}, {row['planes']}, {row['size']})"
    names = f"{row['kind']} {row['mode']} {row['dtype']} {row['layout']} {shape}"
    return f"{names}: {row['contender']}"


def figures(row: dict) -> str:
    """What a row has of the most wanted columns."""
    words = [f"{row['device_us']} us"]
    if row["timing"] != "graph":
        words.append(row["timing"])
    if "of_copy" in row:
        words.append(f"{row['of_copy']:.0%} of the copy's bytes/s")
    for name, title in (("wall_us", "wall us"), ("peak_mb", "peak MB"), ("error", "error")):
        if name in row:
            words.append(f"{title} {row[name]}")
    if "kernels" in row:
        words.append(f"kernels {row['kernels']}+{row['memsets']}")
    return ", ".join(words)


def copied(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    maps, weights, grad = inputs

    def copy(t: Tensor) -> Tensor:
        return t.detach().to(dtype or t.dtype, copy=True)

    return [copy(t) for t in maps], [copy(t) for t in weights], copy(grad)
