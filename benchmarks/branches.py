"""Each convolution of EPSANet alone: this package's kernels against torch's, in GFLOP/s.

    python benchmarks/branches.py [--rounds 5] [--out DIR] [--name NAME]

What the plan (epsa_fused._C.conv_plan) rests on: a convolution for which it names a kernel should
be faster here than in torch, contiguous or channels_last. The peak beside it is that of a large
matrix product on the same threads. Padding is counted as work for both.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import epsa_fused
from epsa_fused import _C

sys.path.insert(0, str(Path(__file__).parent))
from latency import commit, device_name
from measure import Timing, settle_allocator, time_in_turn

BATCH = 8
# planes and input size of the stages; the first block of a stage halves the size
STAGES = [(64, 56, 1), (128, 56, 2), (128, 28, 1), (256, 14, 1), (512, 14, 2), (512, 7, 1)]
NETWORKS = {
    "small": (1, ((3, 1), (5, 4), (7, 8), (9, 16))),
    "large": (2, ((3, 32), (5, 32), (7, 32))),
}


def cases() -> list[tuple[str, int, int, int, int, int]]:
    return [
        (network, scale * planes, size, stride, kernel, groups)
        for network, (scale, branches) in NETWORKS.items()
        for planes, size, stride in STAGES
        for kernel, groups in branches
    ]


def measure(case: tuple, threads: int, rounds: int) -> dict:
    network, planes, size, stride, kernel, groups = case
    channels = planes // 4
    x = torch.randn(BATCH, planes, size, size)
    w = torch.randn(channels, planes // groups, kernel, kernel) * 0.1
    last = torch.channels_last
    x_last, w_last = x.contiguous(memory_format=last), w.contiguous(memory_format=last)
    options = (None, stride, kernel // 2, 1, groups)

    def ours() -> torch.Tensor:
        return epsa_fused.convolution.spc_conv(
            x, [w], [groups], stride=stride, padding=[kernel // 2]
        )[0][0]

    runs = {
        "ours": ours,
        "torch": lambda: F.conv2d(x, w, *options),
        "torch channels_last": lambda: F.conv2d(
            x_last, w_last, None, stride, kernel // 2, 1, groups
        ),
    }
    expected = runs["torch"]()
    error = (ours() - expected).abs().max() / expected.abs().max()
    if not error < 1e-4:
        raise SystemExit(f"{case}: error {error:.1e}, expected below 1e-4")
    flops = 2 * expected.numel() * (planes // groups) * kernel**2
    timings = time_in_turn(runs, threads, rounds, 0.05)
    plan = _C.conv_plan(
        in_channels=planes,
        out_channels=channels,
        groups=groups,
        kernel=(kernel, kernel),
        height=size,
        width=size,
        stride=stride,
        padding=kernel // 2,
    )

    def rate(timing: Timing) -> float:
        return round(flops / timing.median / 1e9, 1)

    return {
        "network": network,
        "planes": planes,
        "size": size,
        "stride": stride,
        "kernel": kernel,
        "groups": groups,
        "method": plan["method"],
        "gflops": rate(timings["ours"]),
        "torch_gflops": rate(timings["torch"]),
        "torch_channels_last_gflops": rate(timings["torch channels_last"]),
    }


def peak(threads: int, rounds: int) -> float:
    """GFLOP/s of a large matrix product."""
    size = 1536
    a, b = torch.randn(size, size), torch.randn(size, size)
    timing = time_in_turn({"mm": lambda: a @ b}, threads, rounds, 0.2)["mm"]
    return 2 * size**3 / min(timing.times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="times that each is timed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="file name of the results; default: the device's name")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settle_allocator()
    device = device_name("cpu")
    facts = {
        "peak_gflops": round(peak(options.threads, options.rounds), 1),
        "device": device,
        "threads": options.threads,
        "isa": _C.cpu_isa(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(
        f"{'':>8}{'planes':>7}{'H':>4}{'stride':>7}{'kernel':>7}{'groups':>7}{'method':>11}", end=""
    )
    print(f"{'GFLOP/s':>9}{'torch':>8}{'ch.last':>9}")
    rows = []
    for case in cases():
        row = measure(case, options.threads, options.rounds)
        rows.append(row)
        network, planes, size, stride, kernel, groups = case
        print(
            f"{network:>8}{planes:>7}{size:>4}{stride:>7}{kernel:>7}{groups:>7}{row['method']:>11}"
            f"{row['gflops']:>9.0f}{row['torch_gflops']:>8.0f}"
            f"{row['torch_channels_last_gflops']:>9.0f}",
            flush=True,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    name = options.name or "".join(c if c.isalnum() else "-" for c in device).strip("-")
    path = options.out / f"{name}-branches.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts], lineterminator=os.linesep)
        writer.writeheader()
        writer.writerows(row | facts for row in rows)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
