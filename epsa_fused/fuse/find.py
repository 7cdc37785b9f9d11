"""What fuse() takes for a PSA module: one that has layers for its branches and for SE networks.

The names of the layers and the classes around them count for nothing. What forward computes is not
seen here: trial.py tries it.
"""

from __future__ import annotations

import inspect
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
from .parts import Branch, Network, Parts, channels_of, matched, parts_of

# The names by which the best known classes are recognised even where layers are missing.
_KNOWN = ({"conv_1", "conv_2", "se"}, {"convs", "se_blocks"})


# What a class overrides that saves more than its parameters and buffers.
_STATE_METHODS = (
    *("get_extra_state", "set_extra_state"),
    *("_save_to_state_dict", "_load_from_state_dict"),
)


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
        layers: its layers; None where it cannot be fused.
        why_not: the reason then.
        named: whether it has the names of a class that is known for PSA.
    """

    layers: PSALayers | None
    why_not: str | None
    named: bool


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
        compiled = Candidate(None, "it was compiled by torch.jit; fuse before that", True)
        return compiled if known else None
    parts = parts_of({**children, **lists})
    branches, networks, others = matched(parts)
    if not networks:
        parts = parts_of({**children, **lists}, opened=True)
        branches, networks, others = matched(parts)
        if not networks and _differ([branch for branch, _ in parts.mixed]):
            return Candidate(None, _mixed(parts), True)
    hidden = [name for name in lists if name in parts.order]
    if _have_one_network(parts.branches, networks):
        return Candidate(None, _one_network(parts.branches, networks), True)
    unfit = _why_not(branches, networks)
    if unfit is not None and others:
        unfit += f"; what is more than that: {', '.join(others)}"
    why = _why_not_now(module) or unfit
    if why is None and hidden:
        why = (
            f"its layers are in plain Python lists ({', '.join(hidden)}), which PyTorch neither "
            "trains nor moves nor saves; make each an nn.ModuleList"
        )
    elif why is None and others:
        why = (
            f"it has other children too: {', '.join(others)}; it fuses without them, or, where "
            "they change a branch's map, with each in one nn.Sequential with its convolution"
        )
    if unfit is None and why is None:
        layers = PSALayers(tuple(b.name for b in branches), tuple(n.layers for n in networks))
        return Candidate(layers, None, known or _is_pyramid(branches, networks))
    return Candidate(None, why, True) if known or _is_pyramid(branches, networks) else None


def _is_pyramid(branches: list[Branch], networks: list[Network]) -> bool:
    """Whether the layers alone tell a PSA module from a chain of layers with an SE.

    A chain needs convolutions that keep the number of channels, and one SE network is enough.
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


def _have_one_network(branches: list[Branch], networks: list[Network]) -> bool:
    """Whether one SE network takes the channels of all branches together."""
    channels = sum(branch.channels[1] for branch in branches)
    return _differ(branches) and [network.channels for network in networks] == [channels]


def _one_network(branches: list[Branch], networks: list[Network]) -> str:
    return (
        f"its SE network has {networks[0].channels} channels, those of its {len(branches)} "
        f"branches together; that of PSA weighs the {branches[0].channels[1]} of each by themselves"
    )


def _mixed(parts: Parts) -> str:
    more = [name for _, others in parts.mixed for name in others]
    return (
        f"its branches hold their SE networks beside other layers: {', '.join(more)}; it fuses "
        "with each of these in one nn.Sequential with the branch's convolution"
    )


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
    kind = type(module)
    more = [
        p.name
        for p in list(inspect.signature(module.forward).parameters.values())[1:]
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if more and not isinstance(module, PSAModule | SplitPSA):  # theirs are known
        return f"its forward takes more than the input: {', '.join(more)}"
    if any(getattr(kind, name) is not getattr(nn.Module, name) for name in _STATE_METHODS):
        return "it saves or loads its state_dict in a way of its own"
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
        items = list(value.values()) if isinstance(value, dict) else value
        if name == "_modules" or not isinstance(items, list | tuple) or not items:
            continue
        if all(isinstance(item, nn.Module) for item in items):
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
