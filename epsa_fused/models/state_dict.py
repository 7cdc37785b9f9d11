"""What EPSANet.load_state_dict checks before it loads anything."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

# An error message shows at most this many keys of each kind.
_SHOWN_KEYS = 4


def without_module_prefix(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    if not state_dict or not all(key.startswith("module.") for key in state_dict):
        return state_dict
    stripped: Any = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):  # the versions of the layers
        stripped._metadata = OrderedDict(state_dict._metadata)
    consume_prefix_in_state_dict_if_present(stripped, "module.")
    return cast(Mapping[str, Any], stripped)


def check_state_dict(
    own: Mapping[str, Any], state_dict: Mapping[str, Any], strict: bool, assign: bool
) -> None:
    """Raise RuntimeError where nn.Module.load_state_dict would fail halfway.

    `own` is the state_dict of the module that would load the other.
    """

    def shape(value: Any) -> str:
        if not isinstance(value, Tensor) or value.is_nested:  # a nested one has no shape
            return type(value).__name__
        return str(list(value.shape))

    # BatchNorm adds num_batches_tracked to checkpoints older than that buffer. torchvision's
    # FrozenBatchNorm2d has running_mean and drops num_batches_tracked.
    count, mean = "num_batches_tracked", "running_mean"
    missing = [k for k in own if k not in state_dict and not k.endswith(count)]
    unexpected = [k for k in state_dict if k not in own and k.removesuffix(count) + mean not in own]
    both = [k for k in own if k in state_dict]
    other = [k for k in both if shape(own[k]) != shape(state_dict[k])]
    kinds = {k: _why_not_copied(state_dict[k], own[k], assign) for k in both if k not in other}
    problems = [
        _shortened(
            "of another shape",
            [f"{k} {shape(state_dict[k])}, expected {shape(own[k])}" for k in other],
        ),
        _shortened("of another kind", [f"{k} {why}" for k, why in kinds.items() if why]),
    ]
    if strict:
        problems += [
            _shortened("missing", [f"{k} {shape(own[k])}" for k in missing]),
            _shortened("unexpected", [f"{k} {shape(state_dict[k])}" for k in unexpected]),
        ]
    if not any(problems):
        return
    hint = ""
    if isinstance(state_dict.get("state_dict"), Mapping):
        hint = '. This is a training checkpoint: load its entry "state_dict"'
    raise RuntimeError(
        "EPSANet: the state_dict does not fit this architecture, nothing was loaded. "
        + "; ".join(filter(None, problems))
        + hint
    )


def _why_not_copied(value: Tensor, own: Tensor, assign: bool) -> str | None:
    """What keeps `value` from being loaded into `own`, a tensor of the same shape, or None."""
    if value.is_meta and not own.is_meta and not assign:
        return "without data (on meta)"
    if value.is_quantized != own.is_quantized or value.layout != own.layout:
        kind = "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
        return f"{kind}, expected {own.dtype} in {own.layout}"
    for kind in ("is_floating_point", "is_complex"):
        if getattr(value, kind)() != getattr(own, kind)():
            return f"{value.dtype}, expected {own.dtype}"
    if not assign:
        try:
            torch.empty_like(own).copy_(value)
        except Exception as error:  # a subclass of Tensor may raise anything
            return f"that cannot be copied ({type(value).__name__}: {error})"
    return None


def _shortened(kind: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return f"{len(keys)} {kind}: {', '.join(keys[:_SHOWN_KEYS])}{more}"
