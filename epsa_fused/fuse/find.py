"""The structures that fuse() takes for PSA modules, and the fused modules it builds from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from ..modules import FusedPSAModule, FusedSplitPSA
from ..modules.layers import why_se_called
from ..modules.split import why_not_split_psa


class MisfitError(Exception):
    """A module that looks like a PSA module cannot be fused; the message is the reason."""


@dataclass(frozen=True)
class Kind:
    """A structure that is taken for a PSA module."""

    splits_input: bool  # each branch takes its own part of the input
    convs: Callable[[nn.Module], list[nn.Conv2d]]
    left_out: Callable[[nn.Module], Iterator[nn.Module]]  # layers the fused module does not call
    rebuilt: Callable[[nn.Module], list[nn.Module]]  # layers the fused module has its own of
    why_not: Callable[[nn.Module], str | None]
    build: Callable[[nn.Module, str], FusedPSAModule | FusedSplitPSA]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of PSA module that `module` looks like; None for others and for fused ones."""
    if isinstance(module, FusedPSAModule | FusedSplitPSA):
        return None
    children = {name for name, child in module._modules.items() if child is not None}
    if {"conv_1", "conv_2", "se"} <= children:
        return _PUBLISHED
    if {"convs", "se_blocks"} <= children:
        return _SPLIT
    return None


def _child(module: nn.Module, name: str) -> nn.Module:
    return cast(nn.Module, module._modules[name])


def _unexpected_children(module: nn.Module, expected: set[str]) -> str | None:
    unexpected = module._modules.keys() - expected
    return f"it has other children too: {', '.join(sorted(unexpected))}" if unexpected else None


# ---- the published code's module ----


def _published_convs(module: nn.Module) -> list[nn.Conv2d]:
    convs = (module._modules.get(f"conv_{i}") for i in range(1, len(module._modules) + 1))
    return [cast(nn.Conv2d, conv) for conv in convs if conv is not None]


def _why_not_published(module: nn.Module) -> str | None:
    convs = {f"conv_{i}": conv for i, conv in enumerate(_published_convs(module), 1)}
    why = _unexpected_children(module, {*convs, "se", "softmax"})
    if why is not None:
        return why
    for name, conv in convs.items():
        if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward:
            return f"{name} is a {type(conv).__name__}, expected a Conv2d"
    se = _child(module, "se")
    return why_se_called("se", se, type(se))


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
                dilation=min(conv.dilation[0] for conv in convs),
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
    se = _child(module, "se")
    for layer in new.se._modules:
        setattr(new.se, layer, se._modules[layer])
    new.se.training = se.training
    return new


_PUBLISHED = Kind(
    splits_input=False,
    convs=_published_convs,
    left_out=lambda module: _child(module, "se").modules(),
    rebuilt=lambda module: [_child(module, "se")],
    why_not=_why_not_published,
    build=_build_published,
)


# ---- External-Attention-pytorch's module ----


def _split_convs(module: nn.Module) -> list[nn.Conv2d]:
    return [cast(nn.Conv2d, conv) for conv in cast(nn.ModuleList, _child(module, "convs"))]


def _se_blocks(module: nn.Module) -> nn.ModuleList:
    return cast(nn.ModuleList, _child(module, "se_blocks"))


def _why_not_split(module: nn.Module) -> str | None:
    why = _unexpected_children(module, {"convs", "se_blocks", "softmax"})
    if why is not None:
        return why
    for name in ("convs", "se_blocks"):
        child = _child(module, name)
        if type(child) is not nn.ModuleList:
            return f"{name} is a {type(child).__name__}, expected a ModuleList"
    convs = _split_convs(module)
    for i, conv in enumerate(convs):
        if not isinstance(conv, nn.Conv2d):
            return f"convs.{i} is a {type(conv).__name__}, expected a Conv2d"
    channels = [(conv.in_channels, conv.out_channels) for conv in convs]
    if len(set(channels)) != 1:
        return f"its convs have (in_channels, out_channels) {channels}, expected equal ones"
    return why_not_split_psa(convs, _se_blocks(module))


def _build_split(module: nn.Module, order: str) -> FusedSplitPSA:
    convs, se_blocks = cast(nn.ModuleList, _child(module, "convs")), _se_blocks(module)
    new = FusedSplitPSA(convs, se_blocks, branch_order=order)
    new.convs, new.se_blocks = convs, se_blocks
    return new


_SPLIT = Kind(
    splits_input=True,
    convs=_split_convs,
    left_out=lambda module: _se_blocks(module).modules(),
    rebuilt=lambda module: [],
    why_not=_why_not_split,
    build=_build_split,
)
