"""fuse(): put fused PSA modules into a model that has others.

What is a PSA module is told by its structure, since the published code is copied rather than
installed and its class lives in any module path. Structure does not say what a forward computes
with it, so each kind that is found is run once, on random weights, and compared.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field

from torch import nn

from ..modules import FusedPSAModule, FusedSplitPSA
from .find import Kind, MisfitError, kind_of
from .trial import CALL_HOOKS, check

__all__ = ["FuseReport", "fuse"]


@dataclass
class FuseReport:
    """What :func:`fuse` did: names of modules, as `model.named_modules()` gives them.

    replaced: what stands in the place of each module that was replaced, and of which class it was.
    left: why each module that looks like a PSA module was left alone.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fuse: {len(self.replaced)} replaced, {len(self.left)} left alone"]
        lines += [f"  {name}: {what}" for name, what in self.replaced.items()]
        lines += [f"  {name}: left alone, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace every PSA module in `model` by a fused one with the same parameters.

    Found are, wherever they stand in the model:

    - :class:`epsa_fused.PSAModule`, the reference;
    - the published code's PSAModule (children conv_1, conv_2, ... and se): these two become
      :class:`epsa_fused.FusedPSAModule`;
    - External-Attention-pytorch's PSA (children convs and se_blocks: each branch takes its own
      part of the input and has its own SE): becomes :class:`epsa_fused.FusedSplitPSA`.

    A class's module path and name do not matter. Each kind that is found is run on a small random
    input, with random weights of its own on the CPU, and must give what the fused module gives, in
    one of the two branch orders, in training and in evaluation. What does not is left alone.

    The convolutions and SE layers are taken over as they are, so parameters, dtype, device,
    training flags, `requires_grad`, state_dict keys and optimizers stay; hooks on the PSA module
    and on its convolutions stay too.

    Args:
        model: any module. In DistributedDataParallel it can only be fused with `inplace`, or
            before it is wrapped.
        inplace: change `model` itself. Otherwise it stays as it is, and the result is another
            module tree with the SAME parameters and buffers: training one trains the other.
            `copy.deepcopy(fuse(model))` is independent.

    Returns:
        The fused model. Its attribute `fuse_report` (a :class:`FuseReport`) names what was
        replaced and what was left alone, with the reason.

    Warns (UserWarning) where there is nothing to fuse, where a module that looks like a PSA module
    is left alone, and where one writes over its input, which the fused one does not.

    Raises:
        TypeError: `model` is no module.
        ValueError: `inplace`, and `model` is itself the module to be replaced.
        RuntimeError: hooks that cannot be kept, on the SE layers (a fused call leaves them out) or
            around the PSA module's state_dict; without `inplace` DistributedDataParallel, and what
            copy.deepcopy cannot copy. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected a torch.nn.Module, got {type(model).__name__}")
    if not inplace:
        model = _same_tensors_in_another_tree(model)

    report, fused, overwriting = FuseReport(), {}, []
    checks: dict[tuple, tuple[str, bool]] = {}
    already = 0
    for name, module in model.named_modules(remove_duplicate=False):
        already += isinstance(module, FusedPSAModule | FusedSplitPSA)
        kind = kind_of(module)
        if kind is None:
            continue
        try:
            if module not in fused:
                order, overwrites = check(name, module, kind, checks)
                fused[module] = _build(module, kind, order)
                overwriting += [name] if overwrites else []
            new, old = fused[module], type(module)
            report.replaced[name] = (
                f"{type(new).__name__}(branch_order={new.branch_order!r}) "
                f"for {old.__module__}.{old.__qualname__}"
            )
        except MisfitError as why:
            report.left[name] = str(why)
    if inplace and model in fused:
        raise ValueError(
            "fuse: the model is itself a PSA module, which has no place to put another into; "
            "use the result of fuse(model)"
        )

    for old, new in fused.items():
        _hand_on(old, new)
    for module in list(model.modules()):
        for child, old in module._modules.items():
            if old in fused:
                module._modules[child] = fused[old]
    model = fused.get(model, model)
    model.fuse_report = report
    _warn(model, report, already, overwriting)
    return model


def _same_tensors_in_another_tree(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise RuntimeError(
                f"fuse: {name or 'the model'} is a DistributedDataParallel, whose reducer cannot "
                "be shared with a second model; use fuse(model, inplace=True), or fuse the model "
                "before it is wrapped"
            )
    tensors = [*model.parameters(), *model.buffers()]
    try:
        return copy.deepcopy(model, {id(t): t for t in tensors})
    except Exception as error:
        raise RuntimeError(
            f"fuse: {type(model).__name__} cannot be copied, use fuse(model, inplace=True). Where "
            "it keeps a pruned or normalised weight or a result of its own, autograd has a part "
            f"in that: {error}"
        ) from error


def _warn(model: nn.Module, report: FuseReport, already: int, overwriting: list[str]) -> None:
    def warn(message: str) -> None:
        warnings.warn(f"fuse: {message}", UserWarning, stacklevel=4)

    if not report.replaced:
        fused = f" besides {already} that are fused already" if already else ""
        warn(
            f"nothing to fuse, {type(model).__name__} has no PSA module that can be{fused}, "
            "and is unchanged"
        )
    if report.left:
        why = "; ".join(f"{name} ({why})" for name, why in report.left.items())
        warn(f"left alone {len(report.left)} that look like PSA modules: {why}")
    if overwriting:
        warn(
            f"{', '.join(overwriting)} wrote over its input, which the fused module leaves as it "
            "is: check what else reads that input, such as a shortcut around it"
        )


def _build(module: nn.Module, kind: Kind, order: str) -> nn.Module:
    new = kind.build(module, order)
    lost = _names_of_tensors(module) - _names_of_tensors(new)
    if lost:
        raise MisfitError(
            f"it has parameters or buffers that the fused one has not: {', '.join(sorted(lost))}"
        )
    new.training = module.training
    return new


def _names_of_tensors(module: nn.Module) -> set[str]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {name for name, _ in (*parameters, *module.named_buffers(remove_duplicate=False))}


def _hand_on(old: nn.Module, new: nn.Module) -> None:
    """Hooks: the very containers, so that the handles of hooks keep working."""
    for hooks in (*CALL_HOOKS, "_is_full_backward_hook"):
        new.__dict__[hooks] = old.__dict__[hooks]
