"""The public functions: PSA's attention step and its convolutions, one fused operator each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._checks import check_flag, check_int, check_ints, check_tensor, given
from ._library import MAX_BRANCHES, MIN_BRANCHES
from ._winograd import winograd_allowed
from .reference import is_reversed, psa_attention_reference

# The SE's arguments of psa_attention.
_WEIGHTS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def in_transform() -> bool:
    """Whether a `torch.func` transform is in force or forward-mode tangents may be.

    The fused operators have neither batching rules nor tangents.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@overload
def psa_attention(
    feats: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    branch_order: str = ...,
    return_attention: Literal[False] = ...,
) -> Tensor: ...
@overload
def psa_attention(
    feats: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    branch_order: str = ...,
    return_attention: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def psa_attention(
    feats: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    branch_order: str = ...,
    return_attention: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def psa_attention(
    feats: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    branch_order: str = "reversed",
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention step of PSA as one fused operator (EPSANet, arXiv 2105.14447, eq. 4 to 8).

    Each branch's map is pooled, an SE MLP weighs its channels, a softmax across the branches
    recalibrates the weights, and each map is multiplied by its own weights::

        p = mean(F_s over H, W)                                   [N, S, C]
        z = sigmoid(W2 relu(W1 p + b1) + b2)                      [N, S, C]
        a = softmax(z over S)                                     [N, S, C]
        out[:, slot(s)*C : (slot(s)+1)*C] = F_s * a_s             [N, S*C, H, W]

    Args:
        feats: the maps of S branches, 2 to 8 tensors [N, C, H, W] of one shape, device and dtype
            (float32, float64, bfloat16, float16). Contiguous and channels_last maps are read in
            place, also as chunks of one tensor. Other strides cost one copy.
        fc1_weight: [r, C] with r hidden units, or [S, r, C] for SE weights per branch. Weights of
            1x1 convolutions, with two trailing dimensions of 1, are taken unchanged.
        fc1_bias: [r] or [S, r], or None.
        fc2_weight: [C, r] or [S, C, r]; trailing dimensions of 1 as above.
        fc2_bias: [C] or [S, C], or None.
        branch_order: "reversed" puts branch s into slot S-1-s, as the published code does and
            weights trained with it need. "forward" puts it into slot s, as in equation 8.
        return_attention: whether to return the attention a too.

    Returns:
        out [N, S*C, H, W], in the dtype of feats and in the memory layout of most of them.
        With `return_attention` also a [N, S, C], indexed by branch (not by slot). Its dtype is
        float64 for float64 maps, else float32. Both are differentiable.

    The four SE parameters have one dtype: that of feats, or float32 beside half-precision maps.
    Sums, SE and softmax are computed in float32 (float64 for float64), and out is rounded once.
    Autocast casts nothing here. (Eager PyTorch under CUDA autocast would return float32, because
    its softmax does.) Results are bitwise equal from run to run and for any number of threads.

    Under `torch.func` transforms and in forward-mode differentiation the result is that of
    :func:`epsa_fused.psa_attention_reference`. It can be differentiated and batched in every way.

    Raises:
        ValueError: shapes or counts do not fit, or `branch_order` is unknown.
        TypeError: dtypes are not supported or do not fit.
        RuntimeError: tensors are on different devices.
    """
    if isinstance(feats, Tensor):
        raise TypeError(
            "psa_attention: feats is a Tensor, expected a sequence of "
            f"{MIN_BRANCHES} to {MAX_BRANCHES} maps (try feats.chunk(branches, dim=1))"
        )
    if return_attention is not True and return_attention is not False:
        check_flag("return_attention", return_attention)
    try:
        if in_transform():
            out, attention = psa_attention_reference(
                list(feats),
                fc1_weight,
                fc1_bias,
                fc2_weight,
                fc2_bias,
                branch_order=branch_order,
                return_attention=True,
            )
            accumulated = torch.float64 if out.dtype == torch.float64 else torch.float32
            attention = attention.to(accumulated)
        else:
            out, _, attention = torch.ops.epsa_fused.psa_attention.default(
                list(feats), fc1_weight, fc1_bias, fc2_weight, fc2_bias, is_reversed(branch_order)
            )
    except (AttributeError, RuntimeError, TypeError):  # the reference raises the first
        _check_kinds(feats, (fc1_weight, fc1_bias, fc2_weight, fc2_bias))
        raise
    return (out, attention) if return_attention else out


def _check_kinds(feats: object, weights: tuple[object, ...]) -> None:
    """Raise TypeError where an argument of psa_attention is of a wrong kind.

    Only after an error: the checks would cost a tenth of a small call.
    """
    if not isinstance(feats, Sequence):
        raise TypeError(f"psa_attention: feats: expected a sequence of maps, got {given(feats)}")
    for i, feat in enumerate(feats):
        check_tensor(f"psa_attention: feats[{i}]", feat)
    for name, value in zip(_WEIGHTS, weights, strict=True):
        if value is not None:  # the operator knows which may be None
            check_tensor(f"psa_attention: {name}", value)


def spc_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    *,
    stride: int = 1,
    padding: Sequence[int],
    dilation: Sequence[int] | None = None,
    winograd: bool | None = None,
    bias: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The grouped convolutions of PSA's squeeze-and-concat step (arXiv 2105.14447, eq. 1 to 3).

    Branch s is ``conv2d(x, weights[s], b, stride, padding[s], dilation[s], groups[s])``, where b is
    its part of the bias. One call computes all branches from one packed copy of x, and the means of
    their maps. It runs on the CPU and on CUDA devices. There a kernel takes grouped convolutions of
    16-bit floats (docs/cuda.md), and torch's convolution the other branches.

    Args:
        x: [N, in_channels, H, W], float32, float64, bfloat16 or float16. Contiguous and
            channels_last tensors, and slices of them, are read in place.
        weights: 1 to 8 tensors [C, in_channels / groups[s], kernel_h, kernel_w] of x's dtype, all
            with the same C.
        groups, padding, dilation: one int per branch; the default dilation is 1 everywhere.
        stride: of every branch.
        winograd: whether Winograd's method may be used, also for the gradient of x. None: as
            :func:`epsa_fused.set_winograd` says.
        bias: [S*C] in the order of the branches, in x's dtype, or None.

    Returns:
        feats: the branches' maps [N, C, H', W'], in x's dtype and memory layout.
        pooled: [N, S, C], the means of the maps over H' and W', for
            ``torch.ops.epsa_fused.psa_attention(..., pooled=)``. Its dtype is float64 for float64,
            else float32; the CPU averages half-precision maps before rounding. Not
            differentiable.

    Sums are accumulated in float32 (float64 for float64).

    3x3 kernels of stride 1 use Winograd's F(2 x 2, 3 x 3) (arXiv 1509.09308) where that is faster.
    Its errors are as small as those of direct convolution relative to the largest inputs near an
    output, but not relative to the output's own products. Next to a pixel of 1e6 a pixel of 1 is
    known to about 0.1. Infinities in x or a weight, or sums of four pixels or nine weights beyond
    the largest float, may give NaN.

    torch's convolution computes branches without a kernel of their own, inside the same call.
    ``epsa_fused._C.conv_plan`` tells which ones on the CPU.

    Raises:
        ValueError: shapes, counts or settings do not fit, or an output would be empty.
        TypeError: dtypes are not supported or do not fit.
        RuntimeError: tensors are on different devices.
    """
    check_tensor("spc_conv: x", x)
    if not isinstance(weights, Sequence):
        raise TypeError(f"spc_conv: weights: expected a sequence of Tensors, got {given(weights)}")
    for i, weight in enumerate(weights):
        check_tensor(f"spc_conv: weights[{i}]", weight)
    check_int("spc_conv: stride", stride)
    check_ints("spc_conv: groups", groups)
    check_ints("spc_conv: padding", padding)
    if dilation is not None:
        check_ints("spc_conv: dilation", dilation)
    if bias is not None:
        check_tensor("spc_conv: bias", bias)
    ones = [1] * len(weights) if dilation is None else list(dilation)
    result = torch.ops.epsa_fused.spc_conv.default(
        x,
        list(weights),
        list(groups),
        stride,
        list(padding),
        ones,
        winograd_allowed(winograd),
        bias,
    )
    return cast(tuple[list[Tensor], Tensor], result)
