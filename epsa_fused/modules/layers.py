"""Whether a fused call computes what calling the layers would.

A layer that is read instead of called must mean its weights and settings and nothing else. The
functions here never read a weight through its layer: a parametrisation acts at each such read.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .._arguments import SEArguments
from ..reference import SEWeight

# A layer that maps each pixel's channels by a matrix.
Point: TypeAlias = nn.Conv2d | nn.Linear

# Every module has these attributes. Others are settings of its class.
STATE = vars(nn.Module()).keys()

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
_KINDS: tuple[type[nn.Module], ...] = (*_SE_LAYERS.values(), nn.Linear, nn.Sequential, SEWeight)
_FORWARDS = {kind: kind.forward for kind in _KINDS}
_CONV_FORWARD = nn.Conv2d._conv_forward


def submodule(module: nn.Module, name: str) -> nn.Module | None:
    """The module of a dotted name, or None.

    Unlike `get_submodule` it reads no attribute, so a child may have the name of a method.
    """
    if "." not in name:
        return module._modules.get(name)
    found: nn.Module | None = module
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def existing(module: nn.Module, name: str) -> nn.Module:
    """The module of a dotted name that is known to be there."""
    found = submodule(module, name)
    if found is None:
        raise AttributeError(f"{type(module).__name__} has no module {name}")
    return found


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
    if expected is nn.Conv2d and (
        # Conv2d.forward calls it: weight standardisation and other paddings override it.
        cast(type[nn.Conv2d], kind)._conv_forward is not _CONV_FORWARD
        or "_conv_forward" in layer.__dict__
    ):
        return f"{name} is a {kind.__name__} with a _conv_forward of its own"
    if expected in (nn.Conv2d, nn.Linear):
        return _why_weights_not_plain(name, layer)
    return None


def _has_own_call(kind: type[nn.Module]) -> bool:
    module = nn.Module
    return kind.__call__ is not module.__call__ or kind._call_impl is not module._call_impl


def _why_weights_not_plain(name: str, layer: nn.Module) -> str | None:
    for place in (layer._parameters, layer._buffers, layer.__dict__):
        for tensor in ("weight", "bias"):
            if not is_plain(place.get(tensor)):
                return why_not_plain(f"{name}.{tensor}", place[tensor])
    if layer._modules:  # a parametrised layer keeps its parameters in a child
        for tensor, value in chain(layer.named_parameters(), layer.named_buffers()):
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


def has_bias(conv: Point) -> bool:
    """Whether the layer has a bias; one that is not a parameter counts too."""
    parameters = conv._parameters
    return "bias" not in parameters or parameters["bias"] is not None


def _why_bias_not_taken(name: str, bias: Tensor, weight: Tensor | None) -> str | None:
    """Joined to those of other branches, a bias of another length would move them in silence."""
    if weight is None or (bias.dtype == weight.dtype and bias.shape == weight.shape[:1]):
        return None
    expected = f"{weight.dtype} {list(weight.shape[:1])}"
    return f"{name}.bias is {bias.dtype} {list(bias.shape)}, expected {expected}"


def why_conv_not_taken(name: str, conv: nn.Conv2d) -> str | None:
    """The reason why the CPU's operator cannot take the convolution's settings, or None."""
    bias = conv._parameters.get("bias")
    why = None if bias is None else _why_bias_not_taken(name, bias, conv._parameters.get("weight"))
    if why is not None:
        return why
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


def read_se(networks: Iterable[tuple[Point, Point]]) -> SEArguments:
    """The weights of SE networks (fc1, fc2), as psa_attention takes them.

    Those of one network are shared by all branches. Those of several are stacked, [S, ...].
    """
    # In the order of the layers' calls, for parametrisations that draw random numbers.
    reads = [
        (fc1.weight.flatten(1), fc1.bias, fc2.weight.flatten(1), fc2.bias) for fc1, fc2 in networks
    ]
    if len(reads) == 1:
        return reads[0]
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = zip(*reads, strict=True)
    return (
        torch.stack(fc1_weight),
        None if fc1_bias[0] is None else torch.stack(fc1_bias),
        torch.stack(fc2_weight),
        None if fc2_bias[0] is None else torch.stack(fc2_bias),
    )
