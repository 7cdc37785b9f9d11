"""Latency of the fused operators and of their opponents.

    python benchmarks/latency.py                 the attention step and the whole module
    python benchmarks/latency.py --level network EPSANet-50, forward and training steps
    python benchmarks/latency.py --quick         two shapes, about a minute
    python benchmarks/latency.py --help

It checks that all contenders give equal results, then times them in turn, round by round, in one
process. A ratio is the median of the rounds' ratios. It writes a CSV and a chart into --out.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr

import torch
import torch._functorch.config
import torch.nn.functional as F

import epsa_fused
from epsa_fused import _C

sys.path.insert(0, str(Path(__file__).parent))
from chart import draw
from measure import memory_and_launches, ratio, settle_allocator, time_in_turn
from opponents import (
    BRANCHES,
    DTYPES,
    LAYOUTS,
    Case,
    contenders,
    limits,
    make_copy,
    make_runner,
)
from provenance import commit

# (N, planes, H = W): EPSANet's stages, single images, and a batch larger than the caches.
SHAPES = [
    (8, 64, 56),
    (8, 128, 28),
    (8, 256, 14),
    (8, 512, 7),
    (1, 64, 56),
    (1, 512, 14),
    (32, 64, 56),
]
LEVEL_SHAPES = {
    "attention": SHAPES,
    "convolutions": SHAPES[:-1],
    "module": SHAPES[:-1],
    "network": [(1, 50, 224), (8, 50, 224)],  # EPSANet-50; trained with the larger batch
}
QUICK_SHAPES = [(8, 64, 56), (8, 256, 14)]
LEVELS = tuple(LEVEL_SHAPES)
MODES = {
    "attention": ("forward", "backward"),
    "convolutions": ("forward", "train"),
    "module": ("forward", "train"),
    "network": ("forward", "train"),
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--level",
        nargs="+",
        default=["attention", "module"],
        choices=LEVELS,
        help="default: attention module",
    )
    parser.add_argument(
        "--mode", nargs="+", choices=("forward", "backward", "train"), help="default: per level"
    )
    parser.add_argument("--layout", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=list(DTYPES))
    parser.add_argument(
        "--shape", nargs="+", metavar="N,PLANES,SIZE", help="default: EPSANet's stages"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9, help="times that each contender is timed")
    parser.add_argument("--seconds", type=float, default=0.1, help="of timing in each round")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="two shapes, short rounds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="file name of the results; default: the device's name")
    options = parser.parse_args(arguments)
    options.shapes = LEVEL_SHAPES | ({"attention": QUICK_SHAPES} if options.quick else {})
    if options.shape:
        try:
            given = [tuple(int(x) for x in s.split(",")) for s in options.shape]
            if any(len(s) != 3 or min(s) < 1 for s in given):
                raise ValueError
            options.shapes = dict.fromkeys(LEVELS, given)
        except ValueError:
            parser.error(f"--shape: expected N,PLANES,SIZE such as 8,64,56, got {options.shape}")
    if options.device == "cuda" and not (torch.cuda.is_available() and _C.build_info()["cuda"]):
        parser.error("--device cuda: expected a GPU and a build with CUDA kernels, found neither")
    if options.quick:
        options.level = ("attention",)
        options.layout = options.layout[:1]
        options.rounds, options.seconds = 5, 0.05
    return options


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cases(options: argparse.Namespace) -> list[Case]:
    return [
        Case(level, mode, layout, dtype, *shape)
        for level in options.level
        for mode in options.mode or MODES[level]
        for layout in options.layout
        for dtype in options.dtype
        for shape in options.shapes[level]
        if options.shape or level != "network" or mode == "forward" or shape[0] > 1
    ]


def check_equal(case: Case, exact: list[torch.Tensor], results: dict[str, list]) -> None:
    """Exit if a contender's result differs from the float64 reference.

    The tests judge accuracy. This limit is wide: the gradient of a bias may be a sum that cancels
    to a thousandth of its terms. In 16 bits plain PyTorch loses such gradients of a module's SE
    layers altogether. All are judged there by the output and the convolutions' gradients.
    """
    wide = DTYPES[case.dtype].itemsize >= 4
    limit = 1e-2 if wide else 1e-1
    judged = 2 + BRANCHES if case.level == "module" and not wide else len(exact)
    for name, result in results.items():
        for i, (value, expected) in enumerate(zip(result[:judged], exact[:judged], strict=True)):
            largest = expected.abs().max().clamp_min(1e-30)
            error = (value.double() - expected).abs().max() / largest
            if not error <= limit:
                raise SystemExit(
                    f"{case}: result {i} of {name} has error {error:.1e}, expected <= {limit:.0e}"
                )


def measure(case: Case, options: argparse.Namespace) -> list[dict]:
    """Check and time every contender on one case; one row each."""
    torch._dynamo.reset()
    kinds = contenders(case.level, case.mode, not options.no_compile)
    runners = {n: make_runner(n, kind, case, options.device) for n, kind in kinds.items()}
    exact = make_runner(
        "published eager", kinds["published eager"], replace(case, dtype="float64"), options.device
    )
    check_equal(case, exact.result(), {name: r.result() for name, r in runners.items()})
    del exact
    runners["copy"] = make_copy(case, options.device)
    for name, kind in limits(case.level, not options.no_compile).items():
        runners[name] = make_runner(name, kind, case, options.device)
    runs = {name: runner.run for name, runner in runners.items()}
    timings = time_in_turn(runs, options.threads, options.rounds, options.seconds)
    rows = []
    for name, timing in timings.items():
        memory, launches = memory_and_launches(runs[name], options.device)
        rows.append(
            {
                "level": case.level,
                "mode": case.mode,
                "layout": case.layout,
                "dtype": case.dtype,
                "n": case.n,
                "planes": case.planes,
                "size": case.size,
                "contender": name,
                "median_us": round(timing.median * 1e6, 2),
                "iqr_us": round(timing.iqr * 1e6, 2),
                "over_fused": round(ratio(timing, timings["fused"]), 3),
                "over_copy": round(ratio(timing, timings["copy"]), 3),
                "gb_per_s": bandwidth(case, name, timing.median),
                "peak_mb": round(memory / 1e6, 3),
                "launches": launches if counts_launches(name, options.device) else "",
            }
        )
    return rows


def bandwidth(case: Case, name: str, seconds: float) -> float | str:
    """GB/s of the fewest bytes that must move: maps in and out, or G, F and dF.

    Blank for levels with convolutions, whose bytes are not counted.
    """
    if case.level != "attention":
        return ""
    passes = 2 if name == "copy" else {"forward": 2, "backward": 3, "train": 5}[case.mode]
    return round(passes * case.nbytes / seconds / 1e9, 2)


def counts_launches(name: str, device: str) -> bool:
    """Whether launches can be counted: on the CPU they are operators, which compiled code lacks."""
    return device == "cuda" or not name.endswith("compiled")


def host_rows(options: argparse.Namespace) -> list[dict]:
    """The cost of one call with grad and nothing to compute."""
    device = options.device
    feats = [torch.randn(1, 8, 1, 1, device=device, requires_grad=True) for _ in range(BRANCHES)]
    shapes = ((2, 8), (2,), (8, 2), (8,))
    weights = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
    x = torch.randn(1, 8, device=device, requires_grad=True)
    runs = {
        "fused": lambda: epsa_fused.psa_attention(feats, *weights),
        "torch.add": lambda: torch.add(x, x),
        "F.linear": lambda: F.linear(x, weights[0], weights[1]),
    }
    timings = time_in_turn(runs, options.threads, options.rounds, options.seconds)
    return [
        {
            "level": "host",
            "mode": "forward",
            "layout": "contiguous",
            "dtype": "float32",
            "n": 1,
            "planes": 32,
            "size": 1,
            "contender": name,
            "median_us": round(timing.median * 1e6, 2),
            "iqr_us": round(timing.iqr * 1e6, 2),
            "over_fused": round(ratio(timing, timings["fused"]), 3),
        }
        for name, timing in timings.items()
    ]


def print_table_row(rows: list[dict]) -> None:
    by_name = {row["contender"]: row for row in rows}
    fused = by_name["fused"]
    others = [row for row in rows if row["contender"] not in ("fused", "copy")]
    not_opponents = ("fused", *limits(fused["level"], with_compile=True))
    opponents = [row for row in others if not row["contender"].startswith(not_opponents)]
    best = min(opponents, key=lambda row: row["over_fused"])
    columns = "".join(f"{row['median_us']:>12.0f}" for row in others)
    shape = f"({fused['n']}, {fused['planes']}, {fused['size']})"
    print(
        f"{shape:>14}{columns}{fused['median_us']:>10.0f} ±{fused['iqr_us']:<6.0f}"
        f"{best['over_fused']:>6.2f}x {by_name['published eager']['over_fused']:>8.1f}x"
        f"{fused['over_copy']:>9.2f}{fused['gb_per_s']:>8}{fused['peak_mb']:>9.1f}"
        f"{fused['launches']:>6}",
        flush=True,
    )


def print_header(case: Case, names: list[str]) -> None:
    shorter = {"compiled": "comp.", "rewrite": "rewr.", "fused ": "", "without PSA": "no PSA"}
    for long, short in shorter.items():
        names = [name.replace(long, short) for name in names]
    print(f"\n{case.level}, {case.mode}, {case.layout}, {case.dtype}: median microseconds")
    print(
        f"{'(N,planes,H)':>14}"
        + "".join(f"{name:>12}" for name in names)
        + f"{'fused':>10} {'±IQR':<7}{'best':>6}  {'published':>9}{'copies':>9}"
        + f"{'GB/s':>8}{'peak MB':>9}{'calls':>6}"
    )


def main(arguments: list[str] | None = None) -> Path:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    # The compiled backward is timed with retain_graph, which forbids donated buffers.
    torch._functorch.config.donated_buffer = False
    device = device_name(options.device)
    facts = {
        "device": device,
        "threads": options.threads,
        "isa": _C.cpu_isa(),
        "torch": torch.__version__,
        "epsa_fused": epsa_fused.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(
        "best, published: the time of the fastest opponent, and of the published code (eager), "
        "over the fused time. copies: the fused time over that of copying the features."
    )

    settle_allocator()
    rows = host_rows(options)
    host = {row["contender"]: row["median_us"] for row in rows}
    print("\nhost cost of one call with grad, [1, 4x8, 1, 1], microseconds:", end=" ")
    print(", ".join(f"{name} {us:.1f}" for name, us in host.items()))

    todo, group = cases(options), None
    for i, case in enumerate(todo, 1):
        if group != (case.level, case.mode, case.layout, case.dtype):
            group = (case.level, case.mode, case.layout, case.dtype)
            with_compile = not options.no_compile
            names = [*contenders(case.level, case.mode, with_compile)]
            names += limits(case.level, with_compile)
            print_header(case, [name for name in names if name != "fused"])
        progress = f"[{i}/{len(todo)}] {case.level} {case.mode} {case.shape}"
        if sys.stderr.isatty():
            print(progress, end="\r", file=sys.stderr, flush=True)
        new = measure(case, options)
        rows += new
        print_table_row(new)

    options.out.mkdir(parents=True, exist_ok=True)
    name = options.name or "".join(c if c.isalnum() else "-" for c in device).strip("-")
    path = options.out / f"{name}.csv"
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*fields, *facts], lineterminator=os.linesep)
        writer.writeheader()
        writer.writerows(row | facts for row in rows)
    chart = path.with_suffix(".png")
    draw(rows, facts, chart)
    print(f"\nwrote {path} and {chart}")
    return path


if __name__ == "__main__":
    main()
