"""load_backbone: a start from the weights of another network, as far as they fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parameter import is_lazy

from ._checks import check_module, given

# A report names at most this many tensors of each kind; its attributes hold all.
_SHOWN = 4
_NOT_GIVEN = "not given"


@dataclass
class BackboneReport:
    """What :func:`load_backbone` took and left.

    Attributes:
        taken: the tensors of the model that now hold the given values.
        kept: those that stay as they were, with the reason.
        unused: the tensors of the state dict that the model has no place for.
        taken_values, values: how many numbers were taken, and how many the model has.
    """

    taken: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    taken_values: int = 0
    values: int = 0

    def __str__(self) -> str:
        total = len(self.taken) + len(self.kept)
        lines = [
            f"load_backbone: {len(self.taken)} of {total} tensors taken, "
            f"{self.taken_values / 1e6:.1f} of {self.values / 1e6:.1f} M values"
        ]
        missing = [name for name, why in self.kept.items() if why == _NOT_GIVEN]
        differing = [f"{name} {why}" for name, why in self.kept.items() if why != _NOT_GIVEN]
        for what, names in (
            ("not fitting", differing),
            (_NOT_GIVEN, missing),
            ("given, but not in the model", self.unused),
        ):
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                lines.append(f"  {what}: {', '.join(names[:_SHOWN])}{more}")
        return "\n".join(lines)


def load_backbone(model: nn.Module, state_dict: Mapping[str, Tensor]) -> BackboneReport:
    """Copy the tensors of another network that have the name and shape of one of the model's.

    EPSANet is a ResNet whose 3x3 convolutions are PSA modules. `epsanet50` takes 304 of its 432
    tensors from a ResNet-50 of torchvision or timm, 14.3 of 22.6 M values; `epsanet50_large` takes
    as many from a wide ResNet-50. The PSA modules keep their random start. No published result says
    how much that helps. Where no name fits, a prefix `module.` of DataParallel is left out.

    Args:
        model: any model; it is changed in place, dtypes and devices stay.
        state_dict: such as `torchvision.models.resnet50(weights="DEFAULT").state_dict()`.

    Returns:
        A report; printing it tells what was taken and what was left.

    Raises:
        TypeError: `model` is no module, or `state_dict` no mapping of names to tensors.
        ValueError: nothing fits. The model is then as it was.
    """
    check_module("load_backbone: model", model)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"load_backbone: state_dict: expected a mapping, got {given(state_dict)}")
    offered = dict(state_dict)
    for name, value in offered.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(
                "load_backbone: state_dict: expected Tensors by their names, got "
                f"{given(name)}: {given(value)}"
            )
        if value.is_meta or value.layout != torch.strided or value.is_quantized:
            raise TypeError(
                f"load_backbone: state_dict[{name!r}]: expected a dense tensor with data, got "
                f"{'no data' if value.is_meta else f'{value.dtype}, {value.layout}'}"
            )
    own = {name: v for name, v in model.state_dict().items() if isinstance(v, Tensor)}
    for name, value in own.items():
        if value.is_meta or is_lazy(value):
            raise ValueError(
                f"load_backbone: model: expected tensors with data, got {name} without"
            )
    if not own.keys() & offered.keys():
        consume_prefix_in_state_dict_if_present(offered, "module.")
    report, fitting, taken = BackboneReport(), {}, set()
    for name, value in own.items():
        report.values += value.numel()
        why = _why_not_taken(value, offered.get(name))
        if why is not None:
            report.kept[name] = why
        else:
            report.taken.append(name)
            report.taken_values += value.numel()
            fitting[name] = offered[name]
            taken.add(value.data_ptr())
    for name in report.kept:
        if own[name].numel() and own[name].data_ptr() in taken:
            report.kept[name] = "is one with a tensor that was taken"
    report.unused = [name for name in offered if name not in own]
    if not fitting:
        raise ValueError(
            "load_backbone: state_dict: expected some tensor with the name and shape of one of the "
            f"model's, such as {_example(own)}, got {_example(offered)}"
        )
    model.load_state_dict(model.state_dict() | fitting)
    return report


def _why_not_taken(own: Tensor, other: Tensor | None) -> str | None:
    if other is None:
        return _NOT_GIVEN
    if other.shape != own.shape:
        return f"{list(own.shape)}, given {list(other.shape)}"
    kinds = [(t.is_floating_point(), t.is_complex()) for t in (own, other)]
    if kinds[0] != kinds[1]:  # a quantised weight has its scale elsewhere
        return f"{own.dtype}, given {other.dtype}"
    return None


def _example(tensors: Mapping[str, object]) -> str:
    named = [f"{n} {list(v.shape)}" for n, v in tensors.items() if isinstance(v, Tensor)]
    return named[0] if named else "none"
