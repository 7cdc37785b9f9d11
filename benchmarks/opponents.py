"""The contenders of the benchmark: the same computations in several formulations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
    """One row of the benchmark.

    PSAModule(planes, planes) or a part of it takes maps [n, planes, size, size]. The network
    EPSANet-<planes> takes images [n, 3, size, size].
    """

    level: str  # "attention", "convolutions", "module" or "network"
    # "forward": nothing requires grad. "backward": the backward pass alone. "train": forward and
    # backward; for a network with cross entropy and an SGD step.
    mode: str
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
        """The bytes of all maps, or of a network's images."""
        if self.level == "network":
            return self.n * 3 * self.size**2 * DTYPES[self.dtype].itemsize
        return self.n * self.planes * self.size**2 * DTYPES[self.dtype].itemsize


def rewrite(
    feats: list[Tensor], w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, **kwargs: str
) -> Tensor:
    """The attention step as a careful user would write it in plain PyTorch.

    It stacks the means, calls F.linear twice for all branches, and concatenates the products.
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


class LayersModule(epsa_fused.PSAModule):
    """The PSA module with torch's convolutions before the fused attention step."""

    def attention(self, feats: list[Tensor]) -> Tensor:
        fc1, fc2 = self.se.fc1, self.se.fc2
        return epsa_fused.psa_attention(feats, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


class Convolutions(epsa_fused.PSAModule):
    """The convolutions of the PSA module alone: its four maps."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [getattr(self, f"conv_{i + 1}")(x) for i in range(BRANCHES)]


class FusedConvolutions(epsa_fused.PSAModule):
    """The same maps by the operator, which also returns their means."""

    def forward(self, x: Tensor) -> list[Tensor]:
        convs = [getattr(self, f"conv_{i + 1}") for i in range(BRANCHES)]
        return epsa_fused.convolution.spc_conv(
            x,
            [conv.weight for conv in convs],
            [conv.groups for conv in convs],
            padding=[conv.padding[0] for conv in convs],
        )[0]


def _network(module: type[epsa_fused.PSAModule]) -> Callable[[int], torch.nn.Module]:
    """A builder: depth -> EPSANet with PSA modules of this class."""

    def build(depth: int) -> torch.nn.Module:
        fused = module is epsa_fused.FusedPSAModule
        network = getattr(epsa_fused, f"epsanet{depth}")(fused=fused)
        for part in network.modules():
            if type(part) is epsa_fused.PSAModule:
                part.__class__ = module  # it has the same layers
        return network

    return build


class _Sampled(torch.nn.Module):
    """A stand-in for a PSA module, nearly free: every stride-th pixel of its input."""

    def forward(self, x: Tensor) -> Tensor:
        stride = self.conv_1.stride[0]
        return x[:, :, ::stride, ::stride]


def _without_psa(depth: int) -> torch.nn.Module:
    """EPSANet-<depth> with PSA modules that are free."""
    network = _network(epsa_fused.FusedPSAModule)(depth)
    for part in network.modules():
        if type(part) is epsa_fused.FusedPSAModule:
            part.__class__ = _Sampled
    return network


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def contenders(level: str, mode: str, with_compile: bool) -> dict[str, Callable]:
    """Name -> attention function or builder of a module, "fused" first."""
    fused, published, plain = epsa_fused.FusedPSAModule, epsa_fused.PSAModule, RewriteModule
    if level == "attention":
        fused, published, plain = (
            epsa_fused.psa_attention,
            epsa_fused.psa_attention_reference,
            rewrite,
        )
    elif level == "convolutions":
        names = {"fused": FusedConvolutions, "published eager": Convolutions}
        return names | ({"published compiled": Convolutions} if with_compile else {})
    elif level == "network":
        fused, published, plain = map(_network, (fused, published, plain))
    names = {"fused": fused}
    if level != "attention":
        if with_compile:
            names["fused compiled"] = fused
        names["fused prepacked" if mode == "forward" else "fused save_output"] = fused
    names |= {"published eager": published, "rewrite eager": plain}
    if with_compile:
        names |= {"published compiled": published, "rewrite compiled": plain}
    return names


def limits(level: str, with_compile: bool) -> dict[str, Callable]:
    """Name -> builder of a module that is faster than any module with PSA."""
    if level != "network":
        return {}
    names = {"without PSA": _without_psa}
    return names | ({"without PSA compiled": _without_psa} if with_compile else {})


@dataclass
class Runner:
    """One contender on one case: `run` is timed, the tensors of `result` are compared."""

    run: Callable[[], object]
    result: Callable[[], list[Tensor]]


def make_inputs(case: Case, device: str) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Maps (one map for a module), SE weights and grad_out.

    Every call gives the same values on a device.
    """
    generator = torch.Generator(device).manual_seed(0)
    layout, dtype = LAYOUTS[case.layout], DTYPES[case.dtype]

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return (values * scale).to(dtype)

    if case.level == "network":
        images = random(case.n, 3, case.size, case.size).contiguous(memory_format=layout)
        return [images], [], random(1)
    c, r = case.planes // BRANCHES, case.planes // BRANCHES // 16
    channels = [c] * BRANCHES if case.level == "attention" else [case.planes]
    maps = [
        random(case.n, k, case.size, case.size).contiguous(memory_format=layout) for k in channels
    ]
    # A positive bias keeps the few hidden units alive, so that no gradient is zero.
    weights = [
        random(r, c, 1, 1, scale=0.25),
        random(r, scale=0.1) + 1,
        random(c, r, 1, 1, scale=0.25),
        random(c, scale=0.1),
    ]
    grad = random(case.n, case.planes, case.size, case.size).contiguous(memory_format=layout)
    return maps, weights, grad


Inputs = tuple[list[Tensor], list[Tensor], Tensor]


def as_list(out: Tensor | list[Tensor]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def uses(case: Case, parameter: str) -> bool:
    """Whether the case uses the parameter: the convolutions alone use none of the SE."""
    return case.level != "convolutions" or parameter.startswith("conv_")


class Step:
    """A training step of a network: forward, cross entropy, backward, SGD.

    `target` is what is called, the module or its compiled form. `context` makes what the forward
    pass runs in, such as autocast. It begins and ends in each step. So autocast's copies of the
    weights end with the step, and one captured in a graph casts the weights again in each replay.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        target: Callable,
        images: Tensor,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.module, self.target, self.images, self.context = module, target, images, context
        self.optimizer = torch.optim.SGD(module.parameters(), 1e-4, momentum=0.9, weight_decay=1e-4)
        self.labels = torch.arange(len(images), device=images.device)

    def _backward(self) -> tuple[Tensor, Tensor]:
        with self.context():
            out = self.target(self.images)
            loss = F.cross_entropy(out, self.labels)
        loss.backward()
        return loss.detach(), out.detach()

    def run(self) -> Tensor:
        """The gradients end with the step, so the memory of a step counts them."""
        loss, _ = self._backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def results(self) -> dict[str, Tensor]:
        """The tensors to compare: no other gradient than the classifier's is among them.

        Gradients of the first layers differ by percents between any two ways to round: rounding
        puts some units on the other side of a ReLU.
        """
        loss, out = self._backward()
        grad = self.module.fc.weight.grad
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, "logits": out, "classifier's gradient": grad}


def make_runner(
    name: str, kind: Callable, case: Case, device: str, inputs: Inputs | None = None
) -> Runner:
    """Prepare one contender; `inputs` come from make_inputs, None for new ones."""
    maps, weights, grad = inputs or make_inputs(case, device)
    if case.level == "attention":
        function = _compiled(kind) if name.endswith("compiled") else kind

        def call() -> Tensor:
            return function(maps, *weights)

        leaves = maps + weights
    else:
        torch.manual_seed(0)
        of_network = case.level == "network"
        module = kind(case.planes) if of_network else kind(case.planes, case.planes)
        module.to(device, DTYPES[case.dtype], memory_format=LAYOUTS[case.layout])
        module.train(case.mode != "forward")
        for part in module.modules():
            part.save_output = name.endswith("save_output")
        if name.endswith("prepacked"):
            epsa_fused.prepack(module, maps[0], frozen=True)
        target = _compiled(module) if name.endswith("compiled") else module
        if of_network and case.mode == "train":
            step = Step(module, target, maps[0])
            return Runner(step.run, lambda: [*step.results().values()])

        def call() -> Tensor | list[Tensor]:
            return target(maps[0])

        leaves = maps + [p for n, p in module.named_parameters() if uses(case, n)]
    grads = list(grad.chunk(BRANCHES, 1)) if case.level == "convolutions" else grad

    for leaf in leaves:
        leaf.requires_grad_(case.mode != "forward")
    if case.mode == "forward":
        return Runner(call, lambda: as_list(call()))

    def train() -> list[Tensor]:
        out = call()
        outs = [o.detach() for o in as_list(out)]
        return [*outs, *torch.autograd.grad(out, leaves, grads)]

    if case.mode == "train":
        return Runner(train, train)
    out = call()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grads, retain_graph=True)

    return Runner(backward, lambda: list(backward()))


def make_copy(case: Case, device: str) -> Runner:
    """The yardstick: a copy of the maps' bytes into freshly allocated memory."""
    source = torch.randn(case.nbytes // 4, device=device)
    return Runner(source.clone, lambda: [source.clone()])
