"""The least cost of the attention step on a GPU, on paper: no GPU is needed.

    python benchmarks/roofline.py                         H100, every stage of EPSANet
    python benchmarks/roofline.py --device b200 --batch 64 --dtype bfloat16
    python benchmarks/roofline.py --help

Each case has three figures. First, the bytes that device memory must move: the forward reads maps
and writes maps; the backward reads gradients and maps and writes gradients. Second, the time that
these bytes take at the given bandwidth. Third, the launch plan's first choice; a shared or
partitioned device may take a later one. "held" counts the maps of which a block has a part in
shared memory. The floor leaves out the launch and everything that does not overlap, so a
measured time lies above it.
"""

from __future__ import annotations

import argparse
import csv
import os
from math import ceil
from pathlib import Path

from devices import BANDWIDTH, BRANCHES, DEVICES, STAGES

from epsa_fused import _C

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LAYOUTS = ("contiguous", "channels_last")
# The least number of times that the bytes of all features move.
TRAFFIC = {"forward": 2, "backward": 3}

# As plan.cpp counts: a thread has 64 of 65536 registers. The system takes 1 KiB of shared memory
# for each block.
THREADS_BY_REGISTERS = 1024
SYSTEM_SHARED = 1024


def blocks_on_multiprocessor(device: _C.CudaDevice, plan: dict) -> int:
    return min(
        THREADS_BY_REGISTERS // plan["threads"],
        device.threads_per_multiprocessor // plan["threads"],
        device.shared_per_multiprocessor // (plan["shared_bytes"] + SYSTEM_SHARED),
        device.blocks_per_multiprocessor,
    )


def row(
    device: _C.CudaDevice,
    bandwidth: float,
    pass_: str,
    layout: str,
    dtype: str,
    n: int,
    planes: int,
    size: int,
) -> dict:
    """One case; bandwidth in GB/s."""
    channels = planes // BRANCHES
    plan = _C.cuda_plans(
        device,
        pass_=pass_,
        samples=n,
        branches=BRANCHES,
        channels=channels,
        pixels=size**2,
        hidden=channels // 16,
        dtype=dtype,
        layout=layout,
    )[0]
    features = n * planes * size**2 * BYTES[dtype]
    moved = TRAFFIC[pass_] * features
    resident = blocks_on_multiprocessor(device, plan)
    return {
        "pass": pass_,
        "layout": layout,
        "dtype": dtype,
        "n": n,
        "planes": planes,
        "size": size,
        "bytes": moved,
        "floor_us": round(moved / bandwidth / 1e3, 3),
        "variant": plan["variant"],
        "cluster": plan["cluster"],
        "pieces": plan["pieces"],
        "threads": plan["threads"],
        "blocks": plan["blocks"],
        "shared_bytes": plan["shared_bytes"],
        "blocks_per_sm": resident,
        "occupancy": round(resident * plan["threads"] / device.threads_per_multiprocessor, 3),
        "waves": ceil(plan["blocks"] / (resident * device.multiprocessors)),
        # streaming reads the maps or their gradients a second time
        "l2_bytes": features if plan["variant"] == "streaming" else 0,
        "kernels": 1,
        "memsets": int(plan["workspace"]["cleared"] > 0),
    }


def rows(options: argparse.Namespace) -> list[dict]:
    device, bandwidth = DEVICES[options.device], options.bandwidth
    return [
        row(device, bandwidth, pass_, layout, dtype, n, planes, size)
        for pass_ in options.mode
        for layout in options.layout
        for dtype in options.dtype
        for n in options.batch
        for planes, size in STAGES
    ]


def print_table(table: list[dict]) -> None:
    group = None
    for r in table:
        if group != (r["pass"], r["layout"], r["dtype"]):
            group = (r["pass"], r["layout"], r["dtype"])
            print(f"\n{', '.join(group)}")
            print(
                f"{'(N,planes,H)':>15}{'MB':>9}{'floor us':>10}  {'variant':<10}{'cluster':>7}"
                f"{'held':>6}{'blocks':>8}{'x threads':>10}{'KiB':>7}{'per SM':>8}"
                f"{'occupancy':>10}{'waves':>7}{'L2 MB':>8}  launches"
            )
        shape = f"({r['n']}, {r['planes']}, {r['size']})"
        launches = "kernel + memset" if r["memsets"] else "kernel"
        print(
            f"{shape:>15}{r['bytes'] / 1e6:>9.2f}{r['floor_us']:>10.2f}  {r['variant']:<10}"
            f"{r['cluster']:>7}{r['pieces']:>6}{r['blocks']:>8}{r['threads']:>10}"
            f"{r['shared_bytes'] / 1024:>7.1f}{r['blocks_per_sm']:>8}{r['occupancy']:>10.0%}"
            f"{r['waves']:>7}{r['l2_bytes'] / 1e6:>8.2f}  {launches}"
        )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="h100", choices=list(DEVICES))
    parser.add_argument(
        "--bandwidth",
        type=float,
        help="of device memory, GB/s; default: NVIDIA's data sheet of the device, "
        f"{BANDWIDTH['h100']} for the H100 SXM",
    )
    parser.add_argument("--mode", nargs="+", default=list(TRAFFIC), choices=list(TRAFFIC))
    parser.add_argument("--layout", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=list(BYTES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32, 64, 256])
    parser.add_argument("--out", type=Path, help="a CSV file to write as well")
    options = parser.parse_args(arguments)
    if options.bandwidth is None:
        options.bandwidth = BANDWIDTH[options.device]
    if not options.bandwidth > 0:
        parser.error(f"--bandwidth: expected GB/s above 0, got {options.bandwidth}")
    if min(options.batch) < 1:
        parser.error(f"--batch: expected numbers of at least 1, got {min(options.batch)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    device = DEVICES[options.device]
    print(
        f"{device.name} (sm_{device.compute_capability}, {device.multiprocessors} "
        f"multiprocessors) at {options.bandwidth:g} GB/s: on paper, nothing is measured"
    )
    table = rows(options)
    print_table(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"device": device.name, "gb_per_s": options.bandwidth}
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*table[0], *facts], lineterminator=os.linesep)
            writer.writeheader()
            writer.writerows(r | facts for r in table)
        print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
