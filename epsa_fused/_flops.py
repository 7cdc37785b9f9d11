"""Floating-point operations of the operators, for torch.utils.flop_counter.FlopCounterMode.

They count as torch counts: two operations per multiply-add of the convolutions and of the SE's
matrices. Elementwise work (pooling, reweighting) is not counted, as torch counts none of its own.
torch passes shapes in the place of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import _library  # noqa: F401  loads the operators

Shape = Sequence[int]
_Formula = Callable[..., int]


def _formula(operator: Any) -> Callable[[_Formula], _Formula]:
    return cast(Callable[[_Formula], _Formula], register_flop_formula(operator))


def _conv_flops(x: Shape, weight: Shape, out: Shape) -> int:
    return conv_flop_count(list(x), list(weight), list(out))


# ---- attention ----


def _se_flops(samples: int, branches: int, channels: int, fc1: Shape) -> int:
    hidden = fc1[1] if len(fc1) in (3, 5) else fc1[0]
    return 2 * samples * branches * 2 * channels * hidden


@_formula(torch.ops.epsa_fused.psa_attention)
def _(feats: Sequence[Shape], fc1: Shape, *args: Any, **kwargs: Any) -> int:
    samples, channels = feats[0][:2]
    return _se_flops(samples, len(feats), channels, fc1)


@_formula(torch.ops.epsa_fused.psa_attention_backward)
def _(
    grad_out: Shape,
    grad_attention: Shape,
    feats: Sequence[Shape],
    fc1: Shape,
    *args: Any,
    **kwargs: Any,
) -> int:
    samples, channels = feats[0][:2]
    return 2 * _se_flops(samples, len(feats), channels, fc1)  # for inputs and for weights


# ---- convolutions ----


@_formula(torch.ops.epsa_fused.spc_conv)
def _(x: Shape, weights: Sequence[Shape], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sum(_conv_flops(x, w, out) for w, out in zip(weights, out_shape[0], strict=True))


@_formula(torch.ops.epsa_fused.spc_conv_backward)
def _(grads: Sequence[Shape], x: Shape, weights: Sequence[Shape], *args: Any, **kwargs: Any) -> int:
    output_mask = args[4]
    # Each gradient takes as many multiply-adds as the forward pass.
    return sum(
        _conv_flops(x, w, out) * (int(output_mask[0]) + int(wanted))
        for w, out, wanted in zip(weights, grads, output_mask[1:], strict=True)
    )


# ---- module ----


def _module_flops(arguments: Sequence[Any], out: Shape) -> int:
    """FLOPs of psa_forward, from the shapes of its arguments and of its output."""
    x, weights, fc1 = arguments[0], arguments[1], arguments[6]
    samples, channels = x[0], weights[0][0]
    convolutions = sum(_conv_flops(x, w, [samples, channels, *out[2:]]) for w in weights)
    return convolutions + _se_flops(samples, len(weights), channels, fc1)


@_formula(torch.ops.epsa_fused.psa_forward)
def _(*arguments: Any, out_shape: Any, **kwargs: Any) -> int:
    return _module_flops(arguments, out_shape)


@_formula(torch.ops.epsa_fused.psa_save_output)
def _(*arguments: Any, out_shape: Any, **kwargs: Any) -> int:
    return _module_flops(arguments, out_shape[0])


@_formula(torch.ops.epsa_fused.psa_save_output_backward)
def _(grad_out: Shape, *arguments: Any, **kwargs: Any) -> int:
    # The gradients of x and of the weights each take as many multiply-adds as the forward pass.
    return 2 * _module_flops(arguments, grad_out)
