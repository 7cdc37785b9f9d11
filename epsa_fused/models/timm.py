"""EPSANet in timm's model registry: `epsa_fused.register_timm()`.

Importing epsa_fused does not register. The import of timm takes seconds, and the result must not
depend on which of the two packages was imported first.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import epsanet  # noqa: F401  fills the registry
from .registry import FIGURES, MODELS

# The preprocessing is that of ResNets on ImageNet. The URL is empty: no published weights exist.
# Users load a file by create_model(name, checkpoint_path=...) or pretrained_cfg_overlay.
default_cfgs = {
    name: {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "conv1",
        "classifier": "fc",
    }
    for name in FIGURES
}


@functools.cache  # timm warns when a name is registered twice
def register_timm() -> None:
    """Make every published model known to timm: `timm.create_model("epsanet50")`.

    The models take timm's usual arguments: num_classes, in_chans, global_pool, output_stride,
    drop_rate, drop_path_rate, act_layer and norm_layer (also by timm's names), features_only,
    feature_cls, out_indices and checkpoint_path. They also take `fused`, `planes` and the other
    arguments of :class:`epsa_fused.EPSANet`. Feature map 0 is the stem's (stride 2), as in timm's
    ResNets; maps 1 to 4 are C2 to C5. An argument that EPSANet lacks raises TypeError.
    `pretrained=True` without a source of weights raises timm's RuntimeError.

    Call it once, before or after timm is imported. Further calls do nothing.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    from timm.models import register_model

    for name in FIGURES:
        register_model(_entrypoint(name))


def _named(argument: str, name: str, by_name: Callable[[str], Any]) -> Any:
    """timm's layer of that name; ValueError if there is none."""
    try:
        found = by_name(name)
    except (KeyError, AssertionError):
        found = None
    if found is None:
        raise ValueError(f"{argument}: expected a layer or timm's name of one, got {name!r}")
    return found


def _entrypoint(name: str) -> Any:
    from timm.layers import get_act_layer, get_norm_layer
    from timm.models import build_model_with_cfg

    build = MODELS[name]
    layers = {"act_layer": get_act_layer, "norm_layer": get_norm_layer}

    def create(
        pretrained: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        for argument, by_name in layers.items():
            if isinstance(kwargs.get(argument), str):
                kwargs[argument] = _named(argument, kwargs[argument], by_name)
        with contextlib.nullcontext() if device is None else torch.device(device):
            model: nn.Module = build_model_with_cfg(build, name, pretrained, **kwargs)
        return model.to(dtype=dtype)

    # timm registers a function by its name, and looks for default_cfgs in the function's module.
    create.__name__, create.__doc__ = name, build.__doc__
    return create
