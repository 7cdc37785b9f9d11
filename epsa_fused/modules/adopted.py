"""AdoptedPSA, the PSA module over the layers of another class, and FusedAdoptedPSA, the same
fused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._arguments import SEArguments
from ..reference import PSAModule
from .fused import FusedPSAModule
from .layers import STATE, Point, existing, has_bias, read_se, submodule, why_layer_called

# What the plain module calls: the SE network on a branch's map [N, C, H, W], on its mean as a map
# [N, C, 1, 1], on the mean [N, C], or its layers one after the other.
SECall: TypeAlias = Literal["whole", "map", "vector", "layers"]


class SELayers(NamedTuple):
    """An SE network, by the names of its layers as in `module.named_modules()`.

    Attributes:
        fc1, fc2: its 1x1 convolutions or Linear layers.
        network: the module that holds both and nothing else with weights; None if there is none.
        call: what the plain module calls. With "layers" it calls `network` too, but in a way that
            only it knows.
        sigmoid: whether the plain module takes the sigmoid of what `network` gives.
    """

    fc1: str
    fc2: str
    network: str | None = None
    call: SECall = "layers"
    sigmoid: bool = False


class PSALayers(NamedTuple):
    """The layers of a PSA module, by their names as in `module.named_modules()`.

    Attributes:
        branches: the S modules that make the branches' maps: convolutions, or what holds them.
        networks: one SE network, or one for each branch.
        splits_input: whether each branch takes its own part of the input's channels.
    """

    branches: tuple[str, ...]
    networks: tuple[SELayers, ...]
    splits_input: bool = False


class _Seen(NamedTuple):
    """A module of an SE network as it was when it was adopted."""

    kind: type[nn.Module]
    children: int | None  # how many; None for fc1 and fc2: a parametrisation comes as a child
    settings: object


class _ChildFirst(property):
    """A method that a child of its name hides, as attributes of an object hide methods.

    People name their layers `attention`. torch.compile, torch.export and others read a child as
    an attribute. A property is what torch.compile can follow. The class's attribute takes calls
    as the method does.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        def child_or_method(module: nn.Module) -> Any:
            child = module._modules.get(method.__name__)
            return method.__get__(module) if child is None else child

        super().__init__(child_or_method)
        self.__wrapped__ = method  # for inspect.signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


_ATTENTION = _ChildFirst(PSAModule.attention)
_FUSED_ATTENTION = _ChildFirst(FusedPSAModule.attention)


class AdoptedPSA(PSAModule):
    """Pyramid Squeeze Attention in plain PyTorch, over the layers of a module of another class.

    The layers stay the same objects under the same names. So do the `state_dict` keys.
    x [N, inplans, H, W] -> [N, S*C, H', W'], as :class:`PSAModule`. :func:`epsa_fused.unfuse`
    builds it.

    Args:
        module: its layers are taken.
        layers: their names. A trial has shown that they compute PSA.
        branch_order: as of :class:`PSAModule`.
    """

    _layers: PSALayers
    _seen: dict[str, _Seen]
    attention: Any = _ATTENTION

    def __init__(self, module: nn.Module, layers: PSALayers, *, branch_order: str) -> None:
        nn.Module.__init__(self)
        networks = [n.fc1 for n in layers.networks] + [n.fc2 for n in layers.networks]
        if layers.networks[0].call != "layers":
            networks = [cast(str, n.network) for n in layers.networks]
        used = {existing(module, name) for name in (*layers.branches, *networks)}
        for name, child in module._modules.items():
            kept = None if child is None else _kept(child, used)
            if kept is not None:
                self._modules[name] = kept
        fc1 = _point(module, layers.networks[0].fc1)
        channels = fc1.in_channels if isinstance(fc1, nn.Conv2d) else fc1.in_features
        for name, value in (("branches", len(layers.branches)), ("split_channel", channels)):
            if name not in self._modules:  # nothing here reads these, and a child goes before
                setattr(self, name, value)
        vars(self).update(branch_order=branch_order, _layers=layers, _seen={})
        for root in networks:
            for name, m in existing(module, root).named_modules(prefix=root):
                self._seen.setdefault(name, _Seen(type(m), len(m._modules), _settings(m)))
        for network in layers.networks:
            for fc in (network.fc1, network.fc2):
                point = _point(module, fc)
                kind = nn.Conv2d if isinstance(point, nn.Conv2d) else nn.Linear
                self._seen[fc] = _Seen(kind, None, _settings(point))
            if network.call == "layers" and network.network is not None:
                holder = existing(self, network.network)
                settings = _settings(holder)
                self._seen[network.network] = _Seen(type(holder), len(holder._modules), settings)

    def extra_repr(self) -> str:
        split = ", splits_input=True" if self._layers.splits_input else ""
        return super().extra_repr() + split

    def _own_attention(self) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
        if "attention" not in vars(self):
            if type(self).attention is _ATTENTION:
                return partial(PSAModule.attention, self)
            if type(self).attention is _FUSED_ATTENTION:
                return partial(FusedPSAModule.attention, cast(FusedPSAModule, self))
        return cast(Callable[..., Any], self.attention)  # the object's, or a subclass's

    def _convs(self) -> list[nn.Module]:
        return [existing(self, name) for name in self._layers.branches]

    def _feats(self, x: Tensor) -> list[Tensor]:
        convs = self._convs()
        if not self._layers.splits_input:
            return [conv(x) for conv in convs]
        parts = x.chunk(len(self._layers.branches), dim=1)
        return [conv(parts[i]) for i, conv in enumerate(convs)]  # torch.fx traces an index

    def _weights(self, feats: Sequence[Tensor]) -> list[Tensor]:
        networks = self._layers.networks
        if len(networks) == 1:
            networks *= len(self._layers.branches)
        return [self._weigh(se, feat) for se, feat in zip(networks, feats, strict=True)]

    def _weigh(self, se: SELayers, feat: Tensor) -> Tensor:
        if se.call == "layers":
            self._refuse_another(se.network)
            hidden = torch.relu(self._call_point(se.fc1, F.adaptive_avg_pool2d(feat, 1)))
            return torch.sigmoid(self._call_point(se.fc2, hidden))
        network = existing(self, cast(str, se.network))
        given = feat if se.call == "whole" else F.adaptive_avg_pool2d(feat, 1)
        weights = cast(Tensor, network(given.flatten(1) if se.call == "vector" else given))
        weights = torch.sigmoid(weights) if se.sigmoid else weights
        return weights.reshape(feat.shape[0], feat.shape[1], 1, 1)

    def _refuse_another(self, network: str | None) -> None:
        """Raise RuntimeError for an SE network that nothing here knows how to call."""
        if network is None:
            return
        why = why_layer_called(network, submodule(self, network), self._seen[network].kind)
        if why is not None:
            raise RuntimeError(
                f"{type(self).__name__}: {why}. The class that this module was fused from called "
                f"{network} in a way that is not known here: change it before fuse(), or change "
                "its layers"
            )

    def _call_point(self, name: str, pooled: Tensor) -> Tensor:
        """A layer of the SE on [N, C, 1, 1], which a Linear takes as [N, C]."""
        layer = existing(self, name)
        if self._seen[name].kind is nn.Conv2d:
            return cast(Tensor, layer(pooled))
        return cast(Tensor, layer(pooled.flatten(1)))[:, :, None, None]


class FusedAdoptedPSA(AdoptedPSA, FusedPSAModule):
    """:class:`AdoptedPSA`, fused as :class:`FusedPSAModule` is. :func:`epsa_fused.fuse` builds it.

    The operator computes branches that are convolutions alone, of the whole input. Others are
    called: with a BatchNorm, say, in training as in evaluation. The attention step is fused in
    any case.
    """

    attention: Any = _FUSED_ATTENTION
    prepack: Any = _ChildFirst(FusedPSAModule.prepack)
    unpack: Any = _ChildFirst(FusedPSAModule.unpack)

    def _overrides_attention(self) -> bool:
        return type(self).attention is not _FUSED_ATTENTION

    def _conv_names(self) -> Sequence[str]:
        return self._layers.branches

    def _has_convs_as_branches(self) -> bool:
        return self._why_branches_called() is None

    def _why_convs_called(self) -> str | None:
        # others are called in any case
        return super()._why_convs_called() if self._has_convs_as_branches() else None

    def _why_not_taken(self) -> str | None:
        return self._why_branches_called() or super()._why_not_taken()

    def _why_branches_called(self) -> str | None:
        """The reason why the branches are more than convolutions of the input, or None."""
        if self._layers.splits_input:
            return "each branch takes its own part of the input"
        for name, branch in zip(self._layers.branches, self._convs(), strict=True):
            if not isinstance(branch, nn.Conv2d):
                return f"{name} is a {type(branch).__name__}, not a convolution alone"
        return None

    def _why_se_called(self) -> str | None:
        for name, seen in self._seen.items():
            layer = submodule(self, name)
            why = why_layer_called(name, layer, seen.kind)
            if why is not None:
                return why
            if seen.children not in (None, len(cast(nn.Module, layer)._modules)):
                return f"{name} has other children than when it was fused"
            if not _has_settings(cast(nn.Module, layer), seen.settings):
                return f"{name} has other settings than when it was fused"
        return None

    def _se_arguments(self) -> SEArguments:
        return read_se(
            [(_point(self, se.fc1), _point(self, se.fc2)) for se in self._layers.networks]
        )


def _settings(layer: nn.Module) -> object:
    """What tells layers of one class apart, without a look at their tensors."""
    if isinstance(layer, nn.Conv2d):
        size = (layer.in_channels, layer.out_channels, layer.kernel_size)
        return (*size, layer.padding, layer.groups, has_bias(layer))
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, has_bias(layer)
    foreign = [c for c in type(layer).__mro__ if not c.__module__.startswith("torch.")]
    if foreign[:-1]:  # the last one is object
        own = [name for name in vars(layer) if name not in STATE]
        shared = [name for c in foreign[:-1] for name, v in vars(c).items() if _is_setting(name, v)]
        return {name: _attribute(layer, name) for name in (*own, *shared)}
    return layer.extra_repr()


def _is_setting(name: str, value: object) -> bool:
    """Whether an attribute of a class may be a setting, which one of its objects may change."""
    return not name.startswith("__") and isinstance(value, bool | int | float | str)


def _attribute(layer: nn.Module, name: str) -> object:
    return _by_value(getattr(layer, name, None), 3)


def _by_value(value: object, depth: int) -> object:
    """Small containers by what they hold, which may change; torch.export replaces them by others.

    Each call pays for it, so a large or a deep one stands for itself.
    """
    kind = type(value)  # isinstance would ask the object: a proxy may fail
    if depth == 0 or not issubclass(kind, list | tuple | dict) or len(value) > 32:  # type: ignore[arg-type]
        return value
    if issubclass(kind, dict):
        return tuple((k, _by_value(v, depth - 1)) for k, v in value.items())  # type: ignore[attr-defined]
    return tuple(_by_value(v, depth - 1) for v in value)  # type: ignore[attr-defined]


def _has_settings(layer: nn.Module, settings: object) -> bool:
    """Whether they are as :func:`_settings` gave them.

    The extra_repr of a foreign class may show anything, such as values of weights.
    """
    if isinstance(settings, dict):
        return all(_equal(_attribute(layer, name), value) for name, value in settings.items())
    return _settings(layer) == settings


def _equal(value: object, other: object) -> bool:
    """Whether two settings are equal; an object may be compared with itself alone."""
    if value is other:
        return True
    if type(value) is tuple and type(other) is tuple:
        return len(value) == len(other) and all(map(_equal, value, other))
    if type(value) is float and value != value:  # NaN, which pickle makes anew
        return type(other) is float and other != other
    return type(value) in (bool, int, float, str) and value == other


def _point(module: nn.Module, name: str) -> Point:
    return cast(Point, existing(module, name))


def _kept(module: nn.Module, used: Collection[nn.Module]) -> nn.Module | None:
    """`module` without the parts that hold nothing used; None if nothing is left.

    A module of which only parts are used is never called again. A plain holder of the parts takes
    its place, so that nobody waits for its hooks.
    """
    if module in used:
        return module
    parts = {
        name: kept
        for name, child in module._modules.items()
        if child is not None and (kept := _kept(child, used)) is not None
    }
    if not parts:
        return None
    if type(module) in (nn.ModuleList, nn.ModuleDict) and parts == module._modules:
        return module
    holder = nn.Module()
    holder._modules.update(parts)
    holder.training = module.training
    return holder
