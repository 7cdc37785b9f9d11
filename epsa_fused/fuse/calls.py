"""What a call of a module gives its branches and SE networks, and what the branches make of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..modules.adopted import PSALayers
from ..modules.layers import Point, existing
from .compare import ROUNDING
from .find import MisfitError
from .parts import channels_of


class Calls:
    """The calls of branches and of SE networks in one call of a module."""

    def __init__(self, twin: nn.Module, layers: PSALayers) -> None:
        self._layers = layers
        self._branches = [existing(twin, name) for name in layers.branches]
        first = {existing(twin, network.fc1): None for network in layers.networks}
        self._fc1 = {fc1: channels_of(cast(Point, fc1))[0] for fc1 in first}  # its inputs
        self._inputs: dict[nn.Module, list[Tensor]] = {}
        self._maps: list[Tensor] = []
        self._most = 0  # inputs of one call of a layer
        self._order: list[nn.Module] = []  # of the branches' first calls

    @contextmanager
    def watched(self) -> Iterator[None]:
        def keep(layer: nn.Module, args: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
            x, *more = (*args, *options.values())
            self._inputs.setdefault(layer, []).append(x.detach().clone())
            if layer in branches and layer not in self._order:
                self._order.append(layer)
            self._most = max(self._most, 1 + len(more))

        def keep_map(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self._maps.append(out.detach().clone())

        branches = set(self._branches)
        layers = {*branches, *self._fc1}
        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
        handles += [branch.register_forward_hook(keep_map) for branch in branches]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check(self) -> None:
        """Raise MisfitError unless each branch is called once, and with one map.

        It may hold a BatchNorm or a dropout. The weights of one that is not called are read, with
        settings that nothing tells.
        """
        for name, branch in zip(self._layers.branches, self._branches, strict=True):
            calls = len(self._inputs.get(branch, ()))
            if calls != self._branches.count(branch):
                raise MisfitError(f"it calls {name} {calls} times, expected once")
        if self._most > 1:
            raise MisfitError(f"it calls a branch with {self._most} inputs, expected one map")

    def dtypes(self) -> set[torch.dtype]:
        """Those of the branches' maps."""
        return {m.dtype for m in self._maps}

    def are_in_order(self) -> bool:
        """Whether the branches were called in the order of their names."""
        return self._order == list(dict.fromkeys(self._branches))

    def count(self) -> int:
        return sum(map(len, self._inputs.values()))

    def _are_parallel(self, x: Tensor) -> bool:
        """Whether each branch was called on x, or on its part of x, or all on another input."""
        others = () if self._layers.splits_input else self._inputs.get(self._branches[0], ())
        return any(map(self._were_called_on, (x, *others)))

    def _were_called_on(self, x: Tensor) -> bool:
        return all(
            any(torch.equal(part, given) for given in self._inputs.get(branch, ()))
            for branch, part in self._parts(x)
        )

    def differences(self, x: Tensor) -> list[str]:
        """What the branches and SE networks were given in place of what PSA gives them.

        They come from foreign code, in any shape and dtype. Nothing is said of what cannot be read.
        """
        try:
            return self._differences(x)
        except Exception:
            return []

    def _differences(self, x: Tensor) -> list[str]:
        if any(branch not in self._inputs for branch in self._branches):
            return ["it does not call all of its branches"]
        found = []
        if not self._were_called_on(x):
            found.append("its branches are not called on its input itself")
        vectors = [
            (given.movedim(-3, -1) if isinstance(fc1, nn.Conv2d) else given).reshape(-1, channels)
            for fc1, channels in self._fc1.items()
            for given in self._inputs.get(fc1, ())
        ]
        means = [m.mean((-2, -1)).reshape(-1, m.shape[-3]) for m in self._maps]
        if not vectors:
            found.append("it does not call the layers of its SE networks")
        elif not _hold_the_same_rows(means, vectors):
            found.append("its SE networks are not given the mean of each map")
        return found

    def _parts(self, x: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        count = len(self._branches)
        # tensor_split gives as many parts of a few channels, too
        parts = x.tensor_split(count, 1) if self._layers.splits_input else [x] * count
        return zip(self._branches, parts, strict=True)

    def weigh_each_map(self, x: Tensor) -> bool:
        """Whether branches in parallel gave maps, and SE networks saw a vector for each of them.

        The maps of branches that are not called come from their weights.
        """
        maps = sum(len(self._inputs.get(branch, ())) for branch in set(self._branches))
        if maps > 0 and not self._are_parallel(x):
            return False
        vectors = sum(
            given.numel() / channels
            for fc1, channels in self._fc1.items()
            for given in self._inputs.get(fc1, ())
        )
        return vectors == (maps or len(self._branches)) * len(x)


def _hold_the_same_rows(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether the rows [*, C] of both are the same in any order, as their dtypes round."""
    shapes = {t.shape[1:] for t in (*some, *others)}
    if not some or not others or len(shapes) > 1:
        return False
    rounding = max(ROUNDING[t.dtype] for t in (*some, *others))
    rows, other_rows = (torch.cat([t.double() for t in rows]) for rows in (some, others))
    distances = torch.cdist(rows, other_rows, p=float("inf"))
    near = distances <= max(rounding, ROUNDING[torch.float32]) * rows.abs().max()
    return rows.shape == other_rows.shape and bool(near.any(1).all() and near.any(0).all())
