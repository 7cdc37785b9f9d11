"""PSA modules that the tests build, and the sizes of their gradients."""

from __future__ import annotations

import torch
from support.cases import WEIGHT_NAMES, Inputs
from support.maths import gradients
from torch import Tensor, nn


def convolutions_of(module: nn.Module) -> list[nn.Conv2d]:
    return [layer for name, layer in module.named_children() if name.startswith("conv_")]


def gradient_sizes(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """What each parameter's gradient would be if nothing in it cancelled (maths.py)."""
    convs = convolutions_of(module)
    fc1, fc2 = module.se.fc1, module.se.fc2
    inputs = Inputs([c(x) for c in convs], [fc1.weight, fc1.bias, fc2.weight, fc2.bias])
    result = gradients(inputs.double(), grad, None, absolute=True)
    sizes = {f"se.{name.replace('_', '.')}": result[f"grad of {name}"] for name in WEIGHT_NAMES}
    for i, conv in enumerate(convs):
        df = result[f"grad of feats[{i}]"]
        sizes[f"conv_{i + 1}.weight"] = torch.nn.grad.conv2d_weight(
            x.abs(), conv.weight.shape, df, conv.stride, conv.padding, groups=conv.groups
        )
    return sizes
