"""optimize_for_inference(): one call from a trained model to one that serves on the CPU.

optimize_for_export() is the same without what torch.export cannot follow."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Tracer
from torch.fx.passes.shape_prop import ShapeProp

from .. import _C
from .._checks import check_flag, check_module, first_line, given
from ..fuse import fuse
from ..modules import FusedPSAModule, FusedSplitPSA, prepack
from .accuracy import check_results
from .arguments import cast_floats, cloned, laid_out, tensors_of
from .compiled import FrozenModule
from .epilogue import pack_arguments
from .folding import fold_batch_norms
from .linear import pack_linear
from .model import ExportableModel, InferenceModel, InferenceReport
from .pointwise import fuse_pointwise, why_not_available

DTYPES = (torch.float32, torch.bfloat16)
# Instruction sets whose kernels have products of bfloat16; the others read it as float32.
_ISAS_OF_BFLOAT16 = ("avx512_bf16", "amx_bf16")


def optimize_for_inference(
    model: nn.Module,
    *example: Any,
    dtype: torch.dtype | None = None,
    compile: bool = True,
) -> InferenceModel:
    """Prepare a model for serving on the CPU; the model itself is never changed.

    The result is a copy in which PSA modules are fused (:func:`epsa_fused.fuse`), BatchNorms are
    folded into the layers before them, weights and images are in channels_last, and the PSA
    modules' weights are packed. With `compile` it is then compiled by `torch.compile` with frozen
    weights. Without, convolutions run in one call of oneDNN with the sum and the ReLU behind
    them, and linear layers of bfloat16 have packed weights; this needs no C++ compiler.

    The weights are copied: later changes of `model` have no effect on the result. Other batch and
    image sizes than the example's work too. A compiled model compiles again for each new size,
    which takes as long as the first time.

    The model is traced by torch.fx, which takes for granted: the number and types of the arguments,
    the dimensions of tensors, and the values of numbers and strings. A call with others is an
    error. A model that cannot be traced is served without folding.

    Args:
        model: in eval mode, on the CPU, in float32 or bfloat16.
        example: arguments of one call, as they will be served. The result is checked on them.
        dtype: torch.float32 or torch.bfloat16, for weights and activations. None: the model's.
            The report's notes tell where bfloat16 gains no speed.
        compile: whether to use `torch.compile`, which needs a C++ compiler.

    Returns:
        An :class:`InferenceModel`: call it like `model`. Its `report` says what was done. A model
        without PSA modules is optimised too, and the report says that there are none.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, dtype or device.
        RuntimeError: the model is in training mode; or there is no C++ compiler for `compile`; or
            the outputs for the example differ from the model's in float64 by more than `dtype`
            explains.

    Other errors come from the model's own call.
    """
    check_flag("optimize_for_inference: compile", compile)
    return _optimized("optimize_for_inference", model, example, dtype, compile, export=False)


def optimize_for_export(
    model: nn.Module, *example: Any, dtype: torch.dtype | None = None
) -> ExportableModel:
    """Prepare a model for `torch.export` and AOTInductor, as :func:`optimize_for_inference` does.

    PSA modules are fused, BatchNorms are folded, and weights are in channels_last and packed. Let
    `torch._inductor.config.freezing` freeze the rest when the exported program is compiled.

    Args:
        model: in eval mode, on the CPU, in float32 or bfloat16.
        example: arguments of one call. The result is checked on them.
        dtype: torch.float32 or torch.bfloat16, for weights and activations. None: the model's.

    Returns:
        An :class:`ExportableModel`: call it like `model`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, dtype or device.
        RuntimeError: as :func:`optimize_for_inference`.
    """
    name = "optimize_for_export"
    return ExportableModel(_optimized(name, model, example, dtype, compile=False, export=True))


def _optimized(
    name: str,
    model: nn.Module,
    example: tuple[Any, ...],
    dtype: torch.dtype | None,
    compile: bool,
    export: bool,
) -> InferenceModel:
    """export: without the steps that torch.export cannot follow."""
    check_module(f"{name}: model", model)
    own = _dtype_of(name, model)
    dtype = own if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(
            f"{name}: dtype: expected torch.float32 or torch.bfloat16, got "
            + (str(dtype) if isinstance(dtype, torch.dtype) else given(dtype))
        )
    if any(m.training for m in model.modules()):
        raise RuntimeError(
            f"{name}: expected a model in eval mode, got one in training mode; "
            "call model.eval() first"
        )
    if not tensors_of(example):
        raise ValueError(
            f"{name}: example: expected the arguments of one call, with a tensor, "
            f"got ({', '.join(map(given, example))})"
        )
    _check_devices(name, model, example)
    report = InferenceReport(name, dtype)
    module = _simplified(model, example, report).to(dtype).requires_grad_(False)
    memory_format = _memory_format(module, cast_floats(example, dtype), report)
    _lay_out_weights(module, memory_format)
    inputs = laid_out(cast_floats(cloned(example), dtype), memory_format)
    if not compile and not export:
        _use_onednn(module, inputs, memory_format, report)
    psa = [m for m in module.modules() if isinstance(m, FusedPSAModule | FusedSplitPSA)]
    report.psa_modules = len(psa)
    if not psa:
        report.notes.append("no PSA module was found")
    elif dtype == torch.bfloat16 and not export:  # another machine may run what is exported
        _tell_whether_bfloat16_pays(own, report)
    _pack(module, inputs, report)
    traced = isinstance(module, GraphModule)
    function: Callable[..., Any] = module
    if compile:
        function = FrozenModule(module, whole=traced)
        report.compiled = True
    elif traced and not export:
        pack_arguments(module)
    result = InferenceModel(
        module, function, memory_format, own, example if traced else None, report
    )
    results = result.unrounded(*cloned(example))
    report.error = check_results(model, example, results, report)
    _restore_buffers(module, model)
    return result


def _dtype_of(name: str, model: nn.Module) -> torch.dtype:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) != 1:
        raise ValueError(
            f"{name}: model: expected parameters of one floating-point dtype, got "
            f"{sorted(map(str, dtypes))}"
        )
    return dtypes.pop()


def _check_devices(name: str, model: nn.Module, example: tuple[Any, ...]) -> None:
    places = {t.device.type for t in (*model.parameters(), *model.buffers(), *tensors_of(example))}
    if places != {"cpu"}:
        raise ValueError(
            f"{name}: expected the model and the example on the CPU, got tensors on "
            + ", ".join(sorted(places))
        )


class _Tracer(Tracer):
    """Keeps fused PSA modules whole, also where they have hooks."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        fused = isinstance(m, FusedPSAModule | FusedSplitPSA)
        return fused or super().is_leaf_module(m, module_qualified_name)


def _simplified(model: nn.Module, example: tuple[Any, ...], report: InferenceReport) -> nn.Module:
    """A copy with fused PSA modules; a graph with folded BatchNorms if it can be traced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report holds what fuse() warns of
        fused = fuse(copy.deepcopy(model).float())  # folded weights are rounded once
    report.fuse = getattr(fused, "fuse_report", report.fuse)
    inputs = cast_floats(example, torch.float32)
    with torch.no_grad():
        expected = tensors_of(fused(*cloned(inputs)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph_module = GraphModule(fused, _Tracer().trace(fused))
                traced = tensors_of(Interpreter(graph_module).run(*cloned(inputs)))
        except Exception as error:
            report.notes.append(
                f"nothing was folded: torch.fx cannot trace the model ({first_line(error)})"
            )
            return fused
    # A trace leaves out branches, and turns sums in place into others.
    shapes = [[t.shape for t in tensors] for tensors in (traced, expected)]
    if shapes[0] != shapes[1] or not all(map(torch.allclose, traced, expected)):
        report.notes.append("nothing was folded: what torch.fx traces computes something else")
        return fused
    report.folded = fold_batch_norms(graph_module)
    return graph_module


def _use_onednn(
    module: nn.Module,
    inputs: tuple[Any, ...],
    memory_format: torch.memory_format,
    report: InferenceReport,
) -> None:
    why = why_not_available(report.dtype)
    if not isinstance(module, GraphModule):
        why = "the model is not a graph of torch.fx"
    elif why is None:
        with torch.no_grad():
            ShapeProp(module).propagate(*cloned(inputs))
        report.linear = pack_linear(module)
        if memory_format == torch.channels_last:
            report.pointwise = fuse_pointwise(module)
        else:
            why = "oneDNN's packed ones give channels_last"
    if why is not None:
        report.notes.append(f"convolutions are called one by one: {why}")


def _tell_whether_bfloat16_pays(own: torch.dtype, report: InferenceReport) -> None:
    isa = _C.cpu_isa()
    if isa not in _ISAS_OF_BFLOAT16:
        remedy = "take dtype=torch.float32" if own == torch.bfloat16 else "leave dtype out"
        report.notes.append(
            f"bfloat16 gains no speed: the kernels of {isa} compute it in float32; {remedy}"
        )


def _pack(module: nn.Module, inputs: tuple[Any, ...], report: InferenceReport) -> None:
    fused = [
        m for m in module.modules() if isinstance(m, FusedPSAModule) and m._has_convs_as_branches()
    ]
    in_part = report.psa_modules - len(fused)
    if in_part:
        report.notes.append(f"{in_part} PSA modules are fused in part: their branches are called")
    if not fused:
        return
    try:
        prepack(module, *cloned(inputs), frozen=True)
    except (RuntimeError, ValueError) as error:
        report.notes.append(f"weights are packed in each call: {error}")
    report.packed = sum(m._packed is not None for m in fused)


def _memory_format(
    module: nn.Module, inputs: tuple[Any, ...], report: InferenceReport
) -> torch.memory_format:
    """channels_last, if the model runs in it: a `view` in it may need contiguous maps."""
    trial = copy.deepcopy(module)
    _lay_out_weights(trial, torch.channels_last)
    try:
        with torch.no_grad():
            trial(*laid_out(cloned(inputs), torch.channels_last))
    except RuntimeError as error:
        report.notes.append(
            f"images stay contiguous: in channels_last the model fails ({first_line(error)})"
        )
        return torch.contiguous_format
    return torch.channels_last


def _lay_out_weights(module: nn.Module, memory_format: torch.memory_format) -> None:
    """As module.to(memory_format=...), which refuses weights of five dimensions."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = laid_out(tensor.data, memory_format)


def _restore_buffers(module: nn.Module, model: nn.Module) -> None:
    """Undo what the trial calls did to buffers that the model changes by itself."""
    given_buffers = dict(model.named_buffers())
    for name, buffer in module.named_buffers():
        if name in given_buffers:
            buffer.copy_(given_buffers[name])
