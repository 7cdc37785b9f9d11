"""A module's convolutions by cuDNN beside its attention step, in inference, N = 64.

They run as they are and merged into fewer groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_bench import STAGES, Bench, copied
from gpu_results import case_columns
from gpu_timing import Call
from opponents import DTYPES, LAYOUTS, Case, make_inputs

import epsa_fused

N = 64


def steps(bench: Bench) -> Iterator[Callable[[], None]]:
    for planes, size in STAGES:
        for layout, dtype in itertools.product(LAYOUTS, ("float32", "tf32", "bfloat16")):
            yield partial(run, Case("share", "forward", layout, dtype, N, planes, size), bench)


def run(case: Case, bench: Bench) -> None:
    torch.backends.cudnn.allow_tf32 = case.dtype == "tf32"
    try:
        base = case_columns("share", case)
        for name, calls in parts(case, bench).items():
            row = base | {"contender": name}
            if bench.missing(row):
                bench.take(row, partial(bench.meter.time_columns, calls))
    finally:
        torch.backends.cudnn.allow_tf32 = False


def parts(case: Case, bench: Bench) -> dict[str, list[Call]]:
    """The calls of the attention step and of each convolution, one per input set."""
    device, dtype = bench.meter.device, case.dtype.replace("tf32", "float32")
    layout = LAYOUTS[case.layout]
    module = epsa_fused.FusedPSAModule(case.planes, case.planes).to(device, DTYPES[dtype])
    module.to(memory_format=layout).requires_grad_(False)
    maps_case = Case("attention", "forward", case.layout, dtype, case.n, case.planes, case.size)
    first = make_inputs(maps_case, device)
    inputs = [copied(first) for _ in range(bench.meter.sets(maps_case.nbytes))]
    images = [torch.cat(maps, 1).contiguous(memory_format=layout) for maps, _, _ in inputs]
    calls = {
        name: [partial(convolution, image) for image in images]
        for name, convolution in convolutions(module, layout, merge=case.dtype != "float32")
    }
    calls["attention"] = [
        partial(epsa_fused.psa_attention, maps, *weights) for maps, weights, _ in inputs
    ]
    return calls


def convolutions(
    module: torch.nn.Module, layout: torch.memory_format, merge: bool
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Each one; with `merge`, also in fewer groups."""
    for i, c in enumerate((m for n, m in module.named_children() if n.startswith("conv")), 1):
        yield f"conv {i}", c
        for groups in [g for g in (8, 4, 2, 1) if merge and g < c.groups]:
            yield f"conv {i} in {groups} groups", merged(c, groups).to(memory_format=layout)


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
