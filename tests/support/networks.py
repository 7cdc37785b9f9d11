"""Small EPSANets, and what tests ask of networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from epsa_fused import EPSANet, PSAModule

NARROW = {"planes": (16, 16, 16, 32), "conv_groups": (1, 2, 2, 4), "reduction": 4}


def tiny(**options) -> EPSANet:
    """One narrow block a stage."""
    options = {"num_classes": 10, "planes": (64, 64, 64, 128), "expansion": 2} | options
    return EPSANet((1, 1, 1, 1), **options)


def narrow(layers: tuple[int, ...] = (1, 2, 1, 2), **options) -> EPSANet:
    """Narrower than the published groups and reduction allow."""
    return EPSANet(layers, **{"num_classes": 10, **NARROW, **options})


def on_meta(build: Callable[..., nn.Module], **options) -> nn.Module:
    with torch.device("meta"):
        return build(**options)


def psa_modules(model: nn.Module) -> list[PSAModule]:
    return [m for m in model.modules() if isinstance(m, PSAModule)]


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
