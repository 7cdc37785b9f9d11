"""fuse(): put fused PSA modules into a model that has others.

What is a PSA module is told by its structure, since the published code is copied rather than
installed and its class lives in any module path. Structure does not say what a forward computes
with it, so each kind that is found is run once, on random weights, and compared.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from .modules import FusedPSAModule, why_se_not_fused
from .reference import BRANCH_ORDERS, PSAModule, SEWeight
from .split_psa import FusedSplitPSA, why_not_split_psa

# What nn.Module keeps its hooks in. Those around a call are handed on to the fused module, ...
_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# ... those around its state_dict are bound to the module that they were registered on.
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# What every module has: its state, which is not what its class computes with.
_STATE = vars(nn.Module()).keys()
# Largest relative difference in float64 of two formulations of the same thing.
_ROUNDING = 1e-9


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


class _MisfitError(Exception):
    """Why a module that looks like a PSA module is none that can be fused."""


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
        kind = _kind_of(module)
        if kind is None:
            continue
        try:
            if module not in fused:
                order, overwrites = _check(name, module, kind, checks)
                fused[module] = _build(module, kind, order)
                overwriting += [name] if overwrites else []
            new, old = fused[module], type(module)
            report.replaced[name] = (
                f"{type(new).__name__}(branch_order={new.branch_order!r}) "
                f"for {old.__module__}.{old.__qualname__}"
            )
        except _MisfitError as why:
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


# ---- what is found ----


@dataclass(frozen=True)
class _Kind:
    """A structure that is taken for a PSA module, and what is made of it."""

    convs: Callable[[nn.Module], list[nn.Module]]
    left_out: Callable[[nn.Module], Iterator[nn.Module]]  # layers that the fused one does not call
    rebuilt: Callable[[nn.Module], list[nn.Module]]  # layers that the fused one has its own of
    why_not: Callable[[nn.Module], str | None]
    build: Callable[[nn.Module, str], nn.Module]


def _kind_of(module: nn.Module) -> _Kind | None:
    """None for what does not look like a PSA module that is yet to be fused."""
    if isinstance(module, FusedPSAModule | FusedSplitPSA):
        return None
    children = {name for name, child in module._modules.items() if child is not None}
    if {"conv_1", "conv_2", "se"} <= children:
        return _PUBLISHED
    if {"convs", "se_blocks"} <= children:
        return _SPLIT
    return None


def _published_convs(module: nn.Module) -> list[nn.Module]:
    names = (f"conv_{i}" for i in range(1, len(module._modules) + 1))
    return [module._modules[name] for name in names if module._modules.get(name) is not None]


def _why_not_published(module: nn.Module) -> str | None:
    convs = {f"conv_{i}": conv for i, conv in enumerate(_published_convs(module), 1)}
    unexpected = module._modules.keys() - convs.keys() - {"se", "softmax"}
    if unexpected:
        return f"it has other children too: {', '.join(sorted(unexpected))}"
    for name, conv in convs.items():
        if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward:
            return f"{name} is a {type(conv).__name__}, expected a Conv2d"
    return why_se_not_fused("se", module.se, type(module.se))


def _build_published(module: nn.Module, order: str) -> FusedPSAModule:
    convs = _published_convs(module)
    first = convs[0]
    try:
        with torch.device("meta"):  # its layers are replaced below
            new = FusedPSAModule(
                first.in_channels,
                len(convs) * first.out_channels,
                [conv.kernel_size[0] for conv in convs],
                first.stride[0],
                [conv.groups for conv in convs],
                reduction=first.out_channels,
                branch_order=order,
            )
    except (ValueError, TypeError) as error:
        raise _MisfitError(str(error)) from None
    for i, conv in enumerate(convs, 1):
        expected = getattr(new, f"conv_{i}")
        if conv.extra_repr() != expected.extra_repr():
            raise _MisfitError(
                f"conv_{i} is Conv2d({conv.extra_repr()}), expected Conv2d({expected.extra_repr()})"
            )
        setattr(new, f"conv_{i}", conv)
    for layer in new.se._modules:
        setattr(new.se, layer, module.se._modules[layer])
    new.se.training = module.se.training
    return new


def _why_not_split(module: nn.Module) -> str | None:
    unexpected = module._modules.keys() - {"convs", "se_blocks", "softmax"}
    if unexpected:
        return f"it has other children too: {', '.join(sorted(unexpected))}"
    for name in ("convs", "se_blocks"):
        if type(module._modules[name]) is not nn.ModuleList:
            return f"{name} is a {type(module._modules[name]).__name__}, expected a ModuleList"
    for i, conv in enumerate(module.convs):
        if not isinstance(conv, nn.Conv2d):
            return f"convs.{i} is a {type(conv).__name__}, expected a Conv2d"
    channels = [(conv.in_channels, conv.out_channels) for conv in module.convs]
    if len(set(channels)) != 1:
        return f"its convs have (in_channels, out_channels) {channels}, expected equal ones"
    return why_not_split_psa(module.convs, module.se_blocks)


def _build_split(module: nn.Module, order: str) -> FusedSplitPSA:
    new = FusedSplitPSA(module.convs, module.se_blocks, branch_order=order)
    new.convs, new.se_blocks = module.convs, module.se_blocks
    return new


_PUBLISHED = _Kind(
    convs=_published_convs,
    left_out=lambda module: module.se.modules(),
    rebuilt=lambda module: [module.se],
    why_not=_why_not_published,
    build=_build_published,
)
_SPLIT = _Kind(
    convs=lambda module: list(module.convs),
    left_out=lambda module: module.se_blocks.modules(),
    rebuilt=lambda module: [],
    why_not=_why_not_split,
    build=_build_split,
)


# ---- checks: structure, hooks, results ----


def _hooks(module: nn.Module, kinds: tuple[str, ...]) -> list[str]:
    return [kind for kind in kinds if getattr(module, kind, None)]


def _refuse_hooks(name: str, module: nn.Module, kind: _Kind) -> None:
    """RuntimeError for hooks that the fused module cannot keep."""
    names = {layer: child for child, layer in module.named_modules()}
    softmax = [layer for child, layer in module._modules.items() if child == "softmax" and layer]
    for layer in [*kind.left_out(module), *softmax]:
        if _hooks(layer, _CALL_HOOKS):
            path = f"{name}.{names[layer]}".removeprefix(".")
            raise RuntimeError(
                f"fuse: {path} has hooks, and the fused module does not call it: "
                "remove them first. Nothing was changed."
            )
    gone = [module, *kind.rebuilt(module), *softmax]
    lost = [hooks for layer in gone for hooks in _hooks(layer, _STATE_HOOKS)]
    if module._backward_hooks and not module._is_full_backward_hook:
        lost.append("_backward_hooks")  # of the old kind, which hang on the output's autograd node
    if lost:
        raise RuntimeError(
            f"fuse: {name or 'the model'} has hooks in {', '.join(lost)}, which belong to the "
            "module that they were registered on: remove them first. Nothing was changed."
        )


def _check(
    name: str, module: nn.Module, kind: _Kind, checks: dict[tuple, tuple[str, bool]]
) -> tuple[str, bool]:
    """The branch order of `module`, and whether it overwrites its input.

    Raises _MisfitError, or RuntimeError for its hooks. `checks` holds what was seen of others.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise _MisfitError("it was compiled by torch.jit; fuse before that")
    if any(nn.parameter.is_lazy(p) for p in module.parameters()):
        raise _MisfitError("its parameters are not initialised; run the model once before")
    own = [*module._parameters, *module._buffers]
    if own:
        raise _MisfitError(f"it has parameters or buffers of its own: {', '.join(own)}")
    if "forward" in module.__dict__:
        raise _MisfitError("its forward was replaced")
    if any(type(p).__name__ == "DTensor" for p in module.parameters()):
        raise _MisfitError("its parameters are shards (DTensor); fuse before sharding")
    _refuse_hooks(name, module, kind)
    why = kind.why_not(module)
    if why is not None:
        raise _MisfitError(why)
    if (
        type(module) is PSAModule
        and type(module.se) is SEWeight
        and "attention" not in module.__dict__
    ):
        return module.branch_order, False
    # equal classes, settings and SE shapes compute the same
    convs = kind.convs(module)
    settings = [
        (name, key, id(value) if isinstance(value, torch.Tensor) else repr(value))
        for name, m in module.named_modules()
        if m not in convs  # whose place another one takes
        for key, value in sorted(vars(m).items())
        if key not in _STATE
    ]
    shapes = [
        p.shape for m in kind.left_out(module) for p in m._parameters.values() if p is not None
    ]
    key = (*(type(m) for m in module.modules()), *settings, *shapes)
    if key not in checks:
        checks[key] = _run(module, kind)
    return checks[key]


def _run(module: nn.Module, kind: _Kind) -> tuple[str, bool]:
    """As _check, by running a copy of `module` with random weights, in float64 on the CPU.

    In training and in evaluation, since a dropout shows in one alone. Its convolutions, which will
    be called as they are, have cheap ones of 1x1 in their place.
    """
    generator = torch.Generator().manual_seed(0)

    def random(shape) -> torch.Tensor:
        # Results of about one, so that no sigmoid saturates; biases that are small beside them,
        # so that each hidden unit is alive in some branches and samples and dead in others.
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
        return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator) * scale

    convs = kind.convs(module)
    in_channels, out_channels = convs[0].in_channels, convs[0].out_channels
    memo = {
        id(conv): nn.Conv2d(in_channels, out_channels, 1, bias=False, device="meta")
        for conv in convs
    }
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as error:  # it keeps a result that autograd has a part in, for one
        raise _MisfitError(f"it cannot be copied for a trial: {error}") from None
    for m in twin.modules():
        for parameter, t in m._parameters.items():
            if t is not None:
                m._parameters[parameter] = nn.Parameter(random(t.shape), requires_grad=False)
    for hooks in _hooks(twin, _CALL_HOOKS):
        getattr(twin, hooks).clear()
    parts = len(convs) if kind is _SPLIT else 1
    x = random((4, parts * in_channels, 3, 2))
    x /= x.std()
    givens = [x.clone(), x.clone()]
    with (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        try:
            expected = [
                twin.train(training)(given)
                for training, given in zip((True, False), givens, strict=True)
            ]
            outs = {order: kind.build(twin, order)(x) for order in BRANCH_ORDERS}
        except Exception as error:
            raise _MisfitError(f"a trial on {list(x.shape)} failed: {error}") from None
    for order, out in outs.items():
        if all(
            isinstance(other, torch.Tensor)
            and out.shape == other.shape
            and (out - other).abs().max() <= _ROUNDING * other.abs().max()
            for other in expected
        ):
            return order, not all(torch.equal(given, x) for given in givens)
    raise _MisfitError("its forward computes something else than PSA, in either branch order")


def _build(module: nn.Module, kind: _Kind, order: str) -> nn.Module:
    new = kind.build(module, order)
    lost = _names_of_tensors(module) - _names_of_tensors(new)
    if lost:
        raise _MisfitError(
            f"it has parameters or buffers that the fused one has not: {', '.join(sorted(lost))}"
        )
    new.training = module.training
    return new


def _names_of_tensors(module: nn.Module) -> set[str]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {name for name, _ in (*parameters, *module.named_buffers(remove_duplicate=False))}


def _hand_on(old: nn.Module, new: nn.Module) -> None:
    """Hooks: the very containers, so that the handles of hooks keep working."""
    for hooks in (*_CALL_HOOKS, "_is_full_backward_hook"):
        new.__dict__[hooks] = old.__dict__[hooks]
