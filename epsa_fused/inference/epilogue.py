"""Fused PSA modules for serving: with BatchNorm and ReLU, and with all arguments at hand."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .._winograd import winograd_allowed
from ..modules import FusedPSAModule
from ..modules.adopted import FusedAdoptedPSA
from ..modules.layers import is_plain, why_layer_called
from ..modules.tracing import as_leaf
from ..reference import asks_for_attention


class PSAWithEpilogue(FusedPSAModule):
    """relu(norm(psa(x))), where the ReLU may be absent. For inference on the CPU.

    Where the operator cannot compute it in one pass, the module's own forward runs first.

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

    def epilogue(self) -> tuple[Tensor, Tensor, bool]:
        """The operator's arguments scale, shift and relu."""
        return self._scale, self._shift, self._relu

    def forward(
        self, x: Tensor, return_attention: bool | str = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        asked = asks_for_attention("PSAWithEpilogue", return_attention)
        if isinstance(x, Proxy):
            leaf = as_leaf(self, x, asked)
            if leaf is not None:  # the graph's node is a call of this forward
                return leaf
        if asked:  # a call of its own, so that the output is the same with and without
            return self._followed_or_fused(x), super().forward(x, True)[1]
        return self._followed_or_fused(x)

    def _followed_or_fused(self, x: Tensor) -> Tensor:
        if not isinstance(x, Proxy) and self._operator_takes(x):
            return self._call_operator(x, cast(list[nn.Conv2d], self._convs()), *self.epilogue())
        return self._followed(cast(Tensor, super().forward(x)))

    def _followed(self, out: Tensor) -> Tensor:
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        scale, shift = (v.to(wide.device)[:, None, None] for v in (self._scale, self._shift))
        wide = wide * scale + shift
        return (torch.relu(wide) if self._relu else wide).to(out.dtype)

    def _operator_takes(self, x: Tensor) -> bool:
        """Whether the operator computes the module with what follows, which has no gradient."""
        tensors = (x, *self.parameters())
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        # the operator wants scale and shift in float64 beside maps of that type
        plain = is_plain(x) and x.device.type == "cpu" and x.dtype != torch.float64
        return plain and not grad and self._why_not_fused() is None


class AdoptedPSAWithEpilogue(FusedAdoptedPSA, PSAWithEpilogue):
    """The same of a module whose layers have names of their own."""

    __init__ = PSAWithEpilogue.__init__


def with_epilogue(psa: FusedPSAModule, norm: nn.BatchNorm2d, relu: bool) -> PSAWithEpilogue:
    """relu(norm(psa(x))); the arguments are those of :class:`PSAWithEpilogue`."""
    adopted = isinstance(psa, FusedAdoptedPSA)
    return (AdoptedPSAWithEpilogue if adopted else PSAWithEpilogue)(psa, norm, relu)


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


_KINDS = (FusedPSAModule, FusedAdoptedPSA, PSAWithEpilogue, AdoptedPSAWithEpilogue)


class PackedPSA(nn.Module):
    """A fused PSA module with packed weights, as one call of its operator.

    FusedPSAModule looks in each call whether its layers may still be read in place of their calls.
    That takes some 60 microseconds, which matters for single images.
    """

    def __init__(self, psa: FusedPSAModule) -> None:
        super().__init__()
        convs = cast(list[nn.Conv2d], psa._convs())
        with torch.no_grad():
            (_, *arguments), bias = psa._arguments(torch.empty(0), convs)
        self._description = repr(psa)
        self._whole = (psa,)  # in a tuple: its layers are no children of this module
        self._operator = torch.ops.epsa_fused.psa_forward.default
        winograd = winograd_allowed(psa.winograd)
        epilogue = psa.epilogue() if isinstance(psa, PSAWithEpilogue) else (None, None, False)
        self._rest = (*arguments, psa._packed, winograd, *epilogue, bias)

    def extra_repr(self) -> str:
        return self._description

    def forward(
        self, x: Tensor, return_attention: bool | str = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        if return_attention is not False:
            return cast(tuple[Tensor, Tensor], self._whole[0](x, return_attention))
        return cast(Tensor, self._operator(x, *self._rest))


def pack_arguments(module: nn.Module) -> None:
    """Put a :class:`PackedPSA` in the place of each packed PSA module whose call means no more."""
    modules = list(module.named_modules())
    for name, psa in modules:
        if (
            name
            and isinstance(psa, FusedPSAModule)
            and type(psa) in _KINDS
            and psa._packed is not None
            and psa._why_not_fused() is None
            and why_layer_called(name, psa, type(psa)) is None
        ):
            module.set_submodule(name, PackedPSA(psa))
