"""The attention step with BatchNorm and ReLU behind it on a GPU, in inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import gpu_attention
import torch
from gpu_bench import Bench, copied
from gpu_results import case_columns
from opponents import DTYPES, Case, make_inputs, rewrite
from torch import Tensor

import epsa_fused

NAMES = ("fused", "fused, then layers", "rewrite compiled")


def steps(bench: Bench) -> Iterator[Callable[[], None]]:
    for case in gpu_attention.cases():
        if case.mode == "forward":
            yield partial(run, case, bench)


def run(case: Case, bench: Bench) -> None:
    if not bench.names_missing(case_columns("epilogue", case), NAMES):
        return
    torch._dynamo.reset()
    channels, dtype, device = case.planes, DTYPES[case.dtype], bench.meter.device
    norm = torch.nn.BatchNorm2d(channels).eval().requires_grad_(False)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    norm.to(device)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    norm.to(dtype)
    operator = torch.ops.epsa_fused.psa_attention.default

    def fused(maps: list[Tensor], *weights: Tensor) -> Tensor:
        return operator(maps, *weights, True, None, scale, shift, True)[0]

    def followed(function: Callable) -> Callable:
        return lambda maps, *weights: torch.relu(norm(function(maps, *weights)))

    first = make_inputs(case, device)
    inputs = [copied(first) for _ in range(bench.meter.sets(case.nbytes))]
    sets = [(maps, *weights) for maps, weights, _ in inputs]
    maps, weights, _ = copied(first, torch.float64)
    exact = epsa_fused.psa_attention_reference(maps, *weights)
    exact = torch.relu(exact * scale[:, None, None].double() + shift[:, None, None].double())
    functions = (
        fused,
        followed(epsa_fused.psa_attention),
        torch.compile(followed(rewrite), dynamic=False),
    )
    contenders = dict(zip(NAMES, functions, strict=True))
    bench.take_inference("epilogue", case, contenders, sets, exact)
