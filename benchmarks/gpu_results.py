"""The table of what was measured on a GPU: <out>/<device>-gpu.csv."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path

import torch
from opponents import Case
from provenance import commit, programs, sources

KEY = ("kind", "mode", "layout", "dtype", "n", "planes", "size", "contender")
FIELDS = [
    *KEY,
    *("device_us", "iqr_us", "wall_us", "gb_per_s", "of_copy", "peak_mb", "kernels", "memsets"),
    *("error", "timing", "device", "torch", "cuda", "sources", "commit", "date"),
    # A file that was written before these were has rows without them.
    *("se_error", "reference", "programs"),
]
# What a row must share with a new one to count as done.
SAME = ("sources", "programs", "torch")


def key_of(row: dict) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def case_columns(kind: str, case: Case) -> dict:
    """The columns of the key but for the contender."""
    return {"kind": kind} | {name: getattr(case, name) for name in KEY[1:-1]}


def facts() -> dict[str, str]:
    """What every new row says of the machine and of what ran."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "sources": sources(),
        "programs": programs(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


class Results:
    """The CSV: the rows that it holds for this code and this torch, and new ones."""

    def __init__(self, path: Path, facts: dict[str, str]) -> None:
        self.path, self.facts = path, facts
        rows, fields = [], FIELDS
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                rows, fields = list(reader), list(reader.fieldnames or ())
        if not {*KEY, "sources"} <= set(fields) <= set(FIELDS):
            raise SystemExit(f"{path}: expected the columns of this benchmark, found {fields}")
        self.done = {key_of(r) for r in rows if all(r.get(name) == facts[name] for name in SAME)}
        if not path.exists() or fields != FIELDS:
            self._write(rows)

    def _write(self, rows: list[dict]) -> None:
        """All at once, so that a stop leaves the old file or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)

    def add(self, row: dict) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS, lineterminator="\n").writerow(row | self.facts)
        self.done.add(key_of(row))
