"""Whether a fused call computes what calling the layers would.

A layer that is read instead of called must mean its weights and settings and nothing else. The
functions here never read a weight through its layer: a parametrisation acts at each such read.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import cast

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..reference import SEWeight

# What the operators take as it is. torch.compile and torch.export trace with the last two.
_PLAIN_TENSORS = frozenset((Tensor, nn.Parameter, FakeTensor, FunctionalTensor))

# The layers of an SE network, in the order of their calls.
_SE_LAYERS: dict[str, type[nn.Module]] = {
    "avg_pool": nn.AdaptiveAvgPool2d,
    "fc1": nn.Conv2d,
    "relu": nn.ReLU,
    "fc2": nn.Conv2d,
    "sigmoid": nn.Sigmoid,
}

# The forwards that the operators stand for. Kept here, as a library may replace those of torch.
_KINDS: tuple[type[nn.Module], ...] = (*_SE_LAYERS.values(), nn.Sequential, SEWeight)
_FORWARDS = {kind: kind.forward for kind in _KINDS}
_CONV_FORWARD = nn.Conv2d._conv_forward


def why_layer_called(name: str, layer: nn.Module | None, expected: type[nn.Module]) -> str | None:
    """The reason why a call of `layer` may mean more than its weights and settings, or None.

    Args:
        name: of the layer in the reason.
        layer: the layer; None where it is missing.
        expected: the class whose forward it must have.
    """
    if layer is None:
        return f"{name} is missing"
    if (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    ):
        return f"{name} has hooks"
    kind = type(layer)
    # The class of a scripted layer raises AttributeError for its forward.
    if getattr(kind, "forward", None) is not _FORWARDS.get(expected, expected.forward) or (
        kind is not expected and _has_own_call(kind)
    ):
        return (
            f"{name} is a {kind.__name__} with a forward of its own, "
            f"expected that of {expected.__name__}"
        )
    if "forward" in layer.__dict__ or "_call_impl" in layer.__dict__:
        return f"{name} is a {kind.__name__} with a forward of its own, set on this object"
    if expected is nn.Conv2d:
        return _why_conv_called(name, cast(nn.Conv2d, layer))
    return None


def _has_own_call(kind: type[nn.Module]) -> bool:
    module = nn.Module
    return kind.__call__ is not module.__call__ or kind._call_impl is not module._call_impl


def _why_conv_called(name: str, conv: nn.Conv2d) -> str | None:
    # Conv2d.forward calls _conv_forward: weight standardisation and other paddings override it.
    if type(conv)._conv_forward is not _CONV_FORWARD or "_conv_forward" in conv.__dict__:
        return f"{name} is a {type(conv).__name__} with a _conv_forward of its own"
    for place in (conv._parameters, conv._buffers, conv.__dict__):
        for tensor in ("weight", "bias"):
            if not is_plain(place.get(tensor)):
                return why_not_plain(f"{name}.{tensor}", place[tensor])
    if conv._modules:  # a parametrised layer keeps its parameters in a child
        for tensor, value in chain(conv.named_parameters(), conv.named_buffers()):
            if not is_plain(value):
                return why_not_plain(f"{name}.{tensor}", value)
    return None


def is_plain(value: object) -> bool:
    """Whether the tensor, or None, means to the operators what it means to layers.

    A subclass of Tensor sees each function that takes it: a shard, a quantised weight and others
    may give a meaning of their own to a convolution.
    """
    return value is None or type(value) in _PLAIN_TENSORS


def why_not_plain(name: str, value: object) -> str | None:
    """The reason why a tensor of this name is not plain, or None."""
    return (
        None if is_plain(value) else f"{name} is a {type(value).__name__}, expected a plain tensor"
    )


def has_bias(conv: nn.Conv2d) -> bool:
    """Whether the convolution has a bias; one that is not a parameter counts too."""
    parameters = conv._parameters
    return "bias" not in parameters or parameters["bias"] is not None


def why_conv_not_taken(name: str, conv: nn.Conv2d) -> str | None:
    """The reason why the CPU's operator cannot take the convolution's settings, or None."""
    if conv.padding_mode != "zeros":
        return f"{name} has padding_mode {conv.padding_mode!r}"
    if isinstance(conv.padding, str):
        return f"{name} has padding {conv.padding!r}"
    for setting in ("stride", "padding", "dilation"):
        height, width = getattr(conv, setting)
        if height != width:
            return f"{name} has {setting} {(height, width)}"
    return None


def why_se_called(
    name: str, se: nn.Module | None, expected: type[nn.Module], layers: Iterable[str] = _SE_LAYERS
) -> str | None:
    """The reason why a fused call may differ from a call of the SE network, or None.

    Args:
        name: of the network in the reason.
        se: the network.
        expected: the class whose forward it must have.
        layers: the names of its layers, in the order of their calls.
    """
    why = why_layer_called(name, se, expected)
    if se is None or why is not None:
        return why
    modules = [se._modules.get(layer) for layer in layers]
    names = [f"{name}.{layer}" for layer in layers]
    for layer, module, kind in zip(names, modules, _SE_LAYERS.values(), strict=True):
        why = why_layer_called(layer, module, kind)
        if why is not None:
            return why
    pool = cast(nn.AdaptiveAvgPool2d, modules[0])
    if pool.output_size not in (1, (1, 1)):
        return f"{names[0]} has output_size {pool.output_size}, expected 1"
    for i in (1, 3):
        fc = cast(nn.Conv2d, modules[i])
        if fc.padding != (0, 0) or fc.groups != 1:
            return (
                f"{names[i]} has padding {fc.padding} and groups {fc.groups}, "
                "expected a plain 1x1 convolution"
            )
    return None
