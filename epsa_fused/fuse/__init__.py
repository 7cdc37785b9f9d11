"""fuse(): replace the PSA modules of a model by fused ones.

The published code is copied, not installed, and most copies are changed. So find.py looks for
modules with the layers of PSA, by whatever names. Layers do not say what forward computes, so
trial.py runs each kind on random weights and compares.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from .._checks import check_flag, check_module, first_line
from ..modules import FusedPSAModule, FusedSplitPSA
from ..modules.adopted import PSALayers
from ..modules.layers import existing, why_se_called
from ..reference import BRANCH_ORDERS, PSAModule, SEWeight
from .back import unfuse
from .build import build
from .find import Candidate, MisfitError, candidates, why_not_replaced
from .held import Held
from .hooks import hand_on, refuse_hooks
from .kinds import key_of
from .lost import why_lost, why_methods_lost
from .tree import replace, same_tensors_in_another_tree, why_not_compiled
from .trial import Verdict, looks_like_psa, run

__all__ = ["FuseReport", "fuse", "unfuse"]

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass
class FuseReport:
    """What :func:`fuse` did, by the names of `model.named_modules()`.

    Attributes:
        replaced: for each replaced module, what replaced it and its former class.
        left: for each module that looks like a PSA module and was left alone, the reason.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fuse: {len(self.replaced)} replaced, {len(self.left)} left alone"]
        lines += [f"  {name}: {what}" for name, what in self.replaced.items()]
        lines += [f"  {name}: left alone, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def fuse(model: _Model, *, inplace: bool = False) -> _Model:
    """Replace every PSA module in `model` by a fused one with the same parameters.

    A PSA module is found by its layers, at any place in the model: 2 to 8 branches that make maps
    of C channels, and an SE network from C channels to r and back, shared or one for each branch.
    Names and classes do not matter. Layers by the names of the published PSAModule give a
    :class:`epsa_fused.FusedPSAModule`, those by the names of :class:`epsa_fused.SplitPSA` a
    :class:`epsa_fused.FusedSplitPSA`, and others a
    :class:`epsa_fused.modules.FusedAdoptedPSA`, which keeps their names.

    A branch may be more than a convolution, such as one with a BatchNorm. It is called then, in
    training and in evaluation, and the attention step is fused. The report says so.

    Each kind is run on small random inputs, with random weights, on the CPU, in training and in
    evaluation. Its outputs and gradients must equal those of the fused module, in one of the two
    branch orders. Its outputs must do so in the module's dtype, too. Otherwise it is left alone,
    and the report has the reason. Hooks on all modules do not see these runs.

    Convolutions and SE layers stay the same objects. So parameters, dtype, device, training flags,
    `requires_grad`, `state_dict` keys and optimizers stay. Hooks on the PSA module and on its
    convolutions stay too. Plain lists, dicts and attributes that hold it get the fused one.

    Args:
        model: any module. A model in DistributedDataParallel needs `inplace`, or to be fused
            before it is wrapped.
        inplace: whether to change `model` itself. Otherwise it stays unchanged, and the result is
            another module tree with the SAME parameters and buffers: training one trains the
            other. `copy.deepcopy(fuse(model))` is independent.

    Returns:
        The fused model, with a :class:`FuseReport` as its attribute `fuse_report`. If `model` is
        itself a PSA module, the result is the fused module. :func:`unfuse` is the inverse.

    Warns:
        UserWarning: there is nothing to fuse; or a module that looks like a PSA module is left
            alone; or one overwrites its input, which the fused one does not; or a module's
            `compile()` was called, and the result needs another call of it.

    Raises:
        TypeError: `model` is no module.
        ValueError: `inplace`, and `model` itself is to be replaced.
        RuntimeError: hooks cannot be kept: on the SE layers, which the fused module does not call,
            or around the PSA module's `state_dict`. Without `inplace` also for
            DistributedDataParallel, and if it cannot be copied. The model is unchanged then.
    """
    check_module("fuse: model", model)
    check_flag("inplace", inplace)
    before = dict(model.named_modules())
    why_stays = Held(model, closed=candidates(model)).why_stays
    if not inplace:
        model = same_tensors_in_another_tree(model, "fuse")
    plan = _planned(model, why_stays)
    model = replace(model, plan.fused, "fuse", inplace)
    for old, new in plan.fused.items():
        hand_on(old, new)
    model.fuse_report = plan.report  # type: ignore[assignment]  # nn.Module declares only tensors
    _warn(model, plan, why_not_compiled(model, before))
    return model


@dataclass
class _Plan:
    """What fuse() will do, found without a change of the model."""

    report: FuseReport = field(default_factory=FuseReport)
    fused: dict[nn.Module, FusedPSAModule | FusedSplitPSA] = field(default_factory=dict)
    overwriting: list[str] = field(default_factory=list)  # modules that overwrite their input
    already: int = 0  # modules that are fused already


def _planned(model: nn.Module, why_stays: Mapping[str, str]) -> _Plan:
    plan = _Plan()
    found = candidates(model)
    verdicts: dict[tuple[Any, ...], Verdict | MisfitError] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        plan.already += isinstance(module, FusedPSAModule | FusedSplitPSA)
        candidate = found.get(module)
        if candidate is None:
            continue
        try:
            if module not in plan.fused:
                verdict = _verdict(module, candidate, verdicts)
                if name in why_stays:
                    raise MisfitError(why_stays[name])
                plan.fused[module] = _built(name, module, verdict)
                plan.overwriting += [name] if verdict.overwrites_input else []
            new, old = plan.fused[module], type(module)
            plan.report.replaced[name] = (
                f"{type(new).__name__}(branch_order={new.branch_order!r}) "
                f"for {old.__module__}.{old.__qualname__}" + _in_part(new)
            )
        except MisfitError as why:
            if candidate.known or why.named:
                plan.report.left[name] = str(why)
    return plan


def _verdict(
    module: nn.Module, candidate: Candidate, verdicts: dict[tuple[Any, ...], Verdict | MisfitError]
) -> Verdict:
    """What the module computes, by one trial for each kind."""
    layers = candidate.layers
    if candidate.why_not is not None and candidate.known:
        raise MisfitError(candidate.why_not)
    if (
        candidate.why_not is None
        and type(module) is PSAModule
        and "attention" not in module.__dict__
        and why_se_called("se", module.se, SEWeight) is None
    ):
        return Verdict(layers, module.branch_order)
    try:
        key = (candidate.why_not, *key_of(module, layers))
        if key not in verdicts:
            try:
                if candidate.why_not is not None:
                    named = looks_like_psa(module, layers, candidate.hidden)
                    raise MisfitError(candidate.why_not, named)
                verdicts[key] = run(module, layers)
            except MisfitError as why:
                verdicts[key] = _explained(why, module, layers)
    except Exception as error:  # attributes of foreign code may fail when they are read
        raise MisfitError(f"a trial of it failed: {first_line(error)}") from error
    verdict = verdicts[key]
    if isinstance(verdict, MisfitError):
        raise verdict
    why_not = why_not_replaced(module)
    if why_not is not None:
        raise MisfitError(why_not)
    return verdict


def _explained(why: MisfitError, module: nn.Module, layers: PSALayers) -> MisfitError:
    """With the methods of nn.Module that may be what a trial shows: a train() of its own, say."""
    with suppress(Exception):  # layers that a trial refused may fit no fused module
        methods = why_methods_lost(module, build(module, layers, BRANCH_ORDERS[0]))
        if methods is not None:
            return MisfitError(f"{why}; {methods}", why.named)
    return why


def _in_part(new: FusedPSAModule | FusedSplitPSA) -> str:
    """What a report says of a module whose attention step alone is fused."""
    why = new._why_not_taken() if isinstance(new, FusedPSAModule) else None
    return "" if why is None else f"; the convolutions are called, as {why}"


def _warn(model: nn.Module, plan: _Plan, not_compiled: str | None) -> None:
    report = plan.report

    def warn(message: str) -> None:
        warnings.warn(f"fuse: {message}", UserWarning, stacklevel=4)

    if not report.replaced:
        fused = f" besides {plan.already} that are fused already" if plan.already else ""
        warn(
            f"nothing to fuse, {type(model).__name__} has no PSA module that can be{fused}, "
            "and is unchanged"
        )
    if report.left:
        why = "; ".join(f"{name} ({why})" for name, why in report.left.items())
        warn(f"left alone {len(report.left)} that look like PSA modules: {why}")
    if not_compiled is not None:
        warn(not_compiled)
    if plan.overwriting:
        warn(
            f"{', '.join(plan.overwriting)} wrote over its input, which the fused module leaves "
            "as it is: check what else reads that input, such as a shortcut around it"
        )


def _built(name: str, module: nn.Module, verdict: Verdict) -> FusedPSAModule | FusedSplitPSA:
    new = build(module, verdict.layers, verdict.branch_order)
    why_not = why_lost(module, new)
    if why_not is not None:
        raise MisfitError(why_not)
    hidden = [n for n, child in new._modules.items() if getattr(new, n) is not child]
    if hidden:
        raise MisfitError(
            f"the fused module has an attribute by the name of its child {', '.join(hidden)}; it "
            "fuses with another name for that"
        )
    refuse_hooks(name, module, new, (existing(module, name) for name in verdict.layers.branches))
    new.training = module.training
    for key, value in vars(module).items():  # others may read them: an index, a number of channels
        if not hasattr(new, key) or (hasattr(nn.Module, key) and not callable(value)):
            vars(new).setdefault(key, value)
    if isinstance(module, PSAModule) and "winograd" in module.__dict__:
        new.__dict__["winograd"] = module.__dict__["winograd"]  # unfuse() kept it
    return new
