"""The fused modules that fuse() builds over the layers that it found."""

from __future__ import annotations

from typing import TypeAlias, cast

import torch
from torch import nn

from ..modules import FusedPSAModule, FusedSplitPSA
from ..modules.adopted import FusedAdoptedPSA, PSALayers
from ..modules.layers import why_se_called
from ..modules.split import why_not_split_psa

Fused: TypeAlias = FusedPSAModule | FusedSplitPSA


def build(module: nn.Module, layers: PSALayers, branch_order: str) -> Fused:
    """The fused module over these layers of `module`, which stays as it is.

    Layers by the names of a class of this package give that class.
    """
    # Their classes give an SE network the whole map, also one that is put in its place later.
    whole = all(se.call in ("whole", "layers") and not se.sigmoid for se in layers.networks)
    if whole and _has_names_of_psa_module(module, layers):
        return _psa_module(module, layers, branch_order)
    if whole and _has_names_of_split_psa(module, layers):
        convs, se_blocks = (cast(nn.ModuleList, module._modules[n]) for n in ("convs", "se_blocks"))
        split = FusedSplitPSA(convs, se_blocks, branch_order=branch_order)
        split.convs, split.se_blocks = convs, se_blocks
        return split
    return FusedAdoptedPSA(module, layers, branch_order=branch_order)


def _has_names_of_psa_module(module: nn.Module, layers: PSALayers) -> bool:
    se = module._modules.get("se")
    return (
        not layers.splits_input
        and layers.branches == tuple(f"conv_{i + 1}" for i in range(len(layers.branches)))
        and all(isinstance(module._modules[name], nn.Conv2d) for name in layers.branches)
        and [network[:3] for network in layers.networks] == [("se.fc1", "se.fc2", "se")]
        and why_se_called("se", se, type(se)) is None  # type: ignore[arg-type]  # it is there
    )


def _psa_module(module: nn.Module, layers: PSALayers, branch_order: str) -> FusedPSAModule:
    convs = [cast(nn.Conv2d, module._modules[name]) for name in layers.branches]
    se = cast(nn.Module, module._modules["se"])
    ones = (1,) * len(convs)
    with torch.device("meta"):  # its layers are replaced below
        new = FusedPSAModule(
            1, len(convs), ones, conv_groups=ones, reduction=1, branch_order=branch_order
        )
    new.split_channel = convs[0].out_channels
    new._modules.update(zip(layers.branches, convs, strict=True))
    new.se._modules.update({name: se._modules[name] for name in new.se._modules})
    # An optimizer's state goes by the order of the parameters.
    for own, other in ((new, module), (new.se, se)):
        own._modules = {n: own._modules[n] for n in other._modules if n in own._modules}
    new.se.training = se.training
    return new


def _has_names_of_split_psa(module: nn.Module, layers: PSALayers) -> bool:
    convs, se_blocks = module._modules.get("convs"), module._modules.get("se_blocks")
    count = len(layers.branches)
    return (
        layers.splits_input
        and type(convs) is nn.ModuleList
        and type(se_blocks) is nn.ModuleList
        and layers.branches == tuple(f"convs.{i}" for i in range(count))
        and [n.network for n in layers.networks] == [f"se_blocks.{i}" for i in range(count)]
        and why_not_split_psa(convs, se_blocks) is None
    )
