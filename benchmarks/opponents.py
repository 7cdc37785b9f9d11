"""What is timed: the same computations in the formulations that compete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import epsa_fused

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
BRANCHES = 4


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: PSAModule(planes, planes) on maps [n, planes, size, size]."""

    level: str  # "attention" or "module"
    mode: (
        str  # "forward" (nothing requires grad), "backward" (alone), "train" (forward and backward)
    )
    layout: str
    dtype: str
    n: int
    planes: int
    size: int

    @property
    def shape(self) -> str:
        return f"({self.n}, {self.planes}, {self.size})"

    @property
    def nbytes(self) -> int:
        """B, the bytes of all features."""
        return self.n * self.planes * self.size**2 * DTYPES[self.dtype].itemsize


def rewrite(
    feats: list[Tensor], w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, **kwargs: str
) -> Tensor:
    """The attention step as a careful user would write it in plain PyTorch: the real opponent.

    Stacked means, two F.linear for all branches at once, one cat of the products.
    """
    pooled = torch.stack([f.mean((2, 3)) for f in feats], 1)  # [N, S, C]
    hidden = F.relu(F.linear(pooled, w1.flatten(1), b1))
    attention = torch.softmax(torch.sigmoid(F.linear(hidden, w2.flatten(1), b2)), 1)
    products = [f * attention[:, s, :, None, None] for s, f in enumerate(feats)]
    return torch.cat(products[::-1], 1)


class RewriteModule(epsa_fused.PSAModule):
    """The PSA module with the rewritten attention step."""

    def attention(self, feats: list[Tensor]) -> Tensor:
        fc1, fc2 = self.se.fc1, self.se.fc2
        return rewrite(feats, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def contenders(level: str, with_compile: bool) -> dict[str, Callable]:
    """Name -> attention function, or module class, "fused" first."""
    if level == "attention":
        fused, seed, plain = epsa_fused.psa_attention, epsa_fused.psa_attention_reference, rewrite
    else:
        fused, seed, plain = epsa_fused.FusedPSAModule, epsa_fused.PSAModule, RewriteModule
    names = {"fused": fused, "seed eager": seed, "rewrite eager": plain}
    if with_compile:
        names |= {"seed compiled": seed, "rewrite compiled": plain}
    return names


@dataclass
class Runner:
    """One contender on one case: `run` is what is timed, `result` what is compared."""

    run: Callable[[], object]
    result: Callable[[], list[Tensor]]


def make_inputs(case: Case, device: str) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Inputs (maps, or one map for a module), SE weights and grad_out; same values every time."""
    generator = torch.Generator().manual_seed(0)
    layout, dtype = LAYOUTS[case.layout], DTYPES[case.dtype]

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    c, r = case.planes // BRANCHES, case.planes // BRANCHES // 16
    channels = [c] * BRANCHES if case.level == "attention" else [case.planes]
    maps = [
        random(case.n, k, case.size, case.size).contiguous(memory_format=layout) for k in channels
    ]
    # a positive bias keeps the few hidden units alive, so that every gradient has work to do
    weights = [
        random(r, c, 1, 1, scale=0.25),
        random(r, scale=0.1) + 1,
        random(c, r, 1, 1, scale=0.25),
        random(c, scale=0.1),
    ]
    grad = random(case.n, case.planes, case.size, case.size).contiguous(memory_format=layout)
    return maps, weights, grad


Inputs = tuple[list[Tensor], list[Tensor], Tensor]


def make_runner(
    name: str, kind: Callable, case: Case, device: str, inputs: Inputs | None = None
) -> Runner:
    """Prepare one contender with inputs of its own; `inputs`: what make_inputs returned."""
    maps, weights, grad = inputs or make_inputs(case, device)
    if case.level == "attention":
        function = _compiled(kind) if name.endswith("compiled") else kind

        def call() -> Tensor:
            return function(maps, *weights)

        leaves = maps + weights
    else:
        torch.manual_seed(0)
        module = kind(case.planes, case.planes).to(device, DTYPES[case.dtype])
        module.to(memory_format=LAYOUTS[case.layout])
        target = _compiled(module) if name.endswith("compiled") else module

        def call() -> Tensor:
            return target(maps[0])

        leaves = maps + list(module.parameters())

    for leaf in leaves:
        leaf.requires_grad_(case.mode != "forward")
    if case.mode == "forward":
        return Runner(call, lambda: [call()])

    def train() -> list[Tensor]:
        out = call()
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    if case.mode == "train":
        return Runner(train, train)
    out = call()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return Runner(backward, lambda: list(backward()))


def make_copy(case: Case, device: str) -> Runner:
    """The yardstick: a copy of the features' bytes into freshly allocated memory."""
    source = torch.randn(case.nbytes // 4, device=device)
    return Runner(source.clone, lambda: [source.clone()])
