"""What fuse() takes for a PSA module: one that has layers for its branches and for SE networks.

The names of the layers and the classes around them count for nothing. What forward computes is not
seen here: trial.py tries it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._library import MAX_BRANCHES, MIN_BRANCHES
from ..modules import FusedPSAModule, FusedSplitPSA
from ..modules.adopted import PSALayers
from ..modules.layers import has_bias
from ..modules.split import SplitPSA
from ..reference import PSAModule
from .parts import Branch, Network, channels_of, matched, parts_of

# The names by which the best known classes are recognised even where layers are missing.
_KNOWN = ({"conv_1", "conv_2", "se"}, {"convs", "se_blocks"})


class MisfitError(Exception):
    """A module cannot be fused.

    Args:
        why: the reason.
        named: whether a user would take it for a PSA module, and wants to know.
    """

    def __init__(self, why: str, named: bool = True) -> None:
        super().__init__(why)
        self.named = named


@dataclass(frozen=True)
class Candidate:
    """A module that may be a PSA module.

    Attributes:
        layers: its layers; without any where it was compiled.
        hidden: the plain Python lists that hold some of them, by attribute.
        why_not: the reason why it cannot be fused, or None.
        known: whether it has the names of a class that is known for PSA.
    """

    layers: PSALayers
    hidden: Mapping[str, nn.ModuleList]
    why_not: str | None
    known: bool


def candidates(model: nn.Module) -> dict[nn.Module, Candidate]:
    """The innermost modules of `model` that may be PSA modules."""
    found: dict[nn.Module, Candidate] = {}
    seen: dict[nn.Module, bool] = {}

    def search(module: nn.Module) -> bool:
        """Whether there is one in `module`, a fused one too."""
        if module not in seen:
            seen[module] = isinstance(module, FusedPSAModule | FusedSplitPSA) or any(
                [search(child) for child in module.children()]
            )
            candidate = None if seen[module] else _look(module)
            if candidate is not None:
                found[module] = candidate
                seen[module] = True
        return seen[module]

    search(model)
    return found


def _look(module: nn.Module) -> Candidate | None:
    if getattr(type(module), "forward", None) in (nn.Sequential.forward, nn.Module.forward):
        return None  # a chain or a list
    lists = _plain_lists(module)
    children = {name: child for name, child in module._modules.items() if child is not None}
    known = any(names <= children.keys() | lists.keys() for names in _KNOWN)
    if isinstance(module, torch.jit.ScriptModule):
        compiled = "it was compiled by torch.jit; fuse before that"
        return Candidate(PSALayers((), ()), {}, compiled, known) if known else None
    parts = parts_of({**children, **lists})
    branches, networks, others = matched(parts)
    if not networks:
        parts = parts_of({**children, **lists}, opened=True)
        branches, networks, others = matched(parts)
    unfit = _why_not(branches, networks)
    if unfit is not None and others:
        unfit += f"; what is more than that: {', '.join(others)}"
    hidden = {name: held for name, held in lists.items() if name in parts.order}
    more = [] if unfit is not None else _why_not_alone(list(hidden), others)
    why = _why_not_now(module) or unfit or "; ".join(more) or None
    if why is not None and not known and not _is_pyramid(branches, networks):
        return None
    channels = {branch.channels[1] for branch in branches}
    used = tuple(n.layers for n in networks if n.channels in channels)
    layers = PSALayers(tuple(branch.name for branch in branches), used)
    return Candidate(layers, hidden, why, known)


def _why_not_alone(hidden: list[str], others: list[str]) -> list[str]:
    """The reasons why a module with all the layers of a PSA module cannot be fused."""
    why = []
    if hidden:
        why.append(
            f"its layers are in plain Python lists ({', '.join(hidden)}), which PyTorch neither "
            "trains nor moves nor saves; make each an nn.ModuleList"
        )
    if others:
        why.append(
            f"it has other children too: {', '.join(others)}; it may fuse without them, or, where "
            "they change a branch's map, with each in one nn.Sequential with its convolution"
        )
    return why


def _is_pyramid(branches: list[Branch], networks: list[Network]) -> bool:
    """Whether the layers may be those of a PSA module that cannot be fused.

    One call of it decides. A chain with an SE needs convolutions that keep the number of channels,
    and one SE network is enough.
    """
    if [b.channels[1] for b in branches] == [n.channels for n in networks]:
        inputs = {b.channels[0] for b in branches}  # each has its own network
        return len(branches) > 2 and len(inputs) == 1 and len({b.setting for b in branches}) > 1
    if not networks or not _differ(branches):
        return False
    inplans, channels = branches[0].channels
    return inplans != channels or len(networks) > 1


def _differ(branches: list[Branch]) -> bool:
    """Whether these are at least three branches of the same channels, and not of one kind."""
    channels = {branch.channels for branch in branches}
    settings = {branch.setting for branch in branches}
    return len(branches) > 2 and len(channels) == 1 and len(settings) > 1


def _why_not_now(module: nn.Module) -> str | None:
    """The reason why the state of `module` forbids to fuse it, or None."""
    if any(nn.parameter.is_lazy(p) for p in module.parameters()):
        return "its parameters are not initialised; run the model once before"
    own = [*module._parameters, *module._buffers]
    if own:
        return f"it has parameters or buffers of its own: {', '.join(own)}"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if any(type(p).__name__ == "DTensor" for p in module.parameters()):
        return "its parameters are shards (DTensor); fuse before sharding"
    return None


def why_not_replaced(module: nn.Module) -> str | None:
    """What a PSA module has that a fused one would lose, or None."""
    more = [
        p.name
        for p in list(inspect.signature(module.forward).parameters.values())[1:]
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if more and not isinstance(module, PSAModule | SplitPSA):  # theirs are known
        return f"its forward takes more than the input: {', '.join(more)}"
    hidden = [
        key
        for m in module.modules()
        for key, value in vars(m).items()
        if isinstance(value, torch.Tensor) and value.is_leaf and value.requires_grad
    ]
    if hidden:
        return f"it has tensors that train and are no parameters: {', '.join(hidden)}"
    return None


def _plain_lists(module: nn.Module) -> dict[str, nn.ModuleList]:
    """The plain lists and dicts of modules that PyTorch does not know of, by attribute."""
    lists = {}
    for name, value in vars(module).items():
        # isinstance would ask the object: a proxy may fail
        items = list(dict.values(value)) if issubclass(type(value), dict) else value
        if name == "_modules" or not issubclass(type(items), list | tuple) or not items:
            continue
        if all(issubclass(type(item), nn.Module) for item in items):
            registered = set(module.modules())
            if registered.isdisjoint(items):
                lists[name] = nn.ModuleList(items)
    return lists


def _why_not(branches: list[Branch], networks: list[Network]) -> str | None:
    """The reason why these are not the layers of a PSA module, or None."""
    if not networks:
        return "it has no SE network: two 1x1 convolutions or Linear layers, C -> r -> C channels"
    alone = [branch for branch in branches if branch.stride is not None]
    equal: dict[str, list[Any]] = {
        "channels of the SE networks": [channels_of(n.points[0]) for n in networks],
        "biases of the SE networks": [tuple(map(has_bias, n.points)) for n in networks],
        "input channels of the branches": [branch.channels[0] for branch in branches],
        "strides of the branches": [branch.stride for branch in alone],
        "paddings less what the kernels reach": [
            b.growth for b in branches if b.growth is not None
        ],
    }
    for what, values in equal.items():
        if len(set(values)) > 1:
            return f"the {what} are {values}, expected equal ones"
    count = len(branches)
    if not MIN_BRANCHES <= count <= MAX_BRANCHES:
        return (
            f"it has {count} branches of {networks[0].channels} channels, as its SE networks have, "
            f"expected {MIN_BRANCHES} to {MAX_BRANCHES}"
        )
    if len(networks) not in (1, count):
        return (
            f"it has {count} branches and {len(networks)} SE networks, "
            "expected one network, or one for each branch"
        )
    return None
