"""Memory layouts of maps, as the operators choose them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_native(t: Tensor, memory_format: torch.memory_format) -> bool:
    """epsa::is_native of csrc/ops/attention_checks.cpp."""
    _, c, h, w = t.shape
    _, stride_c, stride_h, stride_w = t.stride()
    if memory_format == torch.contiguous_format:
        return (
            (w == 1 or stride_w == 1)
            and (h == 1 or stride_h == w)
            and (c == 1 or stride_c == h * w)
        )
    return (c == 1 or stride_c == 1) and (h == 1 or w == 1 or stride_h == w * stride_w)


def common_layout(feats: Sequence[Tensor]) -> torch.memory_format:
    """epsa::common_layout of csrc/ops/attention_checks.cpp."""
    contiguous = channels_last = 0
    for f in feats:
        if is_native(f, torch.contiguous_format):
            contiguous += 1
        elif is_native(f, torch.channels_last):
            channels_last += 1
    return torch.channels_last if channels_last > contiguous else torch.contiguous_format


def conv_layout(x: Tensor) -> torch.memory_format:
    """epsa::spc_layout of csrc/ops/conv_checks.cpp."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if is_native(x, memory_format):
            return memory_format
    return torch._prims_common.suggest_memory_format(x)


def empty(like: Tensor, shape: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
