"""The fused operators: loading, the public function, and what torch.compile needs to know.

The kernels and their autograd are C++ (csrc/); the schemas stand in csrc/autograd/attention.cpp.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .reference import MAX_BRANCHES, MIN_BRANCHES, is_reversed


def _load_library() -> None:
    """Load the operators; ImportError, saying what to do, where that cannot work."""
    build = "build it with `pip install --no-build-isolation .`"
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(f"epsa_fused's extension is not built: {build} ({error})") from error
    built_with, running = _C.build_info()["torch"], torch.__version__
    # torch keeps its C++ interface stable within a minor version only
    if built_with.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"epsa_fused was built with torch {built_with}, but torch {running} is running: "
            + build
        )
    torch.ops.load_library(Path(__file__).parent / "_ops.so")


_load_library()


def psa_attention(
    feats: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    branch_order: str = "reversed",
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention step of PSA as one fused operator (EPSANet, arXiv 2105.14447, eq. 4 to 8).

    Each branch's maps are pooled, an SE MLP weighs its channels, a softmax across the branches
    recalibrates the weights, and each map is multiplied by its own::

        p = mean(F_s over H, W)                                   [N, S, C]
        z = sigmoid(W2 relu(W1 p + b1) + b2)                      [N, S, C]
        a = softmax(z over S)                                     [N, S, C]
        out[:, slot(s)*C : (slot(s)+1)*C] = F_s * a_s             [N, S*C, H, W]

    Args:
        feats: the S branches' maps, 2 to 8 tensors [N, C, H, W] of one shape, device and dtype
            (float32, float64, bfloat16, float16). Contiguous and channels_last maps are read in
            place, whatever their batch stride (contiguous) or pixel stride (channels_last), so
            chunks of one tensor are not copied; any other strides cost one copy.
        fc1_weight: [r, C] with r hidden units, or [S, r, C] for SE weights of each branch's own.
            1x1 convolution weights (two trailing dimensions of 1) are taken as they are.
        fc1_bias: [r] or [S, r], or None.
        fc2_weight: [C, r] or [S, C, r]; trailing dimensions of 1 as above.
        fc2_bias: [C] or [S, C], or None.
        branch_order: "reversed" puts branch s into slot S-1-s, as the published code and every
            weight trained with it do; "forward" into slot s, as in the paper's equation 8.
        return_attention: also return the attention a.

    Returns:
        out [N, S*C, H, W], in the features' dtype and (in a mix, the majority's) memory layout.
        With `return_attention`, also a [N, S, C], indexed by branch (not by slot), in the
        accumulation type: float64 for float64 features, else float32. Both are differentiable.

    The SE weights have the features' dtype, or float32 beside half-precision features, all four
    alike. Sums, SE and softmax are computed in the accumulation type and `out` is rounded once.
    Autocast casts nothing here: features and weights are taken as they are. (Eager PyTorch under
    CUDA autocast would return float32, because its softmax does.) Results are bitwise the same
    from run to run and for any number of threads.

    Raises:
        ValueError: shapes or counts that do not fit, an unknown `branch_order`.
        TypeError: dtypes that are not supported or do not fit.
        RuntimeError: tensors on different devices.
    """
    if isinstance(feats, Tensor):
        raise TypeError(
            "psa_attention: feats is a Tensor, expected a sequence of "
            f"{MIN_BRANCHES} to {MAX_BRANCHES} maps (try feats.chunk(branches, dim=1))"
        )
    out, _, attention = torch.ops.epsa_fused.psa_attention.default(
        list(feats), fc1_weight, fc1_bias, fc2_weight, fc2_bias, is_reversed(branch_order)
    )
    return (out, attention) if return_attention else out


# ---- shapes without data (torch.compile, torch.export, meta tensors) ----


def _is_native(t: Tensor, memory_format: torch.memory_format) -> bool:
    """epsa::is_native of csrc/ops/attention_checks.cpp."""
    _, c, h, w = t.shape
    _, stride_c, stride_h, stride_w = t.stride()
    if memory_format == torch.contiguous_format:
        return (
            (w == 1 or stride_w == 1)
            and (h == 1 or stride_h == w)
            and (c == 1 or stride_c == h * w)
        )
    return (c == 1 or stride_c == 1) and (h == 1 or w == 1 or stride_h == w * stride_w)


def _common_layout(feats: Sequence[Tensor]) -> torch.memory_format:
    """epsa::common_layout of csrc/ops/attention_checks.cpp."""
    contiguous = channels_last = 0
    for f in feats:
        if _is_native(f, torch.contiguous_format):
            contiguous += 1
        elif _is_native(f, torch.channels_last):
            channels_last += 1
    return torch.channels_last if channels_last > contiguous else torch.contiguous_format


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


def _empty(like: Tensor, shape, memory_format: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _keep_whole(op: torch._ops.OpOverload) -> None:
    """Tell Inductor, if it is running, to call `op` rather than to ask for its decomposition.

    The table that decomposition.py fills for ONNX is also where Inductor looks for operators that
    nobody lowered; finding one there is an error wherever the variable CI is set. Inductor takes
    seconds to import, hence not before it is used, and no graph reaches it without a fake kernel.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and op not in lowering.lowerings:
        constraint = lowering.constrain_to_fake_tensors  # the default of custom operators
        lowering.make_fallback(op, layout_constraint=constraint, warn=False)


@torch.library.register_fake("epsa_fused::psa_attention")
def fake_psa_attention(feats, fc1_weight, fc1_bias, fc2_weight, fc2_bias, reversed, pooled=None):
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
    out = _empty(feats[0], (n, branches * c, h, w), _common_layout(feats))
    acc = torch.float64 if feats[0].dtype == torch.float64 else torch.float32
    vector = (n, branches, c)
    return out, feats[0].new_empty(vector, dtype=acc), feats[0].new_empty(vector, dtype=acc)


@torch.library.register_fake("epsa_fused::psa_attention_backward")
def _(
    grad_out,
    grad_attention,
    feats,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    pooled,
    attention,
    reversed,
    output_mask,
):
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
    layout = _common_layout(feats)
    grad_feats = [
        _empty(f, f.shape, layout) if wanted else f.new_empty(0)
        for f, wanted in zip(feats, output_mask, strict=False)
    ]
    grad_weights = [
        w.new_empty(w.shape) if wanted and w is not None else fc1_weight.new_empty(0)
        for w, wanted in zip(weights, output_mask[len(feats) :], strict=True)
    ]
    return grad_feats, *grad_weights


# ---- floating-point operations, for torch.utils.flop_counter.FlopCounterMode ----
# As torch counts: multiply-adds of the SE's matrices, two operations each. The elementwise
# work (pooling, reweighting) is not counted, as torch counts none of its own.


def _se_flops(feats_shape, fc1_shape) -> int:
    n, c = feats_shape[0][:2]
    hidden = fc1_shape[1] if len(fc1_shape) in (3, 5) else fc1_shape[0]
    return 2 * n * len(feats_shape) * 2 * c * hidden


@register_flop_formula(torch.ops.epsa_fused.psa_attention)
def _(feats_shape, fc1_shape, *args, **kwargs) -> int:
    return _se_flops(feats_shape, fc1_shape)


@register_flop_formula(torch.ops.epsa_fused.psa_attention_backward)
def _(grad_out_shape, grad_attention_shape, feats_shape, fc1_shape, *args, **kwargs) -> int:
    return 2 * _se_flops(feats_shape, fc1_shape)  # gradients of inputs and of weights
