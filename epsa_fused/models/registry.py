"""The models that have a name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .epsanet import epsanet50, epsanet50_large, epsanet101, epsanet101_large
from .small import small_epsanet, small_senet

MODELS: dict[str, Callable[..., nn.Module]] = {
    build.__name__: build
    for build in (
        epsanet50,
        epsanet50_large,
        epsanet101,
        epsanet101_large,
        small_epsanet,
        small_senet,
    )
}
