"""Checks of a module that looks like a PSA module: its state, its hooks, and one trial run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..reference import BRANCH_ORDERS, PSAModule, SEWeight
from .find import Kind, MisfitError

# nn.Module's containers of hooks around a call. The fused module takes them over.
CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# Hooks around the state_dict are bound to the module that they were registered on.
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# Every module has these attributes; the others are settings of its class.
_STATE = vars(nn.Module()).keys()
# The largest relative difference in float64 between two formulations of the same function.
_ROUNDING = 1e-9


class Verdict(NamedTuple):
    """What a trial shows of a PSA module."""

    branch_order: str
    overwrites_input: bool


def check(
    name: str, module: nn.Module, kind: Kind, checks: dict[tuple[Any, ...], Verdict]
) -> Verdict:
    """Check that `module` can be fused, by its structure and by one trial for each kind.

    Args:
        name: of the module, for messages.
        module: looks like a PSA module of `kind`.
        checks: the verdicts so far; a module of the same kind as an earlier one is not run again.

    Raises:
        MisfitError: it cannot be fused.
        RuntimeError: it has hooks that the fused module cannot keep.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise MisfitError("it was compiled by torch.jit; fuse before that")
    if any(nn.parameter.is_lazy(p) for p in module.parameters()):
        raise MisfitError("its parameters are not initialised; run the model once before")
    own = [*module._parameters, *module._buffers]
    if own:
        raise MisfitError(f"it has parameters or buffers of its own: {', '.join(own)}")
    if "forward" in module.__dict__:
        raise MisfitError("its forward was replaced")
    if any(type(p).__name__ == "DTensor" for p in module.parameters()):
        raise MisfitError("its parameters are shards (DTensor); fuse before sharding")
    _refuse_hooks(name, module, kind)
    why = kind.why_not(module)
    if why is not None:
        raise MisfitError(why)
    if (
        type(module) is PSAModule
        and type(module.se) is SEWeight
        and "attention" not in module.__dict__
    ):
        return Verdict(module.branch_order, False)
    key = _key(module, kind)
    if key not in checks:
        checks[key] = _run(module, kind)
    return checks[key]


def _hooks(module: nn.Module, kinds: tuple[str, ...]) -> list[str]:
    return [kind for kind in kinds if getattr(module, kind, None)]


def hooks_that_stay_behind(replaced: Iterable[nn.Module]) -> list[str]:
    """The containers of hooks that mean nothing on what comes in the place of these modules."""
    lost = []
    for module in replaced:
        lost += _hooks(module, _STATE_HOOKS)
        # Non-full backward hooks hang on the autograd node of the old module's output.
        if module._backward_hooks and not module._is_full_backward_hook:
            lost.append("_backward_hooks")
    return lost


def _refuse_hooks(name: str, module: nn.Module, kind: Kind) -> None:
    """Raise RuntimeError for hooks that the fused module cannot keep."""
    names = {layer: child for child, layer in module.named_modules()}
    softmax = [layer for child, layer in module._modules.items() if child == "softmax" and layer]
    for layer in [*kind.left_out(module), *softmax]:
        if _hooks(layer, CALL_HOOKS):
            path = f"{name}.{names[layer]}".removeprefix(".")
            raise RuntimeError(
                f"fuse: {path} has hooks, and the operators do not call it: "
                "remove them first. Nothing was changed."
            )
    lost = hooks_that_stay_behind([module, *kind.rebuilt(module), *softmax])
    if lost:
        raise RuntimeError(
            f"fuse: {name or 'the model'} has hooks in {', '.join(lost)}, which belong to the "
            "module that they were registered on: remove them first. Nothing was changed."
        )


def _key(module: nn.Module, kind: Kind) -> tuple[Any, ...]:
    """Classes, settings and SE shapes: modules with equal ones compute the same function."""
    convs = kind.convs(module)
    settings = [
        (name, key, id(value) if isinstance(value, Tensor) else repr(value))
        for name, m in module.named_modules()
        if m not in convs  # the trial replaces them
        for key, value in sorted(vars(m).items())
        if key not in _STATE
    ]
    shapes = [
        p.shape for m in kind.left_out(module) for p in m._parameters.values() if p is not None
    ]
    return (*(type(m) for m in module.modules()), *settings, *shapes)


def _random(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random float64 weights or maps.

    Weights give outputs of about one, so no sigmoid saturates. Biases are small beside those: each
    hidden unit is then alive in some branches and samples and dead in others.
    """
    scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
    return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator) * scale


def _twin(module: nn.Module, kind: Kind, generator: torch.Generator) -> nn.Module:
    """A copy with random weights on the CPU, without hooks, and with cheap 1x1 convolutions.

    The fused module calls the same convolutions, so the trial need not run them.
    """
    convs = kind.convs(module)
    memo: dict[int, Any] = {
        id(conv): nn.Conv2d(
            convs[0].in_channels, convs[0].out_channels, 1, bias=False, device="meta"
        )
        for conv in convs
    }
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as error:  # for example, it keeps a result with an autograd graph
        raise MisfitError(f"it cannot be copied for a trial: {error}") from None
    for m in twin.modules():
        for parameter, t in m._parameters.items():
            if t is not None:
                value = _random(t.shape, generator)
                m._parameters[parameter] = nn.Parameter(value, requires_grad=False)
    for hooks in _hooks(twin, CALL_HOOKS):
        getattr(twin, hooks).clear()
    return twin


def _run(module: nn.Module, kind: Kind) -> Verdict:
    """The verdict from a run of a copy with random weights, in float64 on the CPU.

    It runs in training and in evaluation: a dropout shows in one of them only.
    """
    generator = torch.Generator().manual_seed(0)
    twin = _twin(module, kind, generator)
    convs = kind.convs(module)
    parts = len(convs) if kind.splits_input else 1
    x = _random((4, parts * convs[0].in_channels, 3, 2), generator)
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
            raise MisfitError(f"a trial on {list(x.shape)} failed: {error}") from None
    for order, out in outs.items():
        if all(_agree(out, other) for other in expected):
            return Verdict(order, not all(torch.equal(given, x) for given in givens))
    raise MisfitError("its forward computes something else than PSA, in either branch order")


def _agree(out: Tensor, other: object) -> bool:
    return (
        isinstance(other, Tensor)
        and out.shape == other.shape
        and bool((out - other).abs().max() <= _ROUNDING * other.abs().max())
    )
