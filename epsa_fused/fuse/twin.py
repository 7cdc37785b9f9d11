"""The copy of a module that a trial runs: random weights, and cheap branches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.adopted import PSALayers
from ..modules.layers import existing, has_bias
from .find import MisfitError
from .hooks import CALL_HOOKS
from .tree import copied

_CONV = nn.Conv2d(1, 1, 1, device="meta")
_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def twin_of(
    module: nn.Module, layers: PSALayers, generator: torch.Generator, *, cheap: bool = True
) -> nn.Module:
    """A copy in float64 with random weights on the CPU, without hooks.

    Each branch computes a convolution: a 1x1 one where `cheap`, and where it is more than a
    convolution. It keeps its class and attributes, at which a forward may look.
    """
    memo: dict[int, Any] = {}
    try:
        for name in layers.branches:
            branch = existing(module, name)
            memo[id(branch)] = _stand_in(branch, generator, cheap)
        twin = copied(module, memo)
    except Exception as error:  # for example, it keeps a result with an autograd graph
        raise MisfitError(f"it cannot be copied for a trial: {error}") from None
    for m in twin.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(random_values(p.shape, generator))
        for name, t in m._buffers.items():
            if t is not None and t.is_floating_point():
                m._buffers[name] = random_values(t.shape, generator)
        for hooks in CALL_HOOKS:
            getattr(m, hooks).clear()
    return twin


def random_values(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random float64 weights or maps.

    Weights give outputs of about one, so no sigmoid saturates. Biases are small beside those: each
    hidden unit is then alive in some branches and samples and dead in others.
    """
    scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
    values = torch.empty(shape, dtype=torch.float64, device="cpu")
    return values.uniform_(-(3**0.5) * scale, 3**0.5 * scale, generator=generator)


def _stand_in(branch: nn.Module, generator: torch.Generator, cheap: bool) -> nn.Module:
    convs = [m for m in branch.modules() if isinstance(m, nn.Conv2d)]
    channels = (convs[0].in_channels, convs[-1].out_channels)
    if not _is_plain(branch):
        return _with_cheap_forward(branch, random_values((*channels[::-1], 1, 1), generator))
    if cheap:
        return nn.Conv2d(*channels, 1, device="meta")
    settings: dict[str, Any] = {name: getattr(branch, name) for name in _SETTINGS}
    return nn.Conv2d(*channels, **settings, bias=has_bias(convs[0]), device="meta")


def _is_plain(branch: nn.Module) -> bool:
    """Whether it is a convolution to which nobody has added anything."""
    return type(branch) is nn.Conv2d and all(
        getattr(branch, held).keys() == getattr(_CONV, held).keys()
        for held in ("__dict__", "_parameters", "_buffers", "_modules")
    )


def _with_cheap_forward(branch: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of the branch, with all that it holds, which computes a 1x1 convolution."""
    memo: dict[int, Any] = {
        id(value): value.detach().clone()  # deepcopy refuses results of autograd
        for m in branch.modules()
        for value in (*m._parameters.values(), *m._buffers.values(), *vars(m).values())
        if isinstance(value, Tensor)
    }
    twin = copied(branch, memo)

    def forward(*args: Tensor, **options: Tensor) -> Tensor:
        x, *_ = (*args, *options.values())  # more than one is seen elsewhere
        return F.conv2d(x, weight.to(x.dtype))

    vars(twin)["forward"] = forward
    return twin
