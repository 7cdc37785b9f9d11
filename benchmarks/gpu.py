"""The attention step on a GPU, most wanted figures first; resumes where it was stopped.

    python benchmarks/gpu.py               the missing rows, for at most --minutes
    python benchmarks/gpu.py --help

Each case measures every contender: its time on the device, beside a copy of the features' bytes;
the wall time of one call; the peak memory; the kernels and memsets of a call, from the profiler;
the error against float64. A time on the device is that of a replayed CUDA graph over input sets
that together exceed the L2 cache. The epilogue's part measures the attention step with BatchNorm
and ReLU behind it, in inference. The module's part measures whole modules in bfloat16. Then it
measures cuDNN's four convolutions beside the attention step, as they are and merged into fewer
groups. A finished row is appended to <out>/<device>-gpu.csv. Rows that the file holds for the same
sources (csrc) are skipped.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

import epsa_fused
from epsa_fused import _C

sys.path.insert(0, str(Path(__file__).parent))
from opponents import DTYPES, LAYOUTS, Case, Inputs, Runner, make_inputs, make_runner, rewrite
from provenance import commit, sources

STAGES = [(64, 56), (128, 28), (256, 14), (512, 7)]
KEY = ("kind", "mode", "layout", "dtype", "n", "planes", "size", "contender")
FIELDS = [
    *KEY,
    *("device_us", "iqr_us", "wall_us", "gb_per_s", "of_copy", "peak_mb", "kernels", "memsets"),
    *("error", "timing", "device", "torch", "cuda", "sources", "commit", "date"),
]
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


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=7.5, help="start no case after that")
    parser.add_argument("--part", choices=("attention", "epilogue", "module", "all"), default="all")
    parser.add_argument("--repeats", type=int, default=15, help="timed replays of each graph")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() and _C.build_info()["cuda"]):
        parser.error(
            "expected a GPU and a build with CUDA kernels; found "
            f"GPU {torch.cuda.is_available()}, CUDA kernels {_C.build_info()['cuda']}"
        )
    return options


def cases() -> Iterator[Case]:
    """Most wanted first."""
    for stages, n in ((STAGES[:2], 64), (STAGES[:2], 256), (STAGES, 1), (STAGES[2:], 64)):
        dtypes = ("float32", "bfloat16") if n > 1 else ("float32",)
        for mode, (planes, size), dtype, layout in itertools.product(
            ("forward", "backward"), stages, dtypes, LAYOUTS
        ):
            yield Case("attention", mode, layout, dtype, n, planes, size)


def shape_of(case: Case) -> dict[str, str | int]:
    return {
        name: getattr(case, name) for name in ("mode", "layout", "dtype", "n", "planes", "size")
    }


def device_times(calls: list[Callable], repeats: int) -> tuple[list[float], str]:
    """Seconds of one call on the device, once per repeat, and how they were taken.

    The calls run one after another inside one captured graph, so that the host's time to launch
    them does not count. What can't be captured is timed as it is launched, and says so.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            kept = [call() for call in calls]
        del kept
        run, timing = graph.replay, "graph"
    except RuntimeError as error:
        print(f"  not captured, timed as launched: {error}", file=sys.stderr)
        torch.cuda.synchronize()

        def run() -> None:
            for call in calls:
                call()

        timing = "launched"
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()  # keeps the device busy while the host launches what is timed
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return times, timing


def wall_time(call: Callable, repeats: int) -> float:
    """Median seconds from the call to its result on the device."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def launches(call: Callable) -> tuple[int, int]:
    """Kernels and memsets of one call."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        call()
        torch.cuda.synchronize()
    names = [
        e.name
        for e in profiler.events()
        if e.device_type == DeviceType.CUDA and not e.is_user_annotation
    ]
    memsets = sum(name.lower().startswith("memset") for name in names)
    return len(names) - memsets, memsets


def peak_memory(call: Callable) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def sets_beyond_cache(nbytes: int) -> int:
    """The number of input sets: each has left the L2 cache before its turn comes again.

    It is at most 64, which is too few for a single image.
    """
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(64, max(2, -(-4 * cache // nbytes)))


def spread(times: list[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low


def copied(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    maps, weights, grad = inputs

    def copy(t: torch.Tensor) -> torch.Tensor:
        return t.detach().to(dtype or t.dtype, copy=True)

    return [copy(t) for t in maps], [copy(t) for t in weights], copy(grad)


def measure(
    case: Case, name: str, inputs: Inputs, sets: int, repeats: int
) -> tuple[dict, list[torch.Tensor]]:
    kind, mode = CONTENDERS[name]
    function = torch.compile(kind, dynamic=False, mode=mode) if mode else kind
    # The runner gets no name: the function was compiled above, once for all sets.
    runners: list[Runner] = [
        make_runner("", function, case, "cuda", copied(inputs)) for _ in range(sets)
    ]
    calls = [runner.run for runner in runners]
    times, timing = device_times(calls, repeats)
    kernels, memsets = launches(calls[0])
    seconds = statistics.median(times)
    moved = (2 if case.mode == "forward" else 3) * case.nbytes
    row = {
        "device_us": round(seconds * 1e6, 2),
        "iqr_us": round(spread(times) * 1e6, 2),
        "wall_us": round(wall_time(calls[0], repeats) * 1e6, 2),
        "gb_per_s": round(moved / seconds / 1e9, 1),
        "peak_mb": round(peak_memory(calls[0]) / 1e6, 3),
        "kernels": kernels,
        "memsets": memsets,
        "timing": timing,
    }
    return row, [t.detach() for t in runners[0].result()]


def copy_row(case: Case, sets: int, repeats: int) -> dict:
    """A copy of the features' bytes, into memory that was written before, as in the graphs."""
    pairs = [torch.randn(2, case.nbytes // 4, device="cuda").unbind() for _ in range(sets)]
    times, timing = device_times([lambda p=p: p[1].copy_(p[0]) for p in pairs], repeats)
    seconds = statistics.median(times)
    return {
        "device_us": round(seconds * 1e6, 2),
        "iqr_us": round(spread(times) * 1e6, 2),
        "gb_per_s": round(2 * case.nbytes / seconds / 1e9, 1),
        "timing": timing,
    }


def largest_error(results: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        for a, b in zip(results, exact, strict=True)
    )


def merged(convolution: torch.nn.Conv2d, groups: int) -> torch.nn.Conv2d:
    """The same convolution in fewer groups, which cuDNN may compute on tensor cores.

    Its weight [O, I / groups, k, k] holds the given one's groups as blocks on the diagonal, zeros
    beside them. The results differ by the order of sums only.
    """
    c = convolution
    within = c.groups // groups  # of the given groups, in one of the new
    blocks = c.weight.detach().unflatten(0, (groups, within, -1))  # [groups, within, O, I, k, k]
    wide = torch.diag_embed(blocks.permute(0, 2, 3, 4, 5, 1), dim1=1, dim2=3)
    # diag_embed put the new group's two indices at 1 and 3: [groups, within, O, within, I, k, k]
    result = torch.nn.Conv2d(
        c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, groups=groups, bias=False
    ).to(c.weight.device, c.weight.dtype)
    result.weight = torch.nn.Parameter(wide.flatten(3, 4).flatten(0, 2), requires_grad=False)
    return result


def module_parts(
    module: torch.nn.Module, images: list[torch.Tensor], merge: bool
) -> dict[str, list[Callable]]:
    """The calls of each convolution, one per input set; with `merge`, also in fewer groups."""
    parts = {}
    for i, c in enumerate((m for n, m in module.named_children() if n.startswith("conv")), 1):
        kinds = {f"conv {i}": c}
        for groups in [g for g in (8, 4, 2, 1) if merge and g < c.groups]:
            kinds[f"conv {i} in {groups} groups"] = merged(c, groups).to(
                memory_format=torch.channels_last
                if images[0].is_contiguous(memory_format=torch.channels_last)
                else torch.contiguous_format
            )
        for name, kind in kinds.items():
            parts[name] = [lambda c=kind, x=x: c(x) for x in images]
    return parts


def module_rows(planes: int, size: int, results: Results, repeats: int) -> Iterator[dict]:
    """The missing rows of the module's convolutions beside its attention step.

    In inference, N = 64.
    """
    for layout, dtype in itertools.product(LAYOUTS, ("float32", "tf32", "bfloat16")):
        torch.backends.cudnn.allow_tf32 = dtype == "tf32"
        torch.backends.cudnn.benchmark = True
        kind = DTYPES[dtype.replace("tf32", "float32")]
        module = epsa_fused.FusedPSAModule(planes, planes).to("cuda", kind)
        module.to(memory_format=LAYOUTS[layout]).requires_grad_(False)
        case = Case("attention", "forward", layout, str(kind)[6:], 64, planes, size)
        first = make_inputs(case, "cuda")
        inputs = [copied(first) for _ in range(sets_beyond_cache(case.nbytes))]
        images = [
            torch.cat(maps, 1).contiguous(memory_format=LAYOUTS[layout]) for maps, _, _ in inputs
        ]
        parts = module_parts(module, images, merge=dtype != "float32")
        parts["attention"] = [
            lambda m=maps, w=weights: epsa_fused.psa_attention(m, *w) for maps, weights, _ in inputs
        ]
        for name, calls in parts.items():
            row = {
                "kind": "share",
                "mode": "forward",
                "layout": layout,
                "dtype": dtype,
                "n": 64,
                "planes": planes,
                "size": size,
                "contender": name,
            }
            if results.key(row) in results.done:
                continue
            times, timing = device_times(calls, repeats)
            yield row | {
                "device_us": round(statistics.median(times) * 1e6, 2),
                "iqr_us": round(spread(times) * 1e6, 2),
                "timing": timing,
            }
    torch.backends.cudnn.allow_tf32 = False


def whole_rows(n: int, planes: int, size: int, results: Results, repeats: int) -> Iterator[dict]:
    """The missing rows of a whole module in bfloat16: fused, as layers, and as published.

    In inference. "layers" are cuDNN's convolutions before the fused attention step.
    """
    torch.backends.cudnn.benchmark = True
    for layout in LAYOUTS:
        module = epsa_fused.FusedPSAModule(planes, planes).to("cuda", torch.bfloat16)
        published = epsa_fused.PSAModule(planes, planes).to("cuda", torch.bfloat16)
        for m in (module, published):
            m.to(memory_format=LAYOUTS[layout]).requires_grad_(False)
        published.load_state_dict(module.state_dict())
        shape = (n, planes, size, size)
        image = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        image = image.contiguous(memory_format=LAYOUTS[layout])
        images = [image.clone() for _ in range(sets_beyond_cache(image.nbytes))]
        se = module.se.fc1.weight, module.se.fc1.bias, module.se.fc2.weight, module.se.fc2.bias
        convolutions = [c for name, c in module.named_children() if name.startswith("conv")]

        def layers(x: torch.Tensor, convolutions=convolutions, se=se) -> torch.Tensor:
            return epsa_fused.psa_attention([c(x) for c in convolutions], *se)

        exact = published.double()(image.double())
        published.bfloat16()
        contenders = {"fused": module, "layers": layers, "published eager": published}
        case = Case("module", "forward", layout, "bfloat16", n, planes, size)
        sets = [(x,) for x in images]
        yield from inference_rows("module", case, contenders, sets, exact, results, repeats)


def epilogue_rows(case: Case, results: Results, repeats: int) -> Iterator[dict]:
    """The missing rows of the attention step with BatchNorm and ReLU behind it, in inference."""
    channels, dtype = case.planes, DTYPES[case.dtype]
    norm = torch.nn.BatchNorm2d(channels).cuda().eval().requires_grad_(False)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    norm.to(dtype)
    operator = torch.ops.epsa_fused.psa_attention.default

    def fused(maps: list[torch.Tensor], *weights: torch.Tensor) -> torch.Tensor:
        return operator(maps, *weights, True, None, scale, shift, True)[0]

    def followed(function: Callable) -> Callable:
        return lambda maps, *weights: torch.relu(norm(function(maps, *weights)))

    compiled = torch.compile(followed(rewrite), dynamic=False)
    first = make_inputs(case, "cuda")
    inputs = [copied(first) for _ in range(sets_beyond_cache(case.nbytes))]
    sets = [(maps, *weights) for maps, weights, _ in inputs]
    maps, weights, _ = copied(first, torch.float64)
    exact = epsa_fused.psa_attention_reference(maps, *weights)
    exact = torch.relu(exact * scale[:, None, None].double() + shift[:, None, None].double())
    contenders = {
        "fused": fused,
        "fused, then layers": followed(epsa_fused.psa_attention),
        "rewrite compiled": compiled,
    }
    yield from inference_rows("epilogue", case, contenders, sets, exact, results, repeats)


def inference_rows(
    kind: str,
    case: Case,
    contenders: dict[str, Callable],
    sets: list[tuple],
    exact: torch.Tensor,
    results: Results,
    repeats: int,
) -> Iterator[dict]:
    """The missing rows of the contenders, called with each of the sets of arguments."""
    for name, function in contenders.items():
        row = {"kind": kind, "contender": name} | shape_of(case)
        if results.key(row) in results.done:
            continue
        calls = [partial(function, *arguments) for arguments in sets]
        times, timing = device_times(calls, repeats)
        kernels, memsets = launches(calls[0])
        yield row | {
            "device_us": round(statistics.median(times) * 1e6, 2),
            "iqr_us": round(spread(times) * 1e6, 2),
            "wall_us": round(wall_time(calls[0], repeats) * 1e6, 2),
            "peak_mb": round(peak_memory(calls[0]) / 1e6, 3),
            "kernels": kernels,
            "memsets": memsets,
            "error": f"{largest_error([calls[0]()], [exact]):.2e}",
            "timing": timing,
        }


class Results:
    """The CSV: the rows that it holds for this device and these sources, and new ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "sources": sources(),
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
        }
        rows = list(csv.DictReader(path.open())) if path.exists() else []
        self.done = {self.key(r) for r in rows if r["sources"] == self.facts["sources"]}

    @staticmethod
    def key(row: dict) -> tuple:
        return tuple(str(row[name]) for name in KEY)

    def add(self, row: dict) -> None:
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row | self.facts)
        self.done.add(self.key(row))


def run_case(case: Case, names: tuple[str, ...], results: Results, repeats: int) -> None:
    base = {"kind": "attention"} | shape_of(case)
    todo = [n for n in names if results.key(base | {"contender": n}) not in results.done]
    if not todo:
        return
    torch._dynamo.reset()
    sets = sets_beyond_cache(case.nbytes)
    inputs = make_inputs(case, "cuda")
    exact = make_runner(
        "",
        epsa_fused.psa_attention_reference,
        replace(case, dtype="float64"),
        "cuda",
        copied(inputs, torch.float64),
    ).result()
    copy = copy_row(case, sets, repeats)
    if results.key(base | {"contender": "copy"}) not in results.done:
        results.add(base | copy | {"contender": "copy"})
    print(f"{case.mode} {case.dtype} {case.layout} {case.shape}: copy {copy['device_us']} us")
    for name in todo:
        row, values = measure(case, name, inputs, sets, repeats)
        error = largest_error(values, [t.detach() for t in exact])
        row |= {
            "contender": name,
            "of_copy": round(row["gb_per_s"] / copy["gb_per_s"], 3),
            "error": f"{error:.2e}",
        }
        results.add(base | row)
        print(
            f"  {name:<17}{row['device_us']:>10} us  {row['of_copy']:>6.0%} of the copy's bytes/s"
            f"  wall {row['wall_us']} us  kernels {row['kernels']}+{row['memsets']}"
            f"  error {row['error']}",
            flush=True,
        )


def run_stage(planes: int, size: int, results: Results, repeats: int) -> None:
    for row in module_rows(planes, size, results, repeats):
        results.add(row)
        print(
            f"{row['layout']} {row['dtype']} ({planes}, {size}): {row['contender']:<19}"
            f"{row['device_us']:>10} us",
            flush=True,
        )


def run_inference(rows: Iterator[dict], results: Results) -> None:
    for row in rows:
        results.add(row)
        print(
            f"{row['kind']} {row['dtype']} {row['layout']} ({row['n']}, {row['planes']}, "
            f"{row['size']}): {row['contender']:<18}"
            f"{row['device_us']:>10} us  wall {row['wall_us']} us  kernels {row['kernels']}"
            f"  error {row['error']}",
            flush=True,
        )


def run_epilogue(case: Case, results: Results, repeats: int) -> None:
    torch._dynamo.reset()
    run_inference(epilogue_rows(case, results, repeats), results)


def run_whole(n: int, planes: int, size: int, results: Results, repeats: int) -> None:
    run_inference(whole_rows(n, planes, size, results, repeats), results)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    options.out.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name()).lower()
    results = Results(options.out / f"{name}-gpu.csv")
    stop = time.monotonic() + 60 * options.minutes

    # Autograd runs a backward on its forward's stream, and a graph can't capture the default one.
    torch.cuda.set_stream(torch.cuda.Stream())
    steps: list[Callable[[], object]] = []
    if options.part in ("epilogue", "all"):
        steps += [
            partial(run_epilogue, case, results, options.repeats)
            for case in cases()
            if case.mode == "forward"
        ]
    if options.part in ("module", "all"):
        steps += [
            partial(run_whole, n, *stage, results, options.repeats)
            for n in (64, 8, 1)
            for stage in STAGES
        ]
        steps += [partial(run_stage, *stage, results, options.repeats) for stage in STAGES]
    if options.part in ("attention", "all"):
        steps += [
            partial(run_case, case, names, results, options.repeats)
            for names in PASSES
            for case in cases()
        ]
    for step in steps:
        if time.monotonic() > stop:
            print("out of time: run again to go on")
            return
        step()
    print(f"complete: {results.path}")


if __name__ == "__main__":
    main()
