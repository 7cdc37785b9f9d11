"""The convolutions of a PSA module as one operator: the public function, and what torch.compile
needs to know. The kernels and their autograd are C++ (csrc/autograd/conv.cpp, csrc/cpu/conv_*)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from .ops import _is_native, _keep_whole, _se_flops


def spc_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    *,
    stride: int = 1,
    padding: Sequence[int],
    dilation: Sequence[int] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The grouped convolutions of PSA's squeeze-and-concat step (arXiv 2105.14447, eq. 1 to 3).

    Branch s is ``conv2d(x, weights[s], None, stride, padding[s], dilation[s], groups[s])``. All
    branches are computed in one call from one packed copy of x, and their means over the pixels
    come out with them. CPU only; elsewhere call torch's own convolutions.

    Args:
        x: [N, in_channels, H, W], float32, float64, bfloat16 or float16. Contiguous and
            channels_last tensors, and slices of them, are read in place.
        weights: 1 to 8 tensors [C, in_channels / groups[s], kernel_h, kernel_w] of x's dtype, all
            with the same C.
        groups, padding, dilation: one int per branch (dilation: 1 everywhere by default).
        stride: of every branch.

    Returns:
        feats: the branches' maps [N, C, H', W'], in x's dtype and memory layout.
        pooled: [N, S, C], the means of the maps over H' and W', for
            ``torch.ops.epsa_fused.psa_attention(..., pooled=)``. float32 (float64 for float64);
            for half-precision maps the means of the unrounded values. Not differentiable.

    Sums are accumulated in float32 (float64 for float64). 3x3 kernels of stride 1 are computed by
    Winograd's F(2 x 2, 3 x 3) (arXiv 1509.09308) where that is faster. Its errors are as small as
    those of direct convolution beside the largest values that an output is near to, not beside
    the products that make it up: next to a pixel of 1e6 a pixel of 1 is known to 0.1 or so, even
    to a kernel of one 1. Where infinities in x or a weight reach, or sums of four pixels or nine
    weights pass the largest float, there may be a NaN. Branches for which there is no kernel are
    computed by torch's convolution inside the call.
    ``epsa_fused._C.conv_plan`` tells which is which.

    Raises:
        ValueError: shapes, counts or settings that do not fit, or an output that would be empty.
        TypeError: dtypes that are not supported or do not fit.
        RuntimeError: tensors on different devices.
    """
    ones = [1] * len(weights) if dilation is None else list(dilation)
    return torch.ops.epsa_fused.spc_conv.default(
        x, list(weights), list(groups), stride, list(padding), ones
    )


def _out_size(size, kernel, stride: int, padding: int, dilation: int):
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _layout(x: Tensor) -> torch.memory_format:
    """epsa::spc_layout of csrc/ops/conv_checks.cpp."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if _is_native(x, memory_format):
            return memory_format
    return torch._prims_common.suggest_memory_format(x)


def _maps_shape(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> tuple:
    return (
        x.shape[0],
        weight.shape[0],
        _out_size(x.shape[2], weight.shape[2], stride, padding, dilation),
        _out_size(x.shape[3], weight.shape[3], stride, padding, dilation),
    )


def _check_fake(op: str, x: Tensor, weights: Sequence[Tensor], groups, padding, dilation) -> None:
    """What the fake kernels rely on. The real kernels check all: csrc/ops/conv_checks.cpp."""
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected 4 dimensions [N, C, H, W]")
    for name, given in (("groups", groups), ("padding", padding), ("dilation", dilation)):
        if len(given) != len(weights):
            raise ValueError(
                f"{op}: {name} has {len(given)} entries, expected {len(weights)}, "
                "one for each of the weights"
            )
    for s, w in enumerate(weights):
        if w.dim() != 4:
            raise ValueError(
                f"{op}: weights[{s}] has shape {list(w.shape)}, expected 4 dimensions "
                "[C, in_channels / groups, kernel_h, kernel_w]"
            )
        if w.device != x.device:
            raise RuntimeError(
                f"{op}: weights[{s}] is on {w.device}, expected {x.device}, the device of x"
            )
        if w.dtype != x.dtype:
            raise TypeError(
                f"{op}: weights[{s}] has dtype {w.dtype}, expected {x.dtype}, the dtype of x"
            )
        if x.shape[1] != w.shape[1] * groups[s]:
            raise ValueError(
                f"{op}: weights[{s}] has shape {list(w.shape)}, expected {x.shape[1]} / "
                f"{groups[s]} channels in its second dimension"
            )


@torch.library.register_fake("epsa_fused::spc_conv")
def fake_spc_conv(x, weights, groups, stride, padding, dilation):
    _keep_whole(torch.ops.epsa_fused.spc_conv.default)
    _check_fake("spc_conv", x, weights, groups, padding, dilation)
    layout = _layout(x)
    feats = [
        torch.empty(
            _maps_shape(x, w, stride, p, d), dtype=x.dtype, device=x.device, memory_format=layout
        )
        for w, p, d in zip(weights, padding, dilation, strict=True)
    ]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    pooled = x.new_empty((x.shape[0], len(weights), weights[0].shape[0]), dtype=acc)
    return feats, pooled


def _fake_gradients(x: Tensor, weights: Sequence[Tensor], output_mask) -> tuple:
    """Of x and of the weights; an empty tensor where none is wanted."""
    grad_x = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))
        if output_mask[0]
        else x.new_empty(0)
    )
    grad_weights = [
        torch.empty_like(w) if wanted else w.new_empty(0)
        for w, wanted in zip(weights, output_mask[1 : 1 + len(weights)], strict=True)
    ]
    return grad_x, grad_weights


@torch.library.register_fake("epsa_fused::spc_conv_backward")
def _(grad_feats, x, weights, groups, stride, padding, dilation, output_mask):
    _check_fake("spc_conv_backward", x, weights, groups, padding, dilation)
    for s, g in enumerate(grad_feats):
        if g.device != x.device:
            raise RuntimeError(
                f"spc_conv_backward: grad_feats[{s}] is on {g.device}, expected {x.device}, "
                "the device of x"
            )
    return _fake_gradients(x, weights, output_mask)


def _fake_output(op: str, x, weights, groups, stride, padding, dilation) -> Tensor:
    _check_fake(op, x, weights, groups, padding, dilation)
    n, c, h, w = _maps_shape(x, weights[0], stride, padding[0], dilation[0])
    return torch.empty(
        (n, len(weights) * c, h, w), dtype=x.dtype, device=x.device, memory_format=_layout(x)
    )


@torch.library.register_fake("epsa_fused::psa_forward")
def fake_psa_forward(
    x, weights, groups, stride, padding, dilation, fc1_w, fc1_b, fc2_w, fc2_b, reversed, packed=None
):
    _keep_whole(torch.ops.epsa_fused.psa_forward.default)
    return _fake_output("psa_forward", x, weights, groups, stride, padding, dilation)


@torch.library.register_fake("epsa_fused::psa_save_output")
def fake_psa_save_output(
    x, weights, groups, stride, padding, dilation, fc1_w, fc1_b, fc2_w, fc2_b, reversed
):
    _keep_whole(torch.ops.epsa_fused.psa_save_output.default)
    out = _fake_output("psa_save_output", x, weights, groups, stride, padding, dilation)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    vector = (x.shape[0], len(weights), weights[0].shape[0])
    return out, x.new_empty(vector, dtype=acc), x.new_empty(vector, dtype=acc)


@torch.library.register_fake("epsa_fused::psa_save_output_backward")
def _(
    grad_out,
    x,
    weights,
    groups,
    stride,
    padding,
    dilation,
    fc1_w,
    fc1_b,
    fc2_w,
    fc2_b,
    out,
    pooled,
    attention,
    reversed,
    output_mask,
):
    _check_fake("psa_save_output_backward", x, weights, groups, padding, dilation)
    grad_x, grad_weights = _fake_gradients(x, weights, output_mask)
    grad_se = [
        w.new_empty(w.shape) if wanted and w is not None else fc1_w.new_empty(0)
        for w, wanted in zip(
            (fc1_w, fc1_b, fc2_w, fc2_b), output_mask[len(weights) + 1 :], strict=True
        )
    ]
    return grad_x, grad_weights, *grad_se


# ---- floating-point operations, for torch.utils.flop_counter.FlopCounterMode ----


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
