"""A fused PSA module with BatchNorm and ReLU in the pass that writes its output."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import FusedPSAModule


class PSAWithEpilogue(FusedPSAModule):
    """relu(norm(psa(x))), where the ReLU may be absent. For inference on the CPU.

    Args:
        psa: the module; this one shares its layers.
        norm: of its output, in eval mode. Its statistics are copied, in float32.
        relu: whether a ReLU follows.
    """

    def __init__(self, psa: FusedPSAModule, norm: nn.BatchNorm2d, relu: bool) -> None:
        nn.Module.__init__(self)
        for name, value in psa.__dict__.items():
            self.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
        self._relu = relu
        # no buffers: those would be cast with the module
        with torch.no_grad():
            self._scale, self._shift = _affine(norm)

    def extra_repr(self) -> str:
        return super().extra_repr() + ", then BatchNorm" + (" and ReLU" if self._relu else "")

    def _epilogue(self) -> tuple[Any, ...]:
        return self._scale, self._shift, self._relu

    def _finish(self, out: Tensor) -> Tensor:
        wide = out.float() * self._scale[:, None, None] + self._shift[:, None, None]
        return (torch.relu(wide) if self._relu else wide).to(out.dtype)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """norm(x) = x * scale + shift: scale and shift [C], in float32."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.weight is not None:
        scale, shift = scale * norm.weight, shift * norm.weight
    if norm.bias is not None:
        shift = shift + norm.bias
    return scale.float(), shift.float()
