"""The CSV of benchmarks/serving.py, which grows by pieces, and the tables of docs/serving.md.

Every row has the facts of its own run. Rows of different commits may stand side by side. Rows of
another machine, other versions or other images may not.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

from serving_contenders import OURS

KEY = ("part", "contender", "dtype", "batch", "threads")
# One file has one value of each.
COMMON = ("size", "device", "isa", "versions")
SPEED = ("median_ms", "iqr_ms", "images_per_s", "over_ours")
START = ("start_s", "memory_mb")
FIELDS = (*KEY, *SPEED, *START, "error", *COMMON, "commit", "date")

Row = dict[str, str]
COMPILER = "a C++ compiler"
# The steps of docs/serving.md, as contender: (name, what it needs), and what else there is.
LADDER = {
    "published": ("published code, channels_last", ""),
    "published, frozen": ("the same, compiled and frozen", COMPILER),
    "fused, packed": ("`fuse`, `prepack(frozen=True)`, channels_last", ""),
    f"{OURS}, compile=False": ("`optimize_for_inference(..., compile=False)`", ""),
    OURS: ("`optimize_for_inference(...)`", COMPILER),
}
LAST_STEP = ("the same, `dtype=torch.bfloat16`", f"{COMPILER}, AMX or AVX512_BF16")
OTHERS = {
    "OpenVINO": ("OpenVINO", "openvino"),
    "ONNX Runtime": ("ONNX Runtime", "onnx, onnxruntime"),
}
PACKAGES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise SystemExit(f"{path}: expected the columns of this benchmark, found others")
        return list(reader)


def check_facts(path: Path, facts: dict[str, str]) -> None:
    """Exit if rows with these facts may not stand in the file."""
    for row in read(path) if path.exists() else ():
        for name in COMMON:
            if row[name] != facts[name]:
                raise SystemExit(
                    f"{path} has rows of {name} {row[name]!r}, this run is of {facts[name]!r}; "
                    "give it another file by --name"
                )


def merge(path: Path, rows: list[dict]) -> None:
    """Replace the rows of the same keys, keep the others; a stopped run leaves the file whole."""
    new = [{field: str(row.get(field, "")) for field in FIELDS} for row in rows]
    merged = {
        tuple(row[name] for name in KEY): row for row in (read(path) if path.exists() else [])
    }
    merged |= {tuple(row[name] for name in KEY): row for row in new}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())
    os.replace(partial, path)


def tables(rows: list[Row]) -> str:
    """The tables of docs/serving.md: one for each number of threads, most first, and the start."""
    found = {tuple(row[name] for name in KEY): row for row in rows}
    threads = sorted({row["threads"] for row in rows if row["part"] == "speed"}, key=int)
    parts = [speed_table(found, number) for number in reversed(threads)]
    if any(row["part"] == "start" for row in rows):
        parts.append(start_table(rows))
    return "\n\n".join(parts)


def line(*columns: str) -> str:
    return "|" + "|".join(f" {column} " if column else " " for column in columns) + "|"


def speed_table(found: dict[tuple[str, ...], Row], threads: str) -> str:
    batches = sorted({k[3] for k in found if k[0] == "speed" and k[4] == threads}, key=int)

    def times(contender: str, dtype: str) -> list[float] | None:
        keys = [("speed", contender, dtype, batch, threads) for batch in batches]
        return (
            [float(found[k]["median_ms"]) for k in keys] if all(k in found for k in keys) else None
        )

    def cells(values: list[float] | None, form: str = "{:.0f}") -> str:
        return " / ".join(map(form.format, values)) if values else "-"

    def over(before: list[float] | None, values: list[float] | None) -> str:
        if not before or not values:
            return ""
        return cells([a / b for a, b in zip(before, values, strict=True)], "{:.1f}x")

    title = f"batch {' / '.join(batches)}"
    lines = [
        line("step", "needs", f"float32, {title}", "over the step before", f"bfloat16, {title}"),
        "|---|---|---|---|---|",
    ]
    before = None
    for number, (contender, (name, needs)) in enumerate(LADDER.items(), 1):
        values = times(contender, "float32")
        half = "" if contender == OURS else cells(times(contender, "bfloat16"))
        lines.append(line(f"{number}. {name}", needs, cells(values), over(before, values), half))
        before = values
    values = times(OURS, "bfloat16")
    name, needs = LAST_STEP
    lines.append(line(f"{len(LADDER) + 1}. {name}", needs, "", over(before, values), cells(values)))
    for contender, (name, needs) in OTHERS.items():
        values, half = times(contender, "float32"), times(contender, "bfloat16")
        if values or half:
            row = next(r for k, r in found.items() if k[1] == contender)
            title = f"{name} {version(row, contender)}"
            lines.append(line(title, needs, cells(values), "", cells(half)))
    return "\n".join(lines)


def version(row: Row, contender: str) -> str:
    """Major and minor, as "2026.4"."""
    versions = dict(entry.split(" ") for entry in row["versions"].split(", "))
    return ".".join(versions[PACKAGES[contender]].split(".")[:2])


def start_table(rows: list[Row]) -> str:
    """Of the smallest batch and the most threads that every start was measured with."""
    starts = [row for row in rows if row["part"] == "start"]
    batch = min((row["batch"] for row in starts), key=int)
    threads = max((row["threads"] for row in starts), key=int)
    here = {
        (row["contender"], row["dtype"]): row
        for row in starts
        if (row["batch"], row["threads"]) == (batch, threads)
    }
    lines = ["| | float32: seconds | MB | bfloat16: seconds | MB |", "|---|---|---|---|---|"]
    for contender, (name, _) in {**LADDER, **OTHERS}.items():
        columns = [name.replace("the same", "published code, channels_last")]
        for dtype in ("float32", "bfloat16"):
            row = here.get((contender, dtype))
            columns += [f"{float(row['start_s']):.1f}", row["memory_mb"]] if row else ["-", "-"]
        if columns[1:] != ["-"] * 4:
            lines.append(line(*columns))
    return "\n".join(lines)
