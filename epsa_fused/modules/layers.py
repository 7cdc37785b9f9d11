"""Whether a fused call computes what calling the layers would.

A layer that is read instead of called must mean its weights and settings and nothing else. The
functions here never read a weight through its layer: a parametrisation acts at each such read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import nn

# The layers of an SE network, in the order of their calls.
_SE_LAYERS: dict[str, type[nn.Module]] = {
    "avg_pool": nn.AdaptiveAvgPool2d,
    "fc1": nn.Conv2d,
    "relu": nn.ReLU,
    "fc2": nn.Conv2d,
    "sigmoid": nn.Sigmoid,
}


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
    if kind is not expected and (
        kind.forward is not expected.forward or kind.__call__ is not nn.Module.__call__
    ):
        return (
            f"{name} is a {kind.__name__} with a forward of its own, "
            f"expected that of {expected.__name__}"
        )
    if "forward" in layer.__dict__:
        return f"{name} is a {kind.__name__} with a forward of its own, set on this object"
    if expected is nn.Conv2d:
        return _why_conv_called(name, cast(nn.Conv2d, layer))
    return None


def _why_conv_called(name: str, conv: nn.Conv2d) -> str | None:
    # Conv2d.forward calls _conv_forward: weight standardisation and other paddings override it.
    if type(conv)._conv_forward is not nn.Conv2d._conv_forward or "_conv_forward" in conv.__dict__:
        return f"{name} is a {type(conv).__name__} with a _conv_forward of its own"
    # A parametrised layer keeps its parameters in a child.
    named = conv.named_parameters() if conv._modules else conv._parameters.items()
    for parameter, value in named:
        # By the class's name: the import of DTensor takes a second.
        if type(value).__name__ == "DTensor":
            return f"{name}.{parameter} is a DTensor (a shard), expected a whole tensor"
    return None


def has_bias(conv: nn.Conv2d) -> bool:
    """Whether the convolution has a bias; one that is not a parameter counts too."""
    parameters = conv._parameters
    return "bias" not in parameters or parameters["bias"] is not None


def why_conv_not_taken(name: str, conv: nn.Conv2d) -> str | None:
    """The reason why the CPU's operator cannot take the convolution's settings, or None."""
    if has_bias(conv):
        return f"{name} has a bias"
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
