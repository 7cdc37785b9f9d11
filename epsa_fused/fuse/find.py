"""What fuse() takes for a PSA module, told by its structure, and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..modules import FusedPSAModule, FusedSplitPSA
from ..modules.layers import why_se_not_fused
from ..modules.split import why_not_split_psa


class MisfitError(Exception):
    """Why a module that looks like a PSA module is none that can be fused."""


@dataclass(frozen=True)
class Kind:
    """A structure that is taken for a PSA module, and what is made of it."""

    convs: Callable[[nn.Module], list[nn.Module]]
    left_out: Callable[[nn.Module], Iterator[nn.Module]]  # layers that the fused one does not call
    rebuilt: Callable[[nn.Module], list[nn.Module]]  # layers that the fused one has its own of
    why_not: Callable[[nn.Module], str | None]
    build: Callable[[nn.Module, str], nn.Module]


def kind_of(module: nn.Module) -> Kind | None:
    """None for what does not look like a PSA module that is yet to be fused."""
    if isinstance(module, FusedPSAModule | FusedSplitPSA):
        return None
    children = {name for name, child in module._modules.items() if child is not None}
    if {"conv_1", "conv_2", "se"} <= children:
        return PUBLISHED
    if {"convs", "se_blocks"} <= children:
        return SPLIT
    return None


def _published_convs(module: nn.Module) -> list[nn.Module]:
    names = (f"conv_{i}" for i in range(1, len(module._modules) + 1))
    return [module._modules[name] for name in names if module._modules.get(name) is not None]


def _why_not_published(module: nn.Module) -> str | None:
    convs = {f"conv_{i}": conv for i, conv in enumerate(_published_convs(module), 1)}
    unexpected = module._modules.keys() - convs.keys() - {"se", "softmax"}
    if unexpected:
        return f"it has other children too: {', '.join(sorted(unexpected))}"
    for name, conv in convs.items():
        if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward:
            return f"{name} is a {type(conv).__name__}, expected a Conv2d"
    return why_se_not_fused("se", module.se, type(module.se))


def _build_published(module: nn.Module, order: str) -> FusedPSAModule:
    convs = _published_convs(module)
    first = convs[0]
    try:
        with torch.device("meta"):  # its layers are replaced below
            new = FusedPSAModule(
                first.in_channels,
                len(convs) * first.out_channels,
                [conv.kernel_size[0] for conv in convs],
                first.stride[0],
                [conv.groups for conv in convs],
                reduction=first.out_channels,
                branch_order=order,
            )
    except (ValueError, TypeError) as error:
        raise MisfitError(str(error)) from None
    for i, conv in enumerate(convs, 1):
        expected = getattr(new, f"conv_{i}")
        if conv.extra_repr() != expected.extra_repr():
            raise MisfitError(
                f"conv_{i} is Conv2d({conv.extra_repr()}), expected Conv2d({expected.extra_repr()})"
            )
        setattr(new, f"conv_{i}", conv)
    for layer in new.se._modules:
        setattr(new.se, layer, module.se._modules[layer])
    new.se.training = module.se.training
    return new


def _why_not_split(module: nn.Module) -> str | None:
    unexpected = module._modules.keys() - {"convs", "se_blocks", "softmax"}
    if unexpected:
        return f"it has other children too: {', '.join(sorted(unexpected))}"
    for name in ("convs", "se_blocks"):
        if type(module._modules[name]) is not nn.ModuleList:
            return f"{name} is a {type(module._modules[name]).__name__}, expected a ModuleList"
    for i, conv in enumerate(module.convs):
        if not isinstance(conv, nn.Conv2d):
            return f"convs.{i} is a {type(conv).__name__}, expected a Conv2d"
    channels = [(conv.in_channels, conv.out_channels) for conv in module.convs]
    if len(set(channels)) != 1:
        return f"its convs have (in_channels, out_channels) {channels}, expected equal ones"
    return why_not_split_psa(module.convs, module.se_blocks)


def _build_split(module: nn.Module, order: str) -> FusedSplitPSA:
    new = FusedSplitPSA(module.convs, module.se_blocks, branch_order=order)
    new.convs, new.se_blocks = module.convs, module.se_blocks
    return new


PUBLISHED = Kind(
    convs=_published_convs,
    left_out=lambda module: module.se.modules(),
    rebuilt=lambda module: [module.se],
    why_not=_why_not_published,
    build=_build_published,
)
SPLIT = Kind(
    convs=lambda module: list(module.convs),
    left_out=lambda module: module.se_blocks.modules(),
    rebuilt=lambda module: [],
    why_not=_why_not_split,
    build=_build_split,
)
