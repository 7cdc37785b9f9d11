"""EPSANet-50 on a GPU: inference and training steps.

One set of images is enough: the maps of a batch exceed the L2 cache. Those of a single image
together do so, too. The weights of a single image's call may stay in the cache, as in serving.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from exact import Exact, roundings
from gpu_bench import Bench, is_out_of_memory, release_memory
from gpu_results import case_columns
from opponents import DTYPES, LAYOUTS, Case, Step
from serving_contenders import network
from torch import Tensor

# Whether a contender's PSA modules are fused.
CONTENDERS = {"fused": True, "published eager": False, "published compiled": False}
# All cases of one pass come before the next pass. Each compilation takes a minute or so.
PASSES = (("fused", "published eager"), ("published compiled",))
DEPTH, SIZE = 50, 224
# Weights in float32; the forward pass runs in autocast.
AUTOCAST = "autocast bfloat16"


def cases() -> Iterator[Case]:
    """Most wanted first."""
    wanted = (
        ("train", AUTOCAST, 64),
        ("forward", "bfloat16", 64),
        ("forward", "bfloat16", 1),
        ("train", AUTOCAST, 128),
        ("forward", "bfloat16", 256),
    )
    more = tuple(("forward", "float32", n) for n in (64, 1, 256))
    for group in (wanted, more):
        for layout, (mode, dtype, n) in itertools.product(reversed(LAYOUTS), group):
            yield Case("network", mode, layout, dtype, n, DEPTH, SIZE)


def steps(bench: Bench) -> Iterator[Callable[[], None]]:
    references = References(bench)
    for names in PASSES:
        for case in cases():
            for name in names:
                yield partial(run, case, name, references, bench)


@dataclass(frozen=True)
class Reference:
    exact: Exact
    dtype: str  # what it was computed in


class References:
    """The exact results of each case. They are those of both layouts, and of every pass."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.known: dict[Case, Reference | RuntimeError] = {}

    def of(self, case: Case) -> Reference:
        """An error of the first time is raised each time."""
        case = replace(case, layout="channels_last")
        if case not in self.known:
            try:
                self.known[case] = self._compute(case)
            except RuntimeError as error:
                self.known[case] = error.with_traceback(None)  # it would hold the network
        known = self.known[case]
        if isinstance(known, RuntimeError):
            raise known
        return known

    def _compute(self, case: Case) -> Reference:
        device, dtype = self.bench.meter.device, torch.float64
        usual = Contender("published eager", case, device).results()
        results = None
        try:
            with self.bench.meter.without_search():
                results = Contender("published eager", case, device, dtype).results()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if results is None:  # outside of the handler, which holds what did not fit
            release_memory()
            dtype = torch.float32
            results = Contender("published eager", case, device, dtype).results()
        exact = {name: result.double() for name, result in results.items()}
        judged = Exact.of(exact, usual, roundings(dtype_of(case)))
        return Reference(judged, str(dtype).removeprefix("torch."))


def dtype_of(case: Case) -> torch.dtype:
    """In which the case computes."""
    return DTYPES[case.dtype.removeprefix("autocast ")]


class Contender:
    """A network and its images on the device.

    Args:
        exact: the dtype in which all is computed, for a reference. Weights and images are rounded
            to the case's before.
    """

    def __init__(
        self, name: str, case: Case, device: str, exact: torch.dtype | None = None
    ) -> None:
        self.trains = case.mode == "train"
        stored = torch.float32 if case.dtype == AUTOCAST else DTYPES[case.dtype]
        layout = LAYOUTS[case.layout]
        built = network(CONTENDERS[name], stored).train(self.trains).requires_grad_(self.trains)
        self.module = built.to(device, exact or stored, memory_format=layout)
        # The processor makes them: its generator does not depend on a graph that failed.
        images = torch.randn(
            (case.n, 3, case.size, case.size), generator=torch.Generator().manual_seed(1)
        )
        images = images.to(stored).to(device, exact or stored)
        self.images = images.contiguous(memory_format=layout)
        self.target: Callable[[Tensor], Tensor] = self.module
        if name.endswith("compiled"):
            self.target = torch.compile(self.module, dynamic=False)
        if self.trains:
            in_autocast = case.dtype == AUTOCAST and exact is None
            self.step = Step(
                self.module,
                self.target,
                self.images,
                partial(torch.autocast, device, dtype_of(case), enabled=in_autocast),
            )

    @property
    def call(self) -> Callable[[], Tensor]:
        return self.step.run if self.trains else partial(self.target, self.images)

    def results(self) -> dict[str, Tensor]:
        return self.step.results() if self.trains else {"logits": self.target(self.images)}


def run(case: Case, name: str, references: References, bench: Bench) -> None:
    row = case_columns("network", case) | {"contender": name}
    if bench.missing(row):
        bench.take(row, partial(measure, case, name, references, bench))


def measure(case: Case, name: str, references: References, bench: Bench) -> dict:
    reference = references.of(case)
    torch._dynamo.reset()
    contender = Contender(name, case, bench.meter.device)
    results = contender.results()
    reference.exact.check(results)
    error = reference.exact.error(results)
    del results
    columns = bench.meter.columns([contender.call])
    return columns | {"error": f"{error:.2e}", "reference": reference.dtype}
