"""The fused operators in standard ones, for consumers of graphs that do not know them.

torch.onnx.export(dynamo=True) decomposes what it has no translation of by PyTorch's table of
decompositions, where these are put. Inductor and torch.export have tables of their own and keep
the operators whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from ._fake import fake_psa_attention, fake_psa_forward, fake_psa_save_output, fake_spc_conv

_OP = torch.ops.epsa_fused.psa_attention.default
_CONV = torch.ops.epsa_fused.spc_conv.default
_MODULE = torch.ops.epsa_fused.psa_forward.default
_SAVE_OUTPUT = torch.ops.epsa_fused.psa_save_output.default


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, inner: int) -> Tensor:
    """x [N, S, inner] by [out, inner] or [S, out, inner] and trailing ones -> [N, S, out]."""
    per_branch = weight.dim() in (3, 5)
    weight = weight.to(x.dtype)
    weight = weight.reshape(weight.shape[0], -1, inner) if per_branch else weight.reshape(-1, inner)
    out = torch.matmul(x.unsqueeze(2), weight.transpose(-1, -2)).squeeze(2)
    return out if bias is None else out + bias.to(x.dtype)


@register_decomposition(_OP)
def psa_attention(
    feats: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    reversed: bool,
    pooled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As epsa_fused::psa_attention: out [N, S*C, H, W], and pooled and attention [N, S, C]."""
    dtype, channels = feats[0].dtype, feats[0].shape[1]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    maps = [f.to(acc) for f in feats]
    if pooled is None:
        pooled = torch.stack([f.mean((2, 3)) for f in maps], 1)
    hidden = torch.relu(_linear(pooled, fc1_weight, fc1_bias, channels))
    z = torch.sigmoid(_linear(hidden, fc2_weight, fc2_bias, hidden.shape[2]))
    attention = torch.softmax(z, 1)
    products = [f * attention[:, s, :, None, None] for s, f in enumerate(maps)]
    return torch.cat(products[::-1] if reversed else products, 1).to(dtype), pooled, attention


def _convolve(x, weights, groups, stride, padding, dilation) -> list[Tensor]:
    return [
        torch.conv2d(x, w, None, stride, p, d, g)
        for w, g, p, d in zip(weights, groups, padding, dilation, strict=True)
    ]


@register_decomposition(_CONV)
def spc_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[list[Tensor], Tensor]:
    """As epsa_fused::spc_conv: S x [N, C, H', W'], and their means [N, S, C]."""
    feats = _convolve(x, weights, groups, stride, padding, dilation)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return feats, torch.stack([f.to(acc).mean((2, 3)) for f in feats], 1)


@register_decomposition(_MODULE)
def psa_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    reversed: bool,
    packed: Tensor | None = None,
) -> Tensor:
    """As epsa_fused::psa_forward: [N, S*C, H', W']."""
    feats = _convolve(x, weights, groups, stride, padding, dilation)
    return psa_attention(feats, fc1_weight, fc1_bias, fc2_weight, fc2_bias, reversed)[0]


@register_decomposition(_SAVE_OUTPUT)
def psa_save_output(
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
    *se: Tensor | bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As epsa_fused::psa_save_output: out, and pooled and attention [N, S, C]."""
    return psa_attention(_convolve(x, weights, groups, stride, padding, dilation), *se)


# Fake tensors of symbolic sizes would take a decomposition above for the operator's shapes,
# whose strides may be others; what is in this table, they leave to the fake kernel.
register_decomposition(_OP, type="meta")(fake_psa_attention)
register_decomposition(_CONV, type="meta")(fake_spc_conv)
register_decomposition(_MODULE, type="meta")(fake_psa_forward)
register_decomposition(_SAVE_OUTPUT, type="meta")(fake_psa_save_output)
