"""EPSANet in timm's model registry: `epsa_fused.register_timm()`.

A call and not a side effect of importing epsa_fused: importing timm takes seconds, and whether
`import epsa_fused` registers should not depend on which of the two was imported first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from . import epsanet

_BUILDERS = (
    epsanet.epsanet50,
    epsanet.epsanet101,
    epsanet.epsanet50_large,
    epsanet.epsanet101_large,
)

# As ResNets are evaluated on ImageNet.
# No weights: the published ones are not on a server that timm loads from. Those in a file load by
# create_model(name, checkpoint_path=...) or pretrained_cfg_overlay={"file": ...}.
default_cfgs = {
    builder.__name__: {
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
    for builder in _BUILDERS
}


@functools.cache  # timm warns of a name that is registered twice
def register_timm() -> None:
    """Make timm.create_model("epsanet50"), epsanet101, epsanet50_large, epsanet101_large work.

    They take what timm's other models do: num_classes, in_chans, drop_rate, features_only and
    out_indices, checkpoint_path; and `fused`, as :class:`epsa_fused.EPSANet` does. Of the feature
    maps, index 0 is the stem's (stride 2), as in timm's ResNets, and 1 to 4 are C2 to C5.
    Arguments that EPSANet lacks raise TypeError; `pretrained=True` without a source of weights
    raises timm's RuntimeError.

    Call it once, before or after importing timm; further calls do nothing.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    from timm.models import register_model

    for builder in _BUILDERS:
        register_model(_entrypoint(builder))


def _entrypoint(builder: Callable[..., epsanet.EPSANet]) -> Callable[..., nn.Module]:
    from timm.models import build_model_with_cfg

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(builder, builder.__name__, pretrained, **kwargs)

    # timm registers a function by its name and finds default_cfgs in its module
    create.__name__, create.__doc__ = builder.__name__, builder.__doc__
    return create
