"""Serving EPSANet on a CPU: the fused network, and what people would use in its place.

    python benchmarks/serving.py                     EPSANet-50, batches of 1 and 8
    python benchmarks/serving.py --batch 1 --dtype bfloat16 --threads 1
    python benchmarks/serving.py --help

OpenVINO and ONNX Runtime take part where they are installed, as the extra bench-serving does it.
Every contender's logits are compared with float64 first. Then all are timed in turn, round by
round, in one process. A ratio is the median of the rounds' ratios. It writes a CSV into --out.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import importlib.metadata
import io
import itertools
import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.config
from latency import device_name
from measure import Timing, ratio, settle_allocator, time_in_turn
from opponents import DTYPES
from provenance import commit
from torch import Tensor, nn

import epsa_fused
from epsa_fused import _C
from epsa_fused.inference.accuracy import FACTOR

SIZE = 224
OURS = "optimize_for_inference"
# So many roundings of the largest logit beside FACTOR times eager PyTorch's error.
ROUNDINGS = 16

Run = Callable[[], Tensor]


def network(fused: bool, dtype: torch.dtype) -> nn.Module:
    """EPSANet-50 of the same weights each time, in eval mode and channels_last."""
    torch.manual_seed(0)
    model = epsa_fused.epsanet50(fused=fused).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training, and logits stay of size 1
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.normal_(module.running_mean, 0, 0.05)
    return model.to(dtype).to(memory_format=torch.channels_last)


def published(images: Tensor, threads: int) -> Run:
    model = network(False, images.dtype)
    return lambda: model(images)


def published_frozen(images: Tensor, threads: int) -> Run:
    compiled = torch.compile(network(False, images.dtype), dynamic=False)
    with torch._inductor.config.patch(freezing=True):
        compiled(images)
    return lambda: compiled(images)


def openvino(images: Tensor, threads: int) -> Run:
    import openvino as ov

    logging.getLogger("nncf").setLevel(logging.ERROR)
    example = images.float().contiguous()
    converted = ov.convert_model(
        network(False, torch.float32), example_input=example, input=[list(example.shape)]
    )
    hint = ov.Type.bf16 if images.dtype == torch.bfloat16 else ov.Type.f32
    compiled = ov.Core().compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    given = example.numpy()
    return lambda: torch.from_numpy(request.infer([given])[0])


def onnx_runtime(images: Tensor, threads: int) -> Run:
    import onnxruntime as ort

    file = io.BytesIO()
    example = images.contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network(False, torch.float32), (example,), file, dynamo=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: example.numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def fused(images: Tensor, threads: int) -> Run:
    model = epsa_fused.prepack(network(True, images.dtype), images, frozen=True)
    return lambda: model(images)


def without_compiler(images: Tensor, threads: int) -> Run:
    served = epsa_fused.optimize_for_inference(
        network(True, torch.float32), images.float(), dtype=images.dtype, compile=False
    )
    return lambda: served(images)


def optimised(images: Tensor, threads: int) -> Run:
    served = epsa_fused.optimize_for_inference(
        network(True, torch.float32), images.float(), dtype=images.dtype
    )
    return lambda: served(images)


CONTENDERS: dict[str, Callable[[Tensor, int], Run]] = {
    "published": published,
    "published, frozen": published_frozen,
    "OpenVINO": openvino,
    "ONNX Runtime": onnx_runtime,
    "fused, packed": fused,
    f"{OURS}, compile=False": without_compiler,
    OURS: optimised,
}
NEEDS = {"OpenVINO": "openvino", "ONNX Runtime": "onnxruntime"}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument(
        "--contender", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS)
    )
    parser.add_argument("--rounds", type=int, default=7, help="times that each one is timed")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing in each round")
    parser.add_argument("--size", type=int, default=SIZE, help="height and width of the images")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--name", default="serving", help="file name of the results")
    return parser.parse_args(arguments)  # fmt: skip


def takes_part(name: str, dtype: str) -> bool:
    """Whether a contender is installed, and has kernels of this dtype."""
    if name == "ONNX Runtime" and dtype != "float32":
        return False
    try:
        importlib.metadata.version(NEEDS.get(name, "torch"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(dtype: str, batch: int, threads: int, options: argparse.Namespace) -> list[dict]:
    """The rows of one cell: all contenders on the same images."""
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, options.size, options.size, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last).to(DTYPES[dtype])
    exact = network(False, torch.float64)(images.double())
    usual = network(False, images.dtype)(images)
    size = exact.abs().max()
    allowed = (
        FACTOR * (usual - exact).abs().max() + ROUNDINGS * torch.finfo(images.dtype).eps * size
    )
    runs, facts = {}, {}
    for name in options.contender:
        if not takes_part(name, dtype):
            continue
        memory, start = resident_bytes(), time.perf_counter()
        run = CONTENDERS[name](images, threads)
        logits = run()
        load = time.perf_counter() - start
        error = (logits.double() - exact).abs().max()
        if not error <= allowed:
            raise SystemExit(f"{name}, {dtype}: error {error:.3g}, expected at most {allowed:.3g}")
        runs[name] = run
        facts[name] = {
            "load_s": round(load, 1),
            "memory_mb": round((resident_bytes() - memory) / 2**20),
            "error": f"{(error / size).item():.2g}",
        }
    settle_allocator()
    timings = time_in_turn(runs, threads, options.rounds, options.seconds)
    return [row(name, timings, facts[name], dtype, batch, threads) for name in runs]


def row(
    name: str, timings: dict[str, Timing], facts: dict, dtype: str, batch: int, threads: int
) -> dict:
    timing = timings[name]
    over = round(ratio(timing, timings[OURS]), 3) if OURS in timings else ""
    return {
        "contender": name,
        "dtype": dtype,
        "batch": batch,
        "threads": threads,
        "median_ms": round(timing.median * 1e3, 2),
        "iqr_ms": round(timing.iqr * 1e3, 2),
        "images_per_s": round(batch / timing.median, 1),
        "over_ours": over,
        **facts,
    }


def versions() -> str:
    names = ("torch", *NEEDS.values())
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def print_table(rows: list[dict]) -> None:
    first = rows[0]
    print(f"\n{first['dtype']}, batch {first['batch']}, {first['threads']} threads")
    for entry in rows:
        print(
            f"  {entry['contender']:38} {entry['median_ms']:8.2f} ms ±{entry['iqr_ms']:<6} "
            f"{entry['images_per_s']:8.1f} images/s  {entry['over_ours']:>6}x  loads in "
            f"{entry['load_s']} s, {entry['memory_mb']} MB",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> Path:
    options = parse_arguments(arguments)
    machine = {
        "device": device_name("cpu"),
        "isa": _C.cpu_isa(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    rows: list[dict] = []
    with torch.no_grad():
        for dtype, batch, threads in itertools.product(
            options.dtype, options.batch, options.threads
        ):
            cell = measure(dtype, batch, threads, options)
            print_table(cell)
            rows += cell
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine])
        writer.writeheader()
        writer.writerows(entry | machine for entry in rows)
    print(f"\nwrote {path}")
    return path


if __name__ == "__main__":
    main()
