"""Serving EPSANet-50 on a CPU: the fused network, and what people would use in its place.

    python benchmarks/serving.py                     speed and start, batches of 1 and 8
    python benchmarks/serving.py --part speed --batch 1 --dtype bfloat16 --threads 1
    python benchmarks/serving.py --part start --batch 1
    python benchmarks/serving.py --table FILE        a result's tables, as docs/serving.md has them
    python benchmarks/serving.py --help

OpenVINO and ONNX Runtime take part where they are installed, as the extra bench-serving does it.
Every contender's logits are compared with float64. The part "speed" times all in turn, round by
round, in one process. A ratio is the median of the rounds' ratios. The part "start" runs each one
in a process of its own, from nothing to the first logits, with Inductor's caches empty.

Results go into a CSV in --out. Rows of the same contender, dtype, batch and threads are replaced,
others stay. So a grid can be measured in pieces. Each row has its own commit and date; rows of
another machine, other versions or another image size are refused.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from exact import allowed_error, distance, largest
from latency import device_name
from measure import Timing, ratio, settle_allocator, time_in_turn
from provenance import commit
from serving_contenders import CONTENDERS, OURS, Setting, network, prepare, versions, why_not
from serving_results import check_facts, merge, read, tables
from serving_start import start
from torch import Tensor

import epsa_fused
from epsa_fused import _C

SIZE = 224
# So many roundings of the largest logit beside FACTOR times eager PyTorch's error.
ROUNDINGS = 16


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 8])
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--threads", type=positive, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument(
        "--contender", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS)
    )
    parser.add_argument("--rounds", type=positive, default=7, help="times that each one is timed")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing in each round")
    parser.add_argument("--starts", type=positive, default=3, help="processes of each contender")
    parser.add_argument("--size", type=positive, default=SIZE, help="height and width of images")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--name", default="serving", help="file name of the results")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print tables, measure nothing")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"--seconds: expected more than 0, got {options.seconds}")
    if options.table and not options.table.is_file():
        parser.error(f"--table: expected a result's CSV, found no file {options.table}")
    return options


@dataclass(frozen=True)
class Reference:
    """The exact logits, and how far others may be from them."""

    exact: Tensor
    allowed: float

    @staticmethod
    def of(images: Tensor, dtype: torch.dtype) -> Reference:
        images = images.contiguous(memory_format=torch.channels_last)
        exact = network(False, torch.float64)(images.to(dtype).double())
        usual = network(False, dtype)(images.to(dtype))
        return Reference(exact, allowed_error(exact, usual, ROUNDINGS * torch.finfo(dtype).eps))

    def error(self, name: str, logits: Any) -> str:
        """The largest error over the largest logit; exits where rounding does not explain it."""
        error = distance(torch.as_tensor(logits), self.exact)
        if not error <= self.allowed:
            raise SystemExit(f"{name}: error {error:.3g}, expected at most {self.allowed:.3g}")
        return f"{error / largest(self.exact):.2g}"


def measure_speed(
    names: list[str], setting: Setting, reference: Reference, options: argparse.Namespace
) -> list[dict]:
    """All contenders in this process; what is timed was checked before."""
    torch.set_num_threads(setting.threads)
    torch._dynamo.reset()
    runs, errors = {}, {}
    for name in names:
        runs[name] = CONTENDERS[name].load(setting)
        errors[name] = reference.error(f"{name}, {setting.dtype}", runs[name]())
    settle_allocator()
    timings = time_in_turn(runs, setting.threads, options.rounds, options.seconds)
    return [
        {"contender": name, "error": errors[name], **speed_columns(timings, name, reference)}
        for name in names
    ]


def speed_columns(timings: dict[str, Timing], name: str, reference: Reference) -> dict:
    timing = timings[name]
    return {
        "median_ms": round(timing.median * 1e3, 2),
        "iqr_ms": round(timing.iqr * 1e3, 2),
        "images_per_s": round(len(reference.exact) / timing.median, 1),
        "over_ours": round(ratio(timing, timings[OURS]), 3) if OURS in timings else "",
    }


def measure_start(
    names: list[str], setting: Setting, reference: Reference, options: argparse.Namespace
) -> list[dict]:
    """Each contender in processes of its own, in turn; medians."""
    package = Path(epsa_fused.__file__).parents[1]
    found: dict[str, list] = {name: [] for name in names}
    errors = {}
    for _ in range(options.starts):
        for name in names:
            begun = start(name, setting, package)
            errors[name] = reference.error(f"{name}, {setting.dtype}", begun.logits)
            found[name].append(begun)
    return [
        {
            "contender": name,
            "start_s": round(statistics.median(s.seconds for s in starts), 2),
            "memory_mb": round(statistics.median(s.resident for s in starts) / 2**20),
            "error": errors[name],
        }
        for name, starts in found.items()
    ]


PARTS = {"speed": measure_speed, "start": measure_start}


def print_rows(rows: list[dict]) -> None:
    first = rows[0]
    print(
        f"\n{first['part']}: {first['dtype']}, batch {first['batch']}, {first['threads']} threads"
    )
    for row in rows:
        if row["part"] == "speed":
            text = f"{row['median_ms']:8.2f} ms ±{row['iqr_ms']:<6} {row['images_per_s']:8.1f} "
            text += f"images/s  {row['over_ours']:>6}x"
        else:
            text = f"{row['start_s']:8.2f} s  {row['memory_mb']:6} MB"
        print(f"  {row['contender']:38} {text}", flush=True)


def main(arguments: list[str] | None = None) -> Path:
    options = parse_arguments(arguments)
    if options.table:
        print(tables(read(options.table)))
        return options.table
    facts = {
        "size": str(options.size),
        "device": device_name("cpu"),
        "isa": _C.cpu_isa(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    path = options.out / f"{options.name}.csv"
    check_facts(path, facts)
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    for name, dtype in itertools.product(options.contender, options.dtype):
        if why_not(name, dtype):
            print(f"left out: {name} in {dtype}, {why_not(name, dtype)}", flush=True)
    for dtype, batch, threads in itertools.product(options.dtype, options.batch, options.threads):
        names = [name for name in options.contender if not why_not(name, dtype)]
        if not names:
            continue
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            setting = Setting(dtype, threads, Path(folder))
            generator = torch.Generator().manual_seed(1)
            images = torch.randn(batch, 3, options.size, options.size, generator=generator)
            prepare(setting.folder, images, names)
            reference = Reference.of(images, getattr(torch, dtype))
            for part in options.part:
                cell = {"part": part, "dtype": dtype, "batch": batch, "threads": threads}
                rows = [
                    cell | row | facts for row in PARTS[part](names, setting, reference, options)
                ]
                print_rows(rows)
                merge(path, rows)  # so that a stopped run keeps what it has
    print(f"\nwrote {path}")
    return path


if __name__ == "__main__":
    main()
