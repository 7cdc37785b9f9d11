"""Floating-point operations of the operators, for torch.utils.flop_counter.FlopCounterMode."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import _library  # noqa: F401  loads the operators

# ---- floating-point operations, for torch.utils.flop_counter.FlopCounterMode ----
# As torch counts: multiply-adds of the SE's matrices, two operations each. The elementwise
# work (pooling, reweighting) is not counted, as torch counts none of its own.


def _se_flops(feats_shape, fc1_shape) -> int:
    n, c = feats_shape[0][:2]
    hidden = fc1_shape[1] if len(fc1_shape) in (3, 5) else fc1_shape[0]
    return 2 * n * len(feats_shape) * 2 * c * hidden


@register_flop_formula(torch.ops.epsa_fused.psa_attention)
def _(feats_shape, fc1_shape, *args, **kwargs) -> int:
    return _se_flops(feats_shape, fc1_shape)


@register_flop_formula(torch.ops.epsa_fused.psa_attention_backward)
def _(grad_out_shape, grad_attention_shape, feats_shape, fc1_shape, *args, **kwargs) -> int:
    return 2 * _se_flops(feats_shape, fc1_shape)  # gradients of inputs and of weights


@register_flop_formula(torch.ops.epsa_fused.spc_conv)
def _(x_shape, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    return sum(
        conv_flop_count(x_shape, w, out) for w, out in zip(weight_shapes, out_shape[0], strict=True)
    )


@register_flop_formula(torch.ops.epsa_fused.spc_conv_backward)
def _(
    grad_shapes, x_shape, weight_shapes, groups, stride, padding, dilation, output_mask, **kwargs
) -> int:
    # each gradient takes as many multiply-adds as the forward pass
    return sum(
        conv_flop_count(x_shape, w, out) * (int(output_mask[0]) + int(wanted))
        for w, out, wanted in zip(weight_shapes, grad_shapes, output_mask[1:], strict=True)
    )


def _module_flops(x_shape, weight_shapes, out_shape, fc1_shape) -> int:
    n, branches, channels = x_shape[0], len(weight_shapes), weight_shapes[0][0]
    convolutions = sum(
        conv_flop_count(x_shape, w, [n, channels, *out_shape[2:]]) for w in weight_shapes
    )
    return convolutions + _se_flops([[n, channels]] * branches, fc1_shape)


@register_flop_formula(torch.ops.epsa_fused.psa_forward)
def _(x_shape, weight_shapes, groups, stride, padding, dilation, fc1_shape, *args, **kwargs) -> int:
    return _module_flops(x_shape, weight_shapes, kwargs["out_shape"], fc1_shape)


@register_flop_formula(torch.ops.epsa_fused.psa_save_output)
def _(x_shape, weight_shapes, groups, stride, padding, dilation, fc1_shape, *args, **kwargs) -> int:
    return _module_flops(x_shape, weight_shapes, kwargs["out_shape"][0], fc1_shape)


@register_flop_formula(torch.ops.epsa_fused.psa_save_output_backward)
def _(
    grad_shape,
    x_shape,
    weight_shapes,
    groups,
    stride,
    padding,
    dilation,
    fc1_shape,
    *args,
    out_shape=None,
    **kwargs,
) -> int:
    # as many multiply-adds as the forward pass for each gradient: x's, the weights'
    return 2 * _module_flops(x_shape, weight_shapes, grad_shape, fc1_shape)
