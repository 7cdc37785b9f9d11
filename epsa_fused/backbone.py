"""load_backbone: a start from the weights of another network, as far as they fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ._checks import check_module, given

# A report names at most this many tensors of each kind; its attributes hold all.
_SHOWN = 4


@dataclass
class BackboneReport:
    """What :func:`load_backbone` took and left.

    Attributes:
        taken: the tensors of the model that now hold the given values.
        kept: those that stay as they were: the state dict has none of that name, or, for a name
            with both shapes, one of another shape.
        unused: the tensors of the state dict that the model has no place for.
        taken_values, values: how many numbers were taken, and how many the model has.
    """

    taken: list[str] = field(default_factory=list)
    kept: dict[str, tuple[list[int], list[int]] | None] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    taken_values: int = 0
    values: int = 0

    def __str__(self) -> str:
        total = len(self.taken) + len(self.kept)
        lines = [
            f"load_backbone: {len(self.taken)} of {total} tensors taken, "
            f"{self.taken_values / 1e6:.1f} of {self.values / 1e6:.1f} M values"
        ]
        differing = [f"{n} {s[0]}, given {s[1]}" for n, s in self.kept.items() if s is not None]
        missing = [name for name, shapes in self.kept.items() if shapes is None]
        for what, names in (
            ("of another shape", differing),
            ("not given", missing),
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
    how much that helps. A prefix `module.` of DataParallel is left out.

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
        if not isinstance(value, Tensor):
            raise TypeError(
                f"load_backbone: state_dict[{name!r}]: expected a Tensor, got {given(value)}"
            )
        if value.is_meta or value.layout != torch.strided or value.is_quantized:
            raise TypeError(
                f"load_backbone: state_dict[{name!r}]: expected a dense tensor with data, got "
                f"{'no data' if value.is_meta else f'{value.dtype}, {value.layout}'}"
            )
    consume_prefix_in_state_dict_if_present(offered, "module.")
    own, report, fitting = model.state_dict(), BackboneReport(), {}
    for name, value in own.items():
        if not isinstance(value, Tensor):  # a state of its own, of get_extra_state
            continue
        report.values += value.numel()
        other = offered.get(name)
        if other is None:
            report.kept[name] = None
        elif other.shape != value.shape:
            report.kept[name] = list(value.shape), list(other.shape)
        else:
            report.taken.append(name)
            report.taken_values += value.numel()
            fitting[name] = other
    report.unused = [name for name in offered if name not in own]
    if not fitting:
        raise ValueError(
            "load_backbone: state_dict: expected some tensor with the name and shape of one of the "
            f"model's, such as {_example(own)}, got {_example(offered)}"
        )
    model.load_state_dict(own | fitting)
    return report


def _example(tensors: Mapping[str, object]) -> str:
    named = [f"{n} {list(v.shape)}" for n, v in tensors.items() if isinstance(v, Tensor)]
    return named[0] if named else "none"
