"""Whole modules in training on a GPU: a forward and a backward pass, with every gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from exact import Exact, roundings
from gpu_bench import STAGES, Bench
from gpu_results import case_columns
from opponents import DTYPES, LAYOUTS, Case, LayersModule, make_inputs
from torch import Tensor

import epsa_fused

CONTENDERS: dict[str, type[epsa_fused.PSAModule]] = {
    "fused": epsa_fused.FusedPSAModule,
    "layers": LayersModule,
    "published eager": epsa_fused.PSAModule,
    "published compiled": epsa_fused.PSAModule,
}
# All cases of one pass come before the next pass. Each compilation takes many seconds.
PASSES = (("fused", "layers", "published eager"), ("published compiled",))


def cases() -> Iterator[Case]:
    """Most wanted first."""
    for dtype, n, layout, (planes, size) in itertools.product(
        ("bfloat16", "float32"), (64, 8), reversed(LAYOUTS), STAGES
    ):
        yield Case("module", "train", layout, dtype, n, planes, size)


def steps(bench: Bench) -> Iterator[Callable[[], None]]:
    for names in PASSES:
        for case in cases():
            yield partial(run, case, names, bench)


class Pass:
    """A module's forward and backward pass.

    Args:
        case: of the weights' dtype, the layout and the sizes.
        dtype: computes; weights and inputs are rounded to the case's before.
    """

    def __init__(
        self, kind: type[epsa_fused.PSAModule], case: Case, device: str, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        module = kind(case.planes, case.planes)
        # It keeps the few hidden units alive, so that no gradient is zero.
        torch.nn.init.ones_(module.se.fc1.bias)
        module.to(DTYPES[case.dtype])
        self.module = module.to(device, dtype, memory_format=LAYOUTS[case.layout]).train()
        self.target: Callable[[Tensor], Tensor] = self.module
        self.names = [name for name, _ in self.module.named_parameters()]
        self.parameters = [*self.module.parameters()]

    def run(self, x: Tensor, grad: Tensor) -> list[Tensor]:
        """The output, and the gradients of x and of the weights."""
        out = self.target(x)
        return [out.detach(), *torch.autograd.grad(out, [x, *self.parameters], grad)]

    def results(self, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        names = ["output", "x", *self.names]
        return dict(zip(names, self.run(x, grad), strict=True))


def inputs_of(case: Case, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, which requires its gradient, and the output's gradient."""
    (x,), _, grad = make_inputs(case, device)
    return x.to(dtype).requires_grad_(), grad.to(dtype)


def run(case: Case, names: tuple[str, ...], bench: Bench) -> None:
    base = case_columns("module", case)
    todo = bench.names_missing(base, names)
    if not todo:
        return
    torch._dynamo.reset()
    exact = cache(partial(exact_results, case, bench))
    for name in todo:
        bench.take(base | {"contender": name}, partial(measure, case, name, exact, bench))


def exact_results(case: Case, bench: Bench) -> Exact:
    published, device = epsa_fused.PSAModule, bench.meter.device

    def results(dtype: torch.dtype) -> dict[str, Tensor]:
        return Pass(published, case, device, dtype).results(*inputs_of(case, device, dtype))

    own = DTYPES[case.dtype]
    with bench.meter.without_search():
        exact = results(torch.float64)
    return Exact.of(exact, results(own), roundings(own))


def measure(case: Case, name: str, exact_of: Callable[[], Exact], bench: Bench) -> dict:
    exact = exact_of()
    device, dtype = bench.meter.device, DTYPES[case.dtype]
    contender = Pass(CONTENDERS[name], case, device, dtype)
    if name.endswith("compiled"):
        contender.target = torch.compile(contender.module, dynamic=False)
    x, grad = inputs_of(case, device, dtype)
    results = contender.results(x, grad)
    exact.check(results)
    # In 16 bits plain PyTorch loses gradients of the SE that are sums of terms that cancel.
    of_se = {k: v for k, v in results.items() if k.startswith("se.")}
    others = {k: v for k, v in results.items() if k not in of_se}
    errors = {"error": f"{exact.error(others):.2e}", "se_error": f"{exact.error(of_se):.2e}"}
    del results, of_se, others
    sets = [(x, grad)]
    for _ in range(1, bench.meter.sets(case.nbytes)):
        sets.append((x.detach().clone().requires_grad_(), grad.clone()))
    return bench.meter.columns([partial(contender.run, *each) for each in sets]) | errors
