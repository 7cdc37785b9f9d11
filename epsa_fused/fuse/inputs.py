"""What a trial gives to modules: sizes, values and magnitudes at which a forward may look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..modules.adopted import PSALayers
from ..modules.layers import existing
from .twin import is_plain, random_values

# How much larger maps, gradients or weights of some runs are: a clamp or a ReLU6 shows then. A
# power of two is undone exactly.
LARGE = 2.0**12


class Given(NamedTuple):
    """An input, and the largest entry of the gradient that its output is given."""

    x: Tensor
    cotangent: float = 1.0


# N, H, W, the mean of the values, and the cotangent.
_INPUTS = (
    (4, 3, 2, 0.0, 1.0),
    (2, 7, 5, 1.0, 1.0),
    (1, 4, 9, -2.0, 1.0),
    (2, 6, 6, 0.5, LARGE),
)


def inputs_of(twin: nn.Module, layers: PSALayers, generator: torch.Generator) -> list[Given]:
    return [
        Given(_input(twin, layers, generator, (n, h, w), mean), cotangent)
        for n, h, w, mean, cotangent in _INPUTS
    ]


def are_plain(twin: nn.Module, layers: PSALayers) -> bool:
    """Whether its branches are convolutions alone."""
    return all(is_plain(existing(twin, name)) for name in layers.branches)


def inputs_of_own_branches(
    twin: nn.Module, layers: PSALayers, generator: torch.Generator
) -> Iterator[Given]:
    """One that just holds the kernels; and others for branches that pool, or refuse odd sizes.

    The last ones are the sizes of a network's stages: a LayerNorm or a window may take these alone.
    """
    branches = [existing(twin, name) for name in layers.branches]
    size = 2 + max(sum(map(_reach, _convs(branch))) for branch in branches)
    if are_plain(twin, layers):
        yield Given(_input(twin, layers, generator, (1, size, size - 1), 1.0))
        return
    yield Given(_input(twin, layers, generator, (2, size, size - 1), 1.0))
    for square in (32 * (1 + size // 32), 56, 28, 14, 7):
        yield Given(_input(twin, layers, generator, (2, square, square), 1.0))


def inplans_of(twin: nn.Module, layers: PSALayers) -> int:
    """The channels of its inputs."""
    first, *_ = _convs(existing(twin, layers.branches[0]))
    return first.in_channels * (len(layers.branches) if layers.splits_input else 1)


@contextmanager
def scaled(parameters: Iterable[nn.Parameter], factor: float) -> Iterator[None]:
    kept = set(parameters)
    for p in kept:
        p.data *= factor
    try:
        yield
    finally:
        for p in kept:
            p.data /= factor


def _input(
    twin: nn.Module,
    layers: PSALayers,
    generator: torch.Generator,
    size: tuple[int, int, int],
    mean: float,
) -> Tensor:
    n, h, w = size
    x = random_values((n, inplans_of(twin, layers), h, w), generator)
    return x / x.std() + mean


def _convs(branch: nn.Module) -> list[nn.Conv2d]:
    return [m for m in branch.modules() if isinstance(m, nn.Conv2d)]


def _reach(conv: nn.Conv2d) -> int:
    return max(d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
