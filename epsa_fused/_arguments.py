"""The arguments of the module's operators, in the order of their schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

# fc1_weight, fc1_bias, fc2_weight, fc2_bias
SEArguments: TypeAlias = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


class ModuleArguments(NamedTuple):
    """What psa_forward and psa_save_output take first; csrc/ops/schemas.cpp has the schemas."""

    x: Tensor
    weights: Sequence[Tensor]
    groups: Sequence[int]
    stride: int
    padding: Sequence[int]
    dilation: Sequence[int]
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    reversed: bool
