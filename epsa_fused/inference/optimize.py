"""optimize_for_inference(): one call from a trained model to one that serves on the CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._pytree import tree_map

from .._checks import check_flag, check_module, check_tensor
from ..fuse import FuseReport, fuse
from ..modules import FusedPSAModule, prepack
from .accuracy import cast_floats, check_results, tensors_of
from .compiled import FrozenModule
from .epilogue import pack_arguments
from .folding import fold_batch_norms
from .pointwise import DTYPES, fuse_pointwise, is_available


@dataclass
class InferenceReport:
    """What :func:`optimize_for_inference` did.

    Attributes:
        dtype: of weights and activations.
        psa_modules: how many fused PSA modules the model holds.
        fuse: what :func:`epsa_fused.fuse` replaced and left alone.
        folded: names of the BatchNorms that were folded into the layer before them.
        pointwise: how many convolutions are one call of oneDNN with the sum and ReLU behind them.
        packed: how many PSA modules hold packed weights.
        compiled: whether `torch.compile` made code of the model, with frozen weights.
        error: of the outputs for the example, relative to the largest; against float64.
        notes: what was left out, and why.
    """

    dtype: torch.dtype
    psa_modules: int = 0
    fuse: FuseReport = field(default_factory=FuseReport)
    folded: list[str] = field(default_factory=list)
    pointwise: int = 0
    packed: int = 0
    compiled: bool = False
    error: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"optimize_for_inference: {self.dtype}, error {self.error:.2g} of the largest output",
            f"  {self.psa_modules} fused PSA modules, {len(self.fuse.replaced)} of them put in "
            f"place now, {self.packed} with packed weights",
            f"  {len(self.folded)} BatchNorms folded into the layers before them",
        ]
        if self.compiled:
            lines.append("  compiled by torch.compile, weights frozen")
        else:
            lines.append(f"  {self.pointwise} convolutions fused with sum and ReLU by oneDNN")
        lines += [f"  {name}: left alone, {why}" for name, why in self.fuse.left.items()]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


class InferenceModel:
    """A model that only serves; :func:`optimize_for_inference` makes it.

    Call it as the model that it was made from, on CPU tensors. Floating-point inputs are cast, and
    images are brought into its layout. Outputs come in the dtype that the model given had. No call
    records gradients, and autocast changes nothing.

    Attributes:
        report: an :class:`InferenceReport`.
        module: the optimised nn.Module before `torch.compile`; for torch.export where `compile`.
    """

    def __init__(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        memory_format: torch.memory_format,
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        report: InferenceReport,
    ) -> None:
        self.module = module
        self.report = report
        self._function = function
        self._memory_format = memory_format
        self._dtype = dtype
        self._out_dtype = out_dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return cast_floats(self._unrounded(*args, **kwargs), self._out_dtype)

    def _unrounded(self, *args: Any, **kwargs: Any) -> Any:
        places = {t.device.type for t in tensors_of((args, kwargs))} - {"cpu"}
        if places:
            raise ValueError(f"InferenceModel: expected tensors on the CPU, got {places.pop()}")
        given = cast_floats((args, kwargs), self._dtype)
        args, kwargs = _laid_out(given, self._memory_format)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return str(self.report)


def optimize_for_inference(
    model: nn.Module,
    *example: Any,
    dtype: torch.dtype | None = None,
    compile: bool = True,
) -> InferenceModel:
    """Prepare a model for serving on the CPU; the model itself is never changed.

    The result is a copy in which PSA modules are fused (:func:`epsa_fused.fuse`), BatchNorms are
    folded into the convolutions before them, weights and images are in channels_last, and the PSA
    modules' weights are packed. With `compile` it is then compiled by `torch.compile` with frozen
    weights. Without, convolutions run in one call of oneDNN with the sum and the ReLU behind
    them; this needs no C++ compiler.

    The weights are copied: later changes of `model` have no effect on the result. Other batch and
    image sizes than the example's work too. A compiled model compiles again for each new size,
    which takes as long as the first time.

    Args:
        model: in eval mode, on the CPU, in float32 or bfloat16.
        example: arguments of one call, as they will be served. The result is checked on them.
        dtype: torch.float32 or torch.bfloat16, for weights and activations. None: the model's.
        compile: whether to use `torch.compile`, which needs a C++ compiler.

    Returns:
        An :class:`InferenceModel`: call it like `model`. Its `report` says what was done. A model
        without PSA modules is optimised too, and the report says that there are none.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, dtype or device.
        RuntimeError: the model is in training mode; or the outputs for the example differ from the
            model's in float64 by more than `dtype` explains.

    Other errors come from the model's own call.
    """
    check_module("optimize_for_inference: model", model)
    check_flag("optimize_for_inference: compile", compile)
    own = _dtype_of(model)
    dtype = own if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(
            f"optimize_for_inference: dtype: expected torch.float32 or torch.bfloat16, got {dtype}"
        )
    if any(m.training for m in model.modules()):
        raise RuntimeError(
            "optimize_for_inference: expected a model in eval mode, got one in training mode; "
            "call model.eval() first"
        )
    if not tensors_of(example):
        raise ValueError(
            "optimize_for_inference: example: expected the arguments of one call, with a tensor, "
            f"got {example!r}"
        )
    for place, value in enumerate(tensors_of(example)):
        check_tensor(f"optimize_for_inference: example {place}", value)
    _check_devices(model, example)
    report = InferenceReport(dtype)
    module = _simplified(model, example, report)
    module = module.to(dtype)
    memory_format = _memory_format(module, cast_floats(example, dtype), report)
    module = cast(Any, module).to(memory_format=memory_format)
    inputs = _laid_out(cast_floats(example, dtype), memory_format)
    if not compile:
        _use_pointwise(module, inputs, memory_format, report)
    _pack(module, inputs, report)
    function: Callable[..., Any] = module
    if compile:
        function = FrozenModule(module)
        report.compiled = True
    else:
        pack_arguments(module)
    result = InferenceModel(module, function, memory_format, dtype, own, report)
    report.error = check_results(model, example, dtype, result._unrounded(*example))
    return result


def _dtype_of(model: nn.Module) -> torch.dtype:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) != 1:
        raise ValueError(
            "optimize_for_inference: model: expected parameters of one floating-point dtype, got "
            f"{sorted(map(str, dtypes))}"
        )
    return dtypes.pop()


def _check_devices(model: nn.Module, example: tuple[Any, ...]) -> None:
    places = {t.device.type for t in (*model.parameters(), *model.buffers(), *tensors_of(example))}
    if places != {"cpu"}:
        raise ValueError(
            "optimize_for_inference: expected the model and the example on the CPU, got tensors on "
            + ", ".join(sorted(places))
        )


def _simplified(model: nn.Module, example: tuple[Any, ...], report: InferenceReport) -> nn.Module:
    """A copy with fused PSA modules; a graph with folded BatchNorms if it can be traced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report holds what fuse() warns of
        fused = fuse(copy.deepcopy(model).float())  # folded weights are rounded once
    report.fuse = getattr(fused, "fuse_report", report.fuse)
    report.psa_modules = sum(isinstance(m, FusedPSAModule) for m in fused.modules())
    if report.psa_modules == 0:
        report.notes.append("no PSA module was found")
    given = cast_floats(example, torch.float32)
    with torch.no_grad():
        expected = tensors_of(fused(*given))
        try:
            graph_module = symbolic_trace(fused)
            traced = tensors_of(ShapeProp(graph_module).propagate(*given))
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            report.notes.append(f"nothing was folded: torch.fx cannot trace the model ({first})")
            return fused
    # A trace leaves out branches, and turns sums in place into others.
    pairs = zip(traced, expected, strict=False)
    same = len(traced) == len(expected) and all(a.shape == b.shape for a, b in pairs)
    if not (same and all(map(torch.allclose, traced, expected))):
        report.notes.append("nothing was folded: what torch.fx traces computes something else")
        return fused
    report.folded = fold_batch_norms(graph_module)
    return graph_module


def _use_pointwise(
    module: nn.Module,
    inputs: tuple[Any, ...],
    memory_format: torch.memory_format,
    report: InferenceReport,
) -> None:
    if not isinstance(module, GraphModule):
        why = "torch.fx cannot trace the model"
    elif memory_format != torch.channels_last:
        why = "oneDNN's packed ones give channels_last"
    elif not is_available():
        why = "this PyTorch lacks oneDNN"
    else:
        with torch.no_grad():
            ShapeProp(module).propagate(*inputs)
            report.pointwise = fuse_pointwise(module)
        return
    report.notes.append(f"convolutions are called one by one: {why}")


def _pack(module: nn.Module, inputs: tuple[Any, ...], report: InferenceReport) -> None:
    if report.psa_modules == 0:
        return
    try:
        prepack(module, *inputs, frozen=True)
    except (RuntimeError, ValueError) as error:
        report.notes.append(f"weights are packed in each call: {error}")
    packed = [m for m in module.modules() if isinstance(m, FusedPSAModule)]
    report.packed = sum(m._packed is not None for m in packed)


def _memory_format(
    module: nn.Module, inputs: tuple[Any, ...], report: InferenceReport
) -> torch.memory_format:
    """channels_last, if the model runs in it: a `view` in it may need contiguous maps."""
    trial = cast(Any, copy.deepcopy(module)).to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            trial(*_laid_out(inputs, torch.channels_last))
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[0]
        report.notes.append(f"images stay contiguous: in channels_last the model fails ({first})")
        return torch.contiguous_format
    return torch.channels_last


def _laid_out(value: Any, memory_format: torch.memory_format) -> Any:
    """`value`, a tree of arguments, with its images in a layout."""
    return tree_map(
        lambda v: (
            v.contiguous(memory_format=memory_format)
            if isinstance(v, Tensor) and v.dim() == 4
            else v
        ),
        value,
    )
