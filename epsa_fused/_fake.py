"""Fake kernels: shapes without data, for torch.compile, torch.export and meta tensors.

csrc/ops/meta.cpp computes the shapes, by the checks and layouts that the kernels use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from . import _library  # noqa: F401  loads the operators

_META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)


def _keep_whole(op: torch._ops.OpOverload) -> None:
    """Tell Inductor, if it is running, to call `op` rather than to ask for its decomposition.

    Inductor looks for operators that nobody lowered in the table that _decompositions.py fills for
    ONNX. Finding one there is an error where the variable CI is set. Importing Inductor takes
    seconds, so it is told on first use: every graph passes a fake kernel before it.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and op not in lowering.lowerings:
        constraint = lowering.constrain_to_fake_tensors  # custom operators' default
        lowering.make_fallback(op, layout_constraint=constraint, warn=False)


def _register(name: str) -> Callable[..., Any]:
    """Register and return the fake kernel of one operator."""
    op = getattr(torch.ops.epsa_fused, name).default
    shapes = getattr(torch.ops.epsa_fused, f"_{name}_meta").default

    def fake(*args: Any, **kwargs: Any) -> Any:
        _keep_whole(op)
        # A plain call would ask the fake tensors' mode, which has no kernel of this operator.
        return shapes.redispatch(_META, *args, **kwargs)

    torch.library.register_fake(f"epsa_fused::{name}", fake)
    return fake


FAKE_KERNELS = {
    name: _register(name)
    for name in (
        "psa_attention",
        "psa_attention_backward",
        "spc_conv",
        "spc_conv_backward",
        "psa_forward",
        "psa_save_output",
        "psa_save_output_backward",
    )
}
