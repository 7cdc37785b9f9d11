"""Whether a layer computes, when it is called, what its class and parameters say."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# The layers that the fused operator computes in one go.
_SE_LAYERS = {
    "avg_pool": nn.AdaptiveAvgPool2d,
    "fc1": nn.Conv2d,
    "relu": nn.ReLU,
    "fc2": nn.Conv2d,
    "sigmoid": nn.Sigmoid,
}


def _why_not_fused(name: str, module: nn.Module | None, expected: type[nn.Module]) -> str | None:
    """Why calling `module` may do something else than the fused operator does in its place."""
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
    # what Conv2d.forward calls: weight standardisation and other paddings are put there
    if isinstance(module, nn.Conv2d) and (
        type(module)._conv_forward is not nn.Conv2d._conv_forward
        or "_conv_forward" in module.__dict__
    ):
        return f"{name} is a {type(module).__name__} with a _conv_forward of its own"
    return None


def is_plain_conv(conv: nn.Module) -> bool:
    """Whether calling the layer is the convolution that its weight and settings say."""
    return (
        _why_not_fused("conv", conv, nn.Conv2d) is None
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(len(set(both)) == 1 for both in (conv.stride, conv.padding, conv.dilation))
        and type(conv.weight).__name__ != "DTensor"
    )


def why_se_not_fused(
    name: str, se: nn.Module | None, expected: type[nn.Module], layers: Iterable[str] = _SE_LAYERS
) -> str | None:
    """Why calling the SE network `se`, named `name`, may do something else than the fused operator
    does with its weights; `layers` are what it calls its layers, in the order of _SE_LAYERS."""
    why = _why_not_fused(name, se, expected)
    names = [f"{name}.{layer}" for layer in layers]
    if why is None:
        modules = [se._modules.get(layer) for layer in layers]
        for layer, module, kind in zip(names, modules, _SE_LAYERS.values(), strict=True):
            why = why or _why_not_fused(layer, module, kind)
    if why is not None:
        return why
    pool, fc1, _, fc2, _ = modules
    if pool.output_size not in (1, (1, 1)):
        return f"{names[0]} has output_size {pool.output_size}, expected 1"
    for layer, module in ((names[1], fc1), (names[3], fc2)):
        if module.padding != (0, 0) or module.groups != 1:
            return (
                f"{layer} has padding {module.padding} and groups {module.groups}, "
                "expected a plain 1x1 convolution"
            )
        for parameter in ("weight", "bias"):
            # by its name: importing the class DTensor takes a second
            if type(getattr(module, parameter)).__name__ == "DTensor":
                return f"{layer}.{parameter} is a DTensor (a shard), expected a whole tensor"
    return None
