"""The attention and the convolutions as functions of tensors alone, for what holds of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support import convolutions
from support.cases import Case, make_inputs
from torch import Tensor

from epsa_fused import psa_attention


@dataclass(frozen=True)
class Operator:
    """`call` gives the differentiable results of the tensors that it is given.

    `bare` calls the operator without the public function around it.
    """

    name: str
    tensors: Callable[[torch.dtype], list[Tensor]]
    call: Callable[..., tuple[Tensor, ...]]
    bare: Callable[..., tuple[Tensor, ...]]

    def leaves(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [t.requires_grad_() for t in self.tensors(dtype)]


CASE = Case("tiny", 2, 2, 3, 2, 3, 2)
CALL = convolutions.Call(
    "tiny", 2, 4, 4, 3, 4, tuple(convolutions.same(k, g) for k, g in ((3, 1), (1, 2), (5, 4)))
)
ATTENTION = Operator(
    "psa_attention",
    lambda dtype: make_inputs(CASE, dtype).tensors(),
    lambda *t: psa_attention(t[:2], *t[2:], return_attention=True),
    lambda *t: torch.ops.epsa_fused.psa_attention.default(t[:2], *t[2:], True)[::2],
)
CONVOLUTIONS = Operator(
    "spc_conv",
    lambda dtype: convolutions.make_inputs(CALL, dtype).tensors(),
    lambda *t: tuple(convolutions.spc(CALL, t[0], t[1:])[0]),
    lambda *t: tuple(convolutions.spc(CALL, t[0], t[1:])[0]),
)


# The emulator has the attention alone.
OPERATORS = ((ATTENTION, [pytest.mark.emulated]), (CONVOLUTIONS, []))
for_each_operator = pytest.mark.parametrize(
    "operator", [pytest.param(op, id=op.name, marks=marks) for op, marks in OPERATORS]
)
for_each_input = pytest.mark.parametrize(
    ("operator", "which"),
    [
        pytest.param(op, which, id=f"{op.name}-{which}", marks=marks)
        for op, marks in OPERATORS
        for which in range(len(op.tensors(torch.float32)))
    ],
)
