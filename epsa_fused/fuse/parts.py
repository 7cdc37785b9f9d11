"""The parts of a module: what could be the branches and the SE networks of PSA, by their layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from ..modules.adopted import SELayers
from ..modules.layers import Point


@dataclass(frozen=True)
class Branch:
    """A module that makes a map: a convolution, or what holds one."""

    name: str
    channels: tuple[int, int]  # in, out
    setting: tuple[object, ...]  # of its convolution: kernel size, dilation and groups
    # How its map's height and width come from the input's; None for more than a convolution.
    stride: tuple[int, ...] | None
    growth: tuple[int, ...] | None  # before the stride


@dataclass(frozen=True)
class Network:
    """A module or a pair of layers that may be an SE network."""

    layers: SELayers
    points: tuple[Point, Point]

    @property
    def channels(self) -> int:
        return channels_of(self.points[0])[0]


@dataclass
class Parts:
    """Where the layers with weights are that a module could call."""

    branches: list[Branch] = field(default_factory=list)
    networks: list[Network] = field(default_factory=list)
    points: list[tuple[str, Point]] = field(default_factory=list)  # in no network
    others: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)  # all names, as they were registered

    def are_weighed_branch(self) -> bool:
        """Whether these are one branch and one SE network of its channels, and maybe others."""
        pairs, single = _paired(self.points)
        networks = self.networks + pairs
        branches = self.branches + [b for b in (_branch(n, p, [p]) for n, p in single) if b]
        if len(networks) != 1 or len(branches) != 1:
            return False
        return branches[0].channels[1] == networks[0].channels

    def of_one_kind(self) -> bool:
        pairs, single = _paired(self.points)
        return not self.others and bool(self.networks or pairs) != bool(self.branches or single)

    def extend(self, more: Parts) -> None:
        self.branches += more.branches
        self.networks += more.networks
        self.points += more.points
        self.others += more.others
        self.order += more.order


def parts_of(
    children: Mapping[str, nn.Module | None], prefix: str = "", *, opened: bool = False
) -> Parts:
    """The parts of a module with these children.

    A list of modules is looked into, and a module that holds branches alone, or SE networks alone.
    Where `opened`, so is a module that holds one branch and its SE network.
    """
    parts = Parts()
    for key, child in children.items():
        name = prefix + key
        weighted = {} if child is None else dict(_weighted(child, name))
        layers = list(weighted.values())
        if child is None or not layers:
            continue  # without weights, such as a softmax
        parts.order.append(name)
        branch = _branch(name, child, layers)
        if len(layers) == 1 and _is_point(layers[0]) and layers[0] is child:
            parts.points.append((name, cast(Point, child)))
        elif _is_network(layers):
            fc1, fc2 = weighted
            points = cast(tuple[Point, Point], tuple(layers))
            parts.networks.append(Network(SELayers(fc1, fc2, name), points))
        elif opened and (inner := parts_of(child._modules, name + ".")).are_weighed_branch():
            parts.extend(inner)
        elif branch is not None and not _only_holds(child):
            parts.branches.append(branch)
        else:
            inner = parts_of(child._modules, name + ".", opened=opened)
            if _only_holds(child) or inner.of_one_kind():
                parts.extend(inner)
            else:  # it is called as a whole: what makes it more than an SE or a branch
                odd = [n for n, m in weighted.items() if not isinstance(m, Point)]
                parts.others += odd or [name]
    return parts


def _only_holds(module: nn.Module) -> bool:
    """Whether nobody can call it, and all it has are modules: a list or dict of them, say."""
    has_tensors = bool(module._parameters or module._buffers)
    return getattr(type(module), "forward", None) is nn.Module.forward and not has_tensors


def _weighted(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers with parameters or buffers; a parametrised layer as one."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    if isinstance(module, Point) or any(t is not None for t in tensors):
        yield name, module
    if not isinstance(module, Point):
        for key, child in module._modules.items():
            if child is not None:
                yield from _weighted(child, f"{name}.{key}")


def _is_point(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d):
        return isinstance(layer, nn.Linear)
    return (
        layer.kernel_size == (1, 1)
        and layer.padding in ((0, 0), "same", "valid")
        and layer.groups == 1
    )


def channels_of(layer: Point) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def _is_network(layers: list[nn.Module]) -> bool:
    """Whether two layers are a network from C channels to r <= C and back."""
    if len(layers) != 2 or not all(map(_is_point, layers)):
        return False
    wide, narrow = channels_of(cast(Point, layers[0]))
    return narrow <= wide and channels_of(cast(Point, layers[1])) == (narrow, wide)


def _branch(name: str, module: nn.Module, layers: list[nn.Module]) -> Branch | None:
    """The module as a branch, if its layers are those of one: one convolution sees more than a
    pixel, or there is one convolution at all."""
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    wide = [conv for conv in convs if max(conv.kernel_size) > 1] or convs
    if len(wide) != 1 or any(isinstance(layer, nn.Linear) for layer in layers):
        return None
    conv = wide[0]
    channels = (convs[0].in_channels, convs[-1].out_channels)
    setting = (conv.kernel_size, conv.dilation, conv.groups)
    sizes = (conv.stride, _growth(conv)) if conv is module else (None, None)
    return Branch(name, channels, setting, *sizes)


def _growth(conv: nn.Conv2d) -> tuple[int, ...]:
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "same":
        return (0, 0)
    padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
    return tuple(2 * p - r for p, r in zip(padding, reach, strict=True))


def matched(parts: Parts) -> tuple[list[Branch], list[Network], list[str]]:
    """The branches and networks that fit each other, and the names of the other layers."""
    pairs, single = _paired(parts.points)
    networks = parts.networks + pairs
    if len({id(point) for network in networks for point in network.points}) == 2:
        del networks[1:]  # one network by several names
    branches, others = list(parts.branches), list(parts.others)
    for name, point in single:
        branch = _branch(name, point, [point])
        if branch is None:
            others.append(name)
        else:
            branches.append(branch)
    branches.sort(key=lambda branch: parts.order.index(branch.name))
    channels = {network.channels for network in networks}
    fitting = [branch for branch in branches if not channels or branch.channels[1] in channels]
    others += [branch.name for branch in branches if branch not in fitting]
    return fitting, networks, others


def _paired(
    points: list[tuple[str, Point]],
) -> tuple[list[Network], list[tuple[str, Point]]]:
    """The SE networks that layers in no common module make, and the layers that are left.

    fc1 and fc2 follow each other; or all fc1 come before all fc2, as in two lists.
    """
    half = len(points) // 2
    interleaved = [point for pair in zip(points, points[half:], strict=False) for point in pair]
    in_lists = len(points) % 2 == 0 and all(
        _reduces(*interleaved[i : i + 2]) for i in range(0, len(points), 2)
    )
    left = interleaved if in_lists else list(points)
    networks, single = [], []
    while left:
        if len(left) > 1 and _reduces(*left[:2]):
            (fc1, first), (fc2, second) = left[:2]
            networks.append(Network(SELayers(fc1, fc2), (first, second)))
            del left[:2]
        else:
            single.append(left.pop(0))
    return networks, single


def _reduces(first: tuple[str, Point], second: tuple[str, Point]) -> bool:
    wide, narrow = channels_of(first[1])
    return _is_network([first[1], second[1]]) and narrow < wide
