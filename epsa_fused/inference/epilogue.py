"""Fused PSA modules for serving: with BatchNorm and ReLU, and with all arguments at hand."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._winograd import winograd_allowed
from ..modules import FusedPSAModule
from ..modules.layers import why_layer_called


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

    def forward(self, x: Tensor) -> Tensor:
        why = self._why_not_fused()
        if why is not None:  # the layers' output would lack what follows
            raise NotImplementedError(f"PSAWithEpilogue: expected the fused operator, got: {why}")
        return super().forward(x)


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


class PackedPSA(nn.Module):
    """A fused PSA module with packed weights, as one call of its operator.

    FusedPSAModule looks in each call whether its layers may still be read in place of their calls.
    That takes some 60 microseconds, which matters for single images.
    """

    def __init__(self, psa: FusedPSAModule) -> None:
        super().__init__()
        convs = cast(list[nn.Conv2d], psa._convs())
        with torch.no_grad():
            _, *arguments = psa._arguments(torch.empty(0), convs)
        self._description = repr(psa)
        self._operator = torch.ops.epsa_fused.psa_forward.default
        winograd = winograd_allowed(psa.winograd)
        self._rest = (*arguments, psa._packed, winograd, *psa._epilogue())

    def extra_repr(self) -> str:
        return self._description

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self._operator(x, *self._rest))


def pack_arguments(module: nn.Module) -> None:
    """Put a :class:`PackedPSA` in the place of each packed PSA module whose call means no more."""
    modules = list(module.named_modules())
    for name, psa in modules:
        if (
            name
            and isinstance(psa, FusedPSAModule)
            and type(psa) in (FusedPSAModule, PSAWithEpilogue)
            and psa._packed is not None
            and psa._why_not_fused() is None
            and why_layer_called(name, psa, type(psa)) is None
        ):
            module.set_submodule(name, PackedPSA(psa))
