"""Whether a fused call computes what calling the layers would."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard, cast

from torch import nn

# The layers of an SE network, in the order of their calls.
_SE_LAYERS: dict[str, type[nn.Module]] = {
    "avg_pool": nn.AdaptiveAvgPool2d,
    "fc1": nn.Conv2d,
    "relu": nn.ReLU,
    "fc2": nn.Conv2d,
    "sigmoid": nn.Sigmoid,
}


def _why_not_fused(name: str, module: nn.Module | None, expected: type[nn.Module]) -> str | None:
    """The reason why `module` may compute something else than a plain `expected`, or None."""
    if module is None:
        return f"{name} is missing"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"{name} has hooks, which a fused call would leave out"
    if type(module).forward is not expected.forward or "forward" in module.__dict__:
        return (
            f"{name} is a {type(module).__name__} with a forward of its own, "
            f"expected that of {expected.__name__}"
        )
    # Conv2d.forward calls _conv_forward: weight standardisation and other paddings override it.
    if isinstance(module, nn.Conv2d) and (
        type(module)._conv_forward is not nn.Conv2d._conv_forward
        or "_conv_forward" in module.__dict__
    ):
        return f"{name} is a {type(module).__name__} with a _conv_forward of its own"
    return None


def _is_sharded(parameter: object) -> bool:
    # By the class's name: the import of DTensor takes a second.
    return type(parameter).__name__ == "DTensor"


def is_plain_conv(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether the layer is a convolution without bias that its weight and settings describe."""
    if _why_not_fused("conv", conv, nn.Conv2d) is not None:
        return False
    conv = cast(nn.Conv2d, conv)
    return (
        conv.bias is None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(len(set(both)) == 1 for both in (conv.stride, conv.padding, conv.dilation))
        and not _is_sharded(conv.weight)
    )


def why_se_not_fused(
    name: str, se: nn.Module | None, expected: type[nn.Module], layers: Iterable[str] = _SE_LAYERS
) -> str | None:
    """The reason why a fused call may differ from a call of the SE network, or None.

    Args:
        name: of the network in the message.
        se: the network.
        expected: the class whose forward it must have.
        layers: the names of its layers, in the order of their calls.
    """
    why = _why_not_fused(name, se, expected)
    if se is None or why is not None:
        return why
    modules = [se._modules.get(layer) for layer in layers]
    names = [f"{name}.{layer}" for layer in layers]
    for layer, module, kind in zip(names, modules, _SE_LAYERS.values(), strict=True):
        why = _why_not_fused(layer, module, kind)
        if why is not None:
            return why
    pool = cast(nn.AdaptiveAvgPool2d, modules[0])
    if pool.output_size not in (1, (1, 1)):
        return f"{names[0]} has output_size {pool.output_size}, expected 1"
    for i in (1, 3):
        layer, fc = names[i], cast(nn.Conv2d, modules[i])
        if fc.padding != (0, 0) or fc.groups != 1:
            return (
                f"{layer} has padding {fc.padding} and groups {fc.groups}, "
                "expected a plain 1x1 convolution"
            )
        for parameter in ("weight", "bias"):
            if _is_sharded(getattr(fc, parameter)):
                return f"{layer}.{parameter} is a DTensor (a shard), expected a whole tensor"
    return None
