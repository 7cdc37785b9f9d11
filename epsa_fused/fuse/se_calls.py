"""How a module calls its SE networks: one that is put in their place later is called so, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast, get_args

from torch import Tensor, nn

from ..modules.adopted import AdoptedPSA, PSALayers, SECall, SELayers
from ..modules.layers import Point, existing
from .parts import channels_of


def ways_to_call(twin: nn.Module, layers: PSALayers, x: Tensor) -> Iterator[PSALayers]:
    """The layers with the ways in which `twin` may call its SE networks, the likeliest first.

    A network may pool a map that is pooled already, so its result does not tell. What it is given
    does. Where the last way is to call the layers alone, `network` is what is called with something
    that no way gives it.

    Args:
        twin: of a trial; it runs once.
        layers: with what :func:`epsa_fused.fuse` found.
        x: an input.
    """
    if isinstance(twin, AdoptedPSA):  # it may call a network's layers alone
        yield layers._replace(networks=twin._layers.networks)
    networks = _seen(twin, layers, x)
    if networks is not None:
        yield from _with_or_without_sigmoid(layers, networks)
    named = networks or layers.networks
    if all(se.network is not None for se in named):
        for call in get_args(SECall):
            if call != "layers":
                yield from _with_or_without_sigmoid(
                    layers, tuple(se._replace(call=call) for se in named)
                )
    if networks is None:
        named = tuple(se._replace(network=None) for se in named)
    yield layers._replace(networks=tuple(se._replace(call="layers") for se in named))


def _with_or_without_sigmoid(
    layers: PSALayers, networks: tuple[SELayers, ...]
) -> Iterator[PSALayers]:
    for sigmoid in (False, True):
        yield layers._replace(networks=tuple(se._replace(sigmoid=sigmoid) for se in networks))


def _seen(twin: nn.Module, layers: PSALayers, x: Tensor) -> tuple[SELayers, ...] | None:
    """The SE networks, each as `twin` calls it; None where it does not call them all."""
    given = _given(twin, layers, x)
    maps = len(layers.branches) // len(layers.networks)
    seen = []
    for se in layers.networks:
        called = next((name for name in _holders(se) if given.get(name)), None)
        if called is None:
            return None
        channels, _ = channels_of(cast(Point, existing(twin, se.fc1)))
        call = _way(given[called], maps * len(x) * channels)
        seen.append(se._replace(network=called, call=call))
    return tuple(seen)


def _holders(se: SELayers) -> list[str]:
    """The names of the modules that hold both layers of the network, the outermost first."""
    if se.network is None:
        return []
    names = [se.network]
    for part in se.fc1[len(se.network) + 1 :].split(".")[:-1]:
        names.append(f"{names[-1]}.{part}")
    return [name for name in names if se.fc2.startswith(name + ".")]


def _given(twin: nn.Module, layers: PSALayers, x: Tensor) -> dict[str, list[Any]]:
    """What the holders of SE networks are given in one call of `twin`, by their names."""
    given: dict[str, list[Any]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            given.setdefault(name, []).append(next(iter((*args, *options.values())), None))

        return hook

    names = [name for se in layers.networks for name in _holders(se)]
    handles = [
        existing(twin, name).register_forward_pre_hook(keep(name), with_kwargs=True)
        for name in names
    ]
    twin.eval()
    try:
        with suppress(Exception):  # it may look at hooks
            twin(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    return given


def _way(given: list[Any], means: int) -> SECall:
    """The way in which a network was called, whose maps have as many means."""
    if not all(isinstance(t, Tensor) for t in given):
        return "whole"
    if sum(t.numel() for t in given) > means:
        return "whole"
    return "map" if given[0].dim() > 3 else "vector"
