"""The fused operators as standard ones, for consumers of graphs that lack the fused ones.

torch.onnx.export(dynamo=True) decomposes operators that it cannot translate, by PyTorch's table of
decompositions. This module fills that table. Inductor and torch.export have tables of their own
and keep the operators whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from ._arguments import ModuleArguments
from ._fake import FAKE_KERNELS


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, inner: int) -> Tensor:
    """x [N, S, inner] -> [N, S, out], for a weight [out, inner] or [S, out, inner].

    The weight may have trailing dimensions of 1.
    """
    per_branch = weight.dim() in (3, 5)
    weight = weight.to(x.dtype)
    weight = weight.reshape(weight.shape[0], -1, inner) if per_branch else weight.reshape(-1, inner)
    out = torch.matmul(x.unsqueeze(2), weight.transpose(-1, -2)).squeeze(2)
    return out if bias is None else out + bias.to(x.dtype)


def _psa_attention(
    feats: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    reversed: bool,
    pooled: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
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
    out = torch.cat(products[::-1] if reversed else products, 1)
    if scale is not None and shift is not None:
        out = out * scale[:, None, None] + shift[:, None, None]
    if relu:
        out = torch.relu(out)
    return out.to(dtype), pooled, attention


def _convolve(
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
    winograd: bool = True,
    bias: Tensor | None = None,
) -> list[Tensor]:
    """The branches' maps, S x [N, C, H', W']. `winograd` changes no meaning."""
    biases = [None] * len(weights) if bias is None else bias.chunk(len(weights))
    return [
        torch.conv2d(x, w, b, stride, p, d, g)
        for w, b, g, p, d in zip(weights, biases, groups, padding, dilation, strict=True)
    ]


def _spc_conv(*arguments: Any, **options: Any) -> tuple[list[Tensor], Tensor]:
    """As epsa_fused::spc_conv: S x [N, C, H', W'], and their means [N, S, C]."""
    feats = _convolve(*arguments, **options)
    acc = torch.float64 if feats[0].dtype == torch.float64 else torch.float32
    return feats, torch.stack([f.to(acc).mean((2, 3)) for f in feats], 1)


def _psa_save_output(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As epsa_fused::psa_save_output: out, and pooled and attention [N, S, C].

    `winograd`, behind the module's arguments, changes no meaning.
    """
    module = ModuleArguments(*arguments[: len(ModuleArguments._fields)])
    return _psa_attention(_convolve(*module[:6]), *module[6:])


def _psa_forward(*arguments: Any, **options: Any) -> Tensor:
    """As epsa_fused::psa_forward. `packed` and `winograd` change no meaning."""
    count = len(ModuleArguments._fields)
    module = ModuleArguments(*arguments[:count])
    names = ("packed", "winograd", "scale", "shift", "relu", "bias")
    rest = dict(zip(names, arguments[count:], strict=False)) | options
    epilogue = {name: rest[name] for name in ("scale", "shift", "relu") if name in rest}
    feats = _convolve(*module[:6], bias=rest.get("bias"))
    return _psa_attention(feats, *module[6:], **epilogue)[0]


def _register(name: str, decomposition: Callable[..., Any]) -> None:
    """Enter the decomposition, and the fake kernel as the operator's "meta" entry.

    Fake tensors of symbolic sizes would take the decomposition for the operator's shapes, but its
    strides may differ. With a "meta" entry they use the fake kernel.
    """
    operator = getattr(torch.ops.epsa_fused, name).default
    register_decomposition(operator)(decomposition)
    register_decomposition(operator, type="meta")(FAKE_KERNELS[name])


_register("psa_attention", _psa_attention)
_register("spc_conv", _spc_conv)
_register("psa_forward", _psa_forward)
_register("psa_save_output", _psa_save_output)
