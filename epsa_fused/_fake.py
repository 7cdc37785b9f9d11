"""Fake kernels: shapes without data, for torch.compile, torch.export and meta tensors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import ModuleArguments
from ._layout import common_layout, conv_layout, empty
from ._library import MAX_BRANCHES, MIN_BRANCHES


def _check_fake(op: str, feats: Sequence[Tensor], **others: Tensor | None) -> None:
    """What the fake kernels rely on. The real ones check all: ops/attention_checks.cpp."""
    if not MIN_BRANCHES <= len(feats) <= MAX_BRANCHES:
        raise ValueError(
            f"{op}: feats has {len(feats)} branches, expected {MIN_BRANCHES} to {MAX_BRANCHES}"
        )
    if feats[0].dim() != 4:
        raise ValueError(
            f"{op}: feats[0] has shape {list(feats[0].shape)}, expected 4 dimensions [N, C, H, W]"
        )
    named = {f"feats[{s}]": f for s, f in enumerate(feats)}
    for name, f in named.items():
        if f.shape != feats[0].shape:
            raise ValueError(
                f"{op}: {name} has shape {list(f.shape)}, expected {list(feats[0].shape)}, "
                "the shape of feats[0]"
            )
    for name, t in (named | others).items():
        if t is not None and t.device != feats[0].device:
            raise RuntimeError(
                f"{op}: {name} is on {t.device}, expected {feats[0].device}, the device of feats[0]"
            )


def _keep_whole(op: torch._ops.OpOverload) -> None:
    """Tell Inductor, if it is running, to call `op` rather than to ask for its decomposition.

    The table that _decompositions.py fills for ONNX is also where Inductor looks for operators that
    nobody lowered; finding one there is an error wherever the variable CI is set. Inductor takes
    seconds to import, hence not before it is used, and no graph reaches it without a fake kernel.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and op not in lowering.lowerings:
        constraint = lowering.constrain_to_fake_tensors  # the default of custom operators
        lowering.make_fallback(op, layout_constraint=constraint, warn=False)


@torch.library.register_fake("epsa_fused::psa_attention")
def fake_psa_attention(
    feats: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    reversed: bool,
    pooled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _keep_whole(torch.ops.epsa_fused.psa_attention.default)
    _check_fake(
        "psa_attention",
        feats,
        fc1_weight=fc1_weight,
        fc1_bias=fc1_bias,
        fc2_weight=fc2_weight,
        fc2_bias=fc2_bias,
        pooled=pooled,
    )
    n, c, h, w = feats[0].shape
    branches = len(feats)
    out = empty(feats[0], (n, branches * c, h, w), common_layout(feats))
    acc = torch.float64 if feats[0].dtype == torch.float64 else torch.float32
    vector = (n, branches, c)
    return out, feats[0].new_empty(vector, dtype=acc), feats[0].new_empty(vector, dtype=acc)


@torch.library.register_fake("epsa_fused::psa_attention_backward")
def _(
    grad_out: Tensor | None,
    grad_attention: Tensor | None,
    feats: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    pooled: Tensor,
    attention: Tensor,
    reversed: bool,
    output_mask: Sequence[bool],
) -> tuple[Any, ...]:
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    _check_fake(
        "psa_attention_backward",
        feats,
        **dict(zip(names, weights, strict=True)),
        pooled=pooled,
        attention=attention,
        grad_out=grad_out,
        grad_attention=grad_attention,
    )
    layout = common_layout(feats)
    grad_feats = [
        empty(f, f.shape, layout) if wanted else f.new_empty(0)
        for f, wanted in zip(feats, output_mask, strict=False)
    ]
    grad_weights = [
        w.new_empty(w.shape) if wanted and w is not None else fc1_weight.new_empty(0)
        for w, wanted in zip(weights, output_mask[len(feats) :], strict=True)
    ]
    return grad_feats, *grad_weights


def _out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _maps_shape(
    x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int
) -> tuple[int, int, int, int]:
    return (
        x.shape[0],
        weight.shape[0],
        _out_size(x.shape[2], weight.shape[2], stride, padding, dilation),
        _out_size(x.shape[3], weight.shape[3], stride, padding, dilation),
    )


def _check_conv(
    op: str,
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """What the fake kernels rely on. The real kernels check all: csrc/ops/conv_checks.cpp."""
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected 4 dimensions [N, C, H, W]")
    for name, given in (("groups", groups), ("padding", padding), ("dilation", dilation)):
        if len(given) != len(weights):
            raise ValueError(
                f"{op}: {name} has {len(given)} entries, expected {len(weights)}, "
                "one for each of the weights"
            )
    for s, w in enumerate(weights):
        if w.dim() != 4:
            raise ValueError(
                f"{op}: weights[{s}] has shape {list(w.shape)}, expected 4 dimensions "
                "[C, in_channels / groups, kernel_h, kernel_w]"
            )
        if w.device != x.device:
            raise RuntimeError(
                f"{op}: weights[{s}] is on {w.device}, expected {x.device}, the device of x"
            )
        if w.dtype != x.dtype:
            raise TypeError(
                f"{op}: weights[{s}] has dtype {w.dtype}, expected {x.dtype}, the dtype of x"
            )
        if x.shape[1] != w.shape[1] * groups[s]:
            raise ValueError(
                f"{op}: weights[{s}] has shape {list(w.shape)}, expected {x.shape[1]} / "
                f"{groups[s]} channels in its second dimension"
            )


@torch.library.register_fake("epsa_fused::spc_conv")
def fake_spc_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[list[Tensor], Tensor]:
    _keep_whole(torch.ops.epsa_fused.spc_conv.default)
    _check_conv("spc_conv", x, weights, groups, padding, dilation)
    layout = conv_layout(x)
    feats = [
        torch.empty(
            _maps_shape(x, w, stride, p, d), dtype=x.dtype, device=x.device, memory_format=layout
        )
        for w, p, d in zip(weights, padding, dilation, strict=True)
    ]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    pooled = x.new_empty((x.shape[0], len(weights), weights[0].shape[0]), dtype=acc)
    return feats, pooled


def _fake_gradients(
    x: Tensor, weights: Sequence[Tensor], output_mask: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    """Of x and of the weights; an empty tensor where none is wanted."""
    grad_x = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=conv_layout(x))
        if output_mask[0]
        else x.new_empty(0)
    )
    grad_weights = [
        torch.empty_like(w) if wanted else w.new_empty(0)
        for w, wanted in zip(weights, output_mask[1 : 1 + len(weights)], strict=True)
    ]
    return grad_x, grad_weights


@torch.library.register_fake("epsa_fused::spc_conv_backward")
def _(
    grad_feats: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    _check_conv("spc_conv_backward", x, weights, groups, padding, dilation)
    for s, g in enumerate(grad_feats):
        if g.device != x.device:
            raise RuntimeError(
                f"spc_conv_backward: grad_feats[{s}] is on {g.device}, expected {x.device}, "
                "the device of x"
            )
    return _fake_gradients(x, weights, output_mask)


def _fake_output(op: str, module: ModuleArguments) -> Tensor:
    x, weights, groups, stride, padding, dilation = module[:6]
    _check_conv(op, x, weights, groups, padding, dilation)
    n, c, h, w = _maps_shape(x, weights[0], stride, padding[0], dilation[0])
    return empty(x, (n, len(weights) * c, h, w), conv_layout(x))


@torch.library.register_fake("epsa_fused::psa_forward")
def fake_psa_forward(*arguments: Any) -> Tensor:
    _keep_whole(torch.ops.epsa_fused.psa_forward.default)
    # Packed weights may follow the module's arguments.
    return _fake_output("psa_forward", ModuleArguments(*arguments[: len(ModuleArguments._fields)]))


@torch.library.register_fake("epsa_fused::psa_save_output")
def fake_psa_save_output(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _keep_whole(torch.ops.epsa_fused.psa_save_output.default)
    module = ModuleArguments(*arguments)
    out = _fake_output("psa_save_output", module)
    x, weights = module.x, module.weights
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    vector = (x.shape[0], len(weights), weights[0].shape[0])
    return out, x.new_empty(vector, dtype=acc), x.new_empty(vector, dtype=acc)


@torch.library.register_fake("epsa_fused::psa_save_output_backward")
def _(
    grad_out: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    out: Tensor,
    pooled: Tensor,
    attention: Tensor,
    reversed: bool,
    output_mask: Sequence[bool],
) -> tuple[Any, ...]:
    _check_conv("psa_save_output_backward", x, weights, groups, padding, dilation)
    grad_x, grad_weights = _fake_gradients(x, weights, output_mask)
    grad_se = [
        w.new_empty(w.shape) if wanted and w is not None else fc1_weight.new_empty(0)
        for w, wanted in zip(
            (fc1_weight, fc1_bias, fc2_weight, fc2_bias),
            output_mask[len(weights) + 1 :],
            strict=True,
        )
    ]
    return grad_x, grad_weights, *grad_se
