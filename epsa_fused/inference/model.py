"""What optimize_for_inference() returns: a model that only serves, and a report on it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..fuse import FuseReport
from .arguments import cast_floats, describe, in_layout, kind_of


@dataclass
class InferenceReport:
    """What :func:`optimize_for_inference` or :func:`optimize_for_export` did.

    Attributes:
        function: its name.
        dtype: of weights and activations.
        psa_modules: how many fused PSA modules the model holds.
        fuse: what :func:`epsa_fused.fuse` replaced and left alone.
        folded: names of the BatchNorms that were folded into the layer before them.
        pointwise: how many convolutions are one call of oneDNN with the sum and ReLU behind them.
        linear: how many linear layers of bfloat16 are one call of oneDNN with packed weights.
        packed: how many PSA modules hold packed weights.
        compiled: whether `torch.compile` made code of the model, with frozen weights.
        error: of the outputs for the example, relative to the largest; against float64.
        notes: what was left out, and why; where bfloat16 gains no speed, what to do.
    """

    function: str
    dtype: torch.dtype
    psa_modules: int = 0
    fuse: FuseReport = field(default_factory=FuseReport)
    folded: list[str] = field(default_factory=list)
    pointwise: int = 0
    linear: int = 0
    packed: int = 0
    compiled: bool = False
    error: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.function}: {self.dtype}, error {self.error:.2g} of the largest output",
            f"  {self.psa_modules} fused PSA modules, {len(self.fuse.replaced)} of them put in "
            f"place now, {self.packed} with packed weights",
            f"  {len(self.folded)} BatchNorms folded into the layers before them",
        ]
        if self.compiled:
            lines.append("  compiled by torch.compile, weights frozen")
        if self.pointwise:
            lines.append(f"  {self.pointwise} convolutions fused with sum and ReLU by oneDNN")
        if self.linear:
            lines.append(f"  {self.linear} linear layers with weights packed by oneDNN")
        lines += [f"  {name}: left alone, {why}" for name, why in self.fuse.left.items()]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


class InferenceModel:
    """A model that only serves; :func:`optimize_for_inference` makes it.

    Call it as the example was: other sizes are fine. Where the model was traced, other types,
    numbers and strings are not. Floating-point inputs are cast, and images are brought into its
    layout. Outputs come in the dtype that the model given had. No call records gradients, and
    autocast changes nothing. It cannot be copied or pickled.

    Attributes:
        report: an :class:`InferenceReport`.
        module: the optimised nn.Module before `torch.compile`.
    """

    def __init__(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        memory_format: torch.memory_format,
        out_dtype: torch.dtype,
        example: tuple[Any, ...] | None,
        report: InferenceReport,
    ) -> None:
        """`example`: of a traced module, which takes much of its arguments for granted."""
        self.module = module
        self.report = report
        self._function = function
        self._memory_format = memory_format
        self._out_dtype = out_dtype
        self._traced = example is not None
        leaves, self._tree = tree_flatten((example, {}))
        self._kinds = list(map(kind_of, leaves))
        self._expected = describe(example or (), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises:
        ValueError: a tensor is not on the CPU, or the arguments are of another kind than the
            example's.
        """
        return cast_floats(self.unrounded(*args, **kwargs), self._out_dtype)

    def unrounded(self, *args: Any, **kwargs: Any) -> Any:
        """The same, with the outputs in the dtype of the optimised model."""
        leaves, tree = tree_flatten((args, kwargs))
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
                raise ValueError(f"InferenceModel: expected tensors on the CPU, got {leaf.device}")
        if self._traced and (tree != self._tree or list(map(kind_of, leaves)) != self._kinds):
            raise ValueError(
                f"InferenceModel: expected the example's arguments {self._expected}, which the "
                f"traced model takes for granted, got {describe(args, kwargs)}"
            )
        args, kwargs = tree_unflatten(map(self._prepared, leaves), tree)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return self._function(*args, **kwargs)

    def _prepared(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):  # compiled code reads memory, where signs are not computed yet
            leaf = leaf.resolve_conj().resolve_neg()
        return in_layout(cast_floats(leaf, self.report.dtype), self._memory_format)

    def __repr__(self) -> str:
        return str(self.report)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "InferenceModel cannot be copied or pickled, since it holds packed weights: expected "
            "another call of optimize_for_inference"
        )


class ExportableModel(nn.Module):
    """A model for `torch.export`; :func:`optimize_for_export` makes it.

    It casts its arguments and lays them out, and its results come in the dtype that the model given
    had. The weights are copied, and packed for this processor's instruction set: on others the
    operators raise a ValueError.

    Attributes:
        report: an :class:`InferenceReport`.
        module: the optimised nn.Module.
    """

    def __init__(self, served: InferenceModel) -> None:
        super().__init__()
        self.report = served.report
        self.module = served.module
        self.eval()

        @functools.wraps(served.module.forward)  # torch.export reads the names of its arguments
        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map(served._prepared, (args, kwargs))
            return cast_floats(served.module(*args, **kwargs), served._out_dtype)

        self.forward = forward
