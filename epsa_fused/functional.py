"""The public functions: PSA's attention step and its convolutions, each one fused operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library  # noqa: F401  loads the operators
from .reference import MAX_BRANCHES, MIN_BRANCHES, is_reversed


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

    Each branch's maps are pooled, an SE MLP weighs its channels, a softmax across the branches
    recalibrates the weights, and each map is multiplied by its own::

        p = mean(F_s over H, W)                                   [N, S, C]
        z = sigmoid(W2 relu(W1 p + b1) + b2)                      [N, S, C]
        a = softmax(z over S)                                     [N, S, C]
        out[:, slot(s)*C : (slot(s)+1)*C] = F_s * a_s             [N, S*C, H, W]

    Args:
        feats: the S branches' maps, 2 to 8 tensors [N, C, H, W] of one shape, device and dtype
            (float32, float64, bfloat16, float16). Contiguous and channels_last maps are read in
            place, whatever their batch stride (contiguous) or pixel stride (channels_last), so
            chunks of one tensor are not copied; any other strides cost one copy.
        fc1_weight: [r, C] with r hidden units, or [S, r, C] for SE weights of each branch's own.
            1x1 convolution weights (two trailing dimensions of 1) are taken as they are.
        fc1_bias: [r] or [S, r], or None.
        fc2_weight: [C, r] or [S, C, r]; trailing dimensions of 1 as above.
        fc2_bias: [C] or [S, C], or None.
        branch_order: "reversed" puts branch s into slot S-1-s, as the published code and every
            weight trained with it do; "forward" into slot s, as in the paper's equation 8.
        return_attention: also return the attention a.

    Returns:
        out [N, S*C, H, W], in the features' dtype and (in a mix, the majority's) memory layout.
        With `return_attention`, also a [N, S, C], indexed by branch (not by slot), in the
        accumulation type: float64 for float64 features, else float32. Both are differentiable.

    The SE weights have the features' dtype, or float32 beside half-precision features, all four
    alike. Sums, SE and softmax are computed in the accumulation type and `out` is rounded once.
    Autocast casts nothing here: features and weights are taken as they are. (Eager PyTorch under
    CUDA autocast would return float32, because its softmax does.) Results are bitwise the same
    from run to run and for any number of threads.

    Raises:
        ValueError: shapes or counts that do not fit, an unknown `branch_order`.
        TypeError: dtypes that are not supported or do not fit.
        RuntimeError: tensors on different devices.
    """
    if isinstance(feats, Tensor):
        raise TypeError(
            "psa_attention: feats is a Tensor, expected a sequence of "
            f"{MIN_BRANCHES} to {MAX_BRANCHES} maps (try feats.chunk(branches, dim=1))"
        )
    out, _, attention = torch.ops.epsa_fused.psa_attention.default(
        list(feats), fc1_weight, fc1_bias, fc2_weight, fc2_bias, is_reversed(branch_order)
    )
    return (out, attention) if return_attention else out


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
