"""The copy of a module that a trial runs: random weights, and cheap branches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import first_line
from ..modules.adopted import PSALayers
from ..modules.layers import existing, has_bias
from .find import MisfitError
from .hooks import CALL_HOOKS
from .tree import copied

_CONV = nn.Conv2d(1, 1, 1, device="meta")
_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def in_mode(module: nn.Module, training: bool) -> nn.Module:
    """The module, set to training or to evaluation. A train() of its class may return nothing."""
    module.train(training)
    return module


def twin_of(
    module: nn.Module,
    layers: PSALayers,
    generator: torch.Generator,
    *,
    cheap: bool = True,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """A copy in `dtype` with random weights on the CPU, without hooks.

    Where `cheap`, each branch computes a 1x1 convolution. It keeps its class and attributes, at
    which a forward may look.
    """
    memo: dict[int, Any] = {}
    try:
        for name in layers.branches:
            branch = existing(module, name)
            if cheap or is_plain(branch) or _is_made_by_hooks(branch):
                memo[id(branch)] = _stand_in(branch, generator, cheap)
        for m in module.modules():
            if isinstance(m, nn.SyncBatchNorm) and id(m) not in memo:
                memo[id(m)] = _of_one_process(m)
        twin = copied(module, memo)
    except Exception as error:  # for example, it keeps a result with an autograd graph
        raise MisfitError(f"it cannot be copied for a trial: {first_line(error)}") from None
    for m in twin.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(random_values(p.shape, generator).to(dtype))
        for name, t in m._buffers.items():
            if t is not None and t.is_floating_point():  # it may be the variance of a BatchNorm
                m._buffers[name] = random_values(t.shape, generator).abs_().to(dtype)
            elif t is not None:
                m._buffers[name] = torch.zeros_like(t, device="cpu") if t.is_meta else t.cpu()
        for hooks in CALL_HOOKS:
            getattr(m, hooks).clear()
    if not cheap:
        for name in layers.branches:
            _cast_attributes(existing(twin, name), dtype)
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
    if not is_plain(branch):
        if cheap or not isinstance(branch, nn.Conv2d):
            return _with_cheap_forward(branch, random_values((*channels[::-1], 1, 1), generator))
        shape = (channels[1], channels[0] // branch.groups, *branch.kernel_size)
        options = {name: getattr(branch, name) for name in _SETTINGS[1:-1]}
        return _with_cheap_forward(branch, random_values(shape, generator), **options)
    if cheap:
        return nn.Conv2d(*channels, 1, device="meta")
    settings: dict[str, Any] = {name: getattr(branch, name) for name in _SETTINGS}
    return nn.Conv2d(*channels, **settings, bias=has_bias(convs[0]), device="meta")


def _of_one_process(norm: nn.SyncBatchNorm) -> nn.BatchNorm2d:
    """A trial runs on the CPU and in one process: others may not call fuse(), too."""
    options = (norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    return nn.BatchNorm2d(norm.num_features, *options, device="meta").train(norm.training)


def is_plain(branch: nn.Module) -> bool:
    """Whether it is a convolution to which nobody has added anything."""
    return type(branch) is nn.Conv2d and all(
        getattr(branch, held).keys() == getattr(_CONV, held).keys()
        for held in ("__dict__", "_parameters", "_buffers", "_modules")
    )


def _is_made_by_hooks(branch: nn.Module) -> bool:
    """Whether a hook computes tensors that it reads, as torch.nn.utils.prune does."""
    return any(
        m._forward_pre_hooks and any(isinstance(value, Tensor) for value in vars(m).values())
        for m in branch.modules()
    )


def _cast_attributes(branch: nn.Module, dtype: torch.dtype) -> None:
    """Give tensors that are neither parameters nor buffers the dtype of those."""
    for m in branch.modules():
        for name, value in vars(m).items():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta:
                vars(m)[name] = value.detach().to("cpu", dtype)


def _with_cheap_forward(branch: nn.Module, weight: Tensor, **options: Any) -> nn.Module:
    """A copy of the branch, with all that it holds, which computes a convolution."""
    memo: dict[int, Any] = {
        id(value): value.detach().clone()  # deepcopy refuses results of autograd
        for m in branch.modules()
        for value in (*m._parameters.values(), *m._buffers.values(), *vars(m).values())
        if isinstance(value, Tensor)
    }
    twin = copied(branch, memo)

    def forward(*args: Tensor, **named: Tensor) -> Tensor:
        x, *_ = (*args, *named.values())  # more than one is seen elsewhere
        return F.conv2d(x, weight.to(x.dtype), **options)

    vars(twin)["forward"] = forward
    return twin
