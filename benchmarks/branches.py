"""The convolutions of EPSANet: this package's kernels against torch's, in GFLOP/s.

    python benchmarks/branches.py [--rounds 5] [--out DIR] [--name NAME]

Each convolution is timed alone, and all branches of each stage's module in one call ("all"). The
times justify the plan (epsa_fused._C.conv_plan): a convolution with a kernel here should be faster
than torch's, contiguous or channels_last. The limit is the rate of a large matrix product on the
same threads. `of_peak` divides by the rate of a product timed in turn with the row, since the
machine's clock changes. Padding counts as work, and Winograd's 16 products count as 36.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import epsa_fused
from epsa_fused import _C

sys.path.insert(0, str(Path(__file__).parent))
from latency import device_name
from measure import Timing, settle_allocator, time_in_turn
from provenance import commit

BATCH = 8
PRODUCT = 1536  # rows and columns of the matrices whose product gives the peak
# Planes, input size and stride. The first block of a stage halves the size.
STAGES = [(64, 56, 1), (128, 56, 2), (128, 28, 1), (256, 14, 1), (512, 14, 2), (512, 7, 1)]
NETWORKS = {
    "small": (1, ((3, 1), (5, 4), (7, 8), (9, 16))),
    "large": (2, ((3, 32), (5, 32), (7, 32))),
}


Branch = tuple[int, int]  # kernel, groups
Case = tuple[str, int, int, int, tuple[Branch, ...]]  # network, planes, size, stride


def cases() -> list[Case]:
    return [
        (network, scale * planes, size, stride, some)
        for network, (scale, branches) in NETWORKS.items()
        for planes, size, stride in STAGES
        for some in (*((branch,) for branch in branches), branches)
    ]


def measure(case: Case, product: Callable[[], object], threads: int, rounds: int) -> dict:
    network, planes, size, stride, branches = case
    channels = planes // 4
    x = torch.randn(BATCH, planes, size, size)
    weights = [torch.randn(channels, planes // g, k, k) * 0.1 for k, g in branches]
    last = torch.channels_last
    x_last = x.contiguous(memory_format=last)
    weights_last = [w.contiguous(memory_format=last) for w in weights]
    groups, padding = [g for _, g in branches], [k // 2 for k, _ in branches]

    def fused() -> list[torch.Tensor]:
        return epsa_fused.convolution.spc_conv(x, weights, groups, stride=stride, padding=padding)[
            0
        ]

    def torchs(x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            F.conv2d(x, w, None, stride, p, 1, g)
            for w, p, g in zip(weights, padding, groups, strict=True)
        ]

    runs = {
        "fused": fused,
        "torch": lambda: torchs(x, weights),
        "torch channels_last": lambda: torchs(x_last, weights_last),
        "product": product,
    }
    flops = 0
    for actual, expected, (kernel, g) in zip(fused(), torchs(x, weights), branches, strict=True):
        error = (actual - expected).abs().max() / expected.abs().max()
        if not error < 1e-4:
            raise SystemExit(f"{case}: error {error:.1e}, expected below 1e-4")
        flops += 2 * expected.numel() * (planes // g) * kernel**2
    timings = time_in_turn(runs, threads, rounds, 0.05)
    methods = {
        _C.conv_plan(
            in_channels=planes,
            out_channels=channels,
            groups=g,
            kernel=(kernel, kernel),
            height=size,
            width=size,
            stride=stride,
            padding=kernel // 2,
        )["method"]
        for kernel, g in branches
    }
    alone = len(branches) == 1

    def rate(timing: Timing) -> float:
        return round(flops / timing.median / 1e9, 1)

    product_rate = 2 * PRODUCT**3 / timings["product"].median / 1e9
    return {
        "network": network,
        "planes": planes,
        "size": size,
        "stride": stride,
        "kernel": branches[0][0] if alone else "all",
        "groups": branches[0][1] if alone else "all",
        "method": methods.pop() if alone else "",
        "ms": round(1e3 * timings["fused"].median, 3),
        "gflops": rate(timings["fused"]),
        "torch_gflops": rate(timings["torch"]),
        "torch_channels_last_gflops": rate(timings["torch channels_last"]),
        "of_peak": round(rate(timings["fused"]) / product_rate, 2),
    }


def matrix_product() -> Callable[[], object]:
    a, b = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)
    return lambda: a @ b


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
    product = matrix_product()
    timing = time_in_turn({"product": product}, options.threads, options.rounds, 0.2)["product"]
    facts = {
        "peak_gflops": round(2 * PRODUCT**3 / min(timing.times) / 1e9, 1),
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
    print(f"{'ms':>8}{'GFLOP/s':>9}{'torch':>8}{'ch.last':>9}{'of peak':>9}")
    rows = []
    for case in cases():
        row = measure(case, product, options.threads, options.rounds)
        rows.append(row)
        print(
            f"{row['network']:>8}{row['planes']:>7}{row['size']:>4}{row['stride']:>7}"
            f"{row['kernel']:>7}{row['groups']:>7}{row['method']:>11}{row['ms']:>8.2f}"
            f"{row['gflops']:>9.0f}{row['torch_gflops']:>8.0f}"
            f"{row['torch_channels_last_gflops']:>9.0f}{row['of_peak']:>9.2f}",
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
