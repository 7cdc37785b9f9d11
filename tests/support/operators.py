"""The attention and the convolutions as functions of tensors alone, for what holds of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support import cases, convolutions
from support.cases import Case, make_inputs
from torch import Tensor

from epsa_fused import psa_attention


@dataclass(frozen=True)
class Operator:
    """`call` gives the differentiable results of the tensors that it is given.

    `bare` calls the operator without the public function around it.
    """

    name: str
    # of a dtype and, if one is named, of a layout and at another size
    tensors: Callable[..., list[Tensor]]
    call: Callable[..., tuple[Tensor, ...]]
    bare: Callable[..., tuple[Tensor, ...]]

    def leaves(self, *which: object) -> list[Tensor]:
        """`which` goes to `tensors`."""
        return [t.requires_grad_() for t in self.tensors(*which)]


BRANCHES = tuple(convolutions.same(k, g) for k, g in ((3, 1), (1, 2), (5, 4)))
ATTENTION_LAYOUTS = {layout.name: layout for layout in cases.LAYOUTS}
CONV_LAYOUTS = {layout.name: layout for layout in convolutions.LAYOUTS}
PLAIN = ("contiguous", "channels_last")
SIZES = {"small": (2, 3, 4), "other": (3, 9, 5)}  # N, H, W


def attention_tensors(
    dtype: torch.dtype = torch.float32, layout: str = "contiguous", size: str = "small"
) -> list[Tensor]:
    n, h, w = SIZES[size]
    case = Case("attention", n, 2, 3, h, w, 2)
    kind = cases.MATRICES if layout in PLAIN else cases.STRIDED
    return make_inputs(case, dtype, ATTENTION_LAYOUTS[layout], kind).tensors()


def conv_tensors(
    dtype: torch.dtype = torch.float32, layout: str = "contiguous", size: str = "small"
) -> list[Tensor]:
    n, h, w = SIZES[size]
    call = convolutions.Call("conv", n, 4, 4, h, w, BRANCHES)
    return convolutions.make_inputs(call, dtype, CONV_LAYOUTS[layout]).tensors()


# ---- the operators ----

ATTENTION = Operator(
    "psa_attention",
    attention_tensors,
    lambda *t: psa_attention(t[:2], *t[2:], return_attention=True),
    lambda *t: torch.ops.epsa_fused.psa_attention.default(t[:2], *t[2:], True)[::2],
)
CALL = convolutions.Call("settings alone", 1, 4, 4, 1, 1, BRANCHES)
CONVOLUTIONS = Operator(
    "spc_conv",
    conv_tensors,
    lambda *t: tuple(convolutions.spc(CALL, t[0], t[1:])[0]),
    lambda *t: tuple(convolutions.spc(CALL, t[0], t[1:])[0]),
)


# The emulator has the attention alone.
OPERATORS = (
    (ATTENTION, ATTENTION_LAYOUTS, [pytest.mark.emulated]),
    (CONVOLUTIONS, CONV_LAYOUTS, []),
)
for_each_operator = pytest.mark.parametrize(
    "operator", [pytest.param(op, id=op.name, marks=marks) for op, _, marks in OPERATORS]
)
for_each_input = pytest.mark.parametrize(
    ("operator", "which"),
    [
        pytest.param(op, which, id=f"{op.name}-{which}", marks=marks)
        for op, _, marks in OPERATORS
        for which in range(len(op.tensors()))
    ],
)
for_each_layout = pytest.mark.parametrize(
    ("operator", "layout"),
    [
        pytest.param(op, layout, id=f"{op.name}-{layout}", marks=marks)
        for op, layouts, marks in OPERATORS
        for layout in layouts
    ],
)
