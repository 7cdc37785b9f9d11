"""Checks of a module that looks like a PSA module: its state, its hooks, and one trial run."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from ..reference import BRANCH_ORDERS, PSAModule, SEWeight
from .find import SPLIT, Kind, MisfitError

# What nn.Module keeps its hooks in. Those around a call are handed on to the fused module, ...
CALL_HOOKS = (
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


def _hooks(module: nn.Module, kinds: tuple[str, ...]) -> list[str]:
    return [kind for kind in kinds if getattr(module, kind, None)]


def _refuse_hooks(name: str, module: nn.Module, kind: Kind) -> None:
    """RuntimeError for hooks that the fused module cannot keep."""
    names = {layer: child for child, layer in module.named_modules()}
    softmax = [layer for child, layer in module._modules.items() if child == "softmax" and layer]
    for layer in [*kind.left_out(module), *softmax]:
        if _hooks(layer, CALL_HOOKS):
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


def check(
    name: str, module: nn.Module, kind: Kind, checks: dict[tuple, tuple[str, bool]]
) -> tuple[str, bool]:
    """The branch order of `module`, and whether it overwrites its input.

    Raises MisfitError, or RuntimeError for its hooks. `checks` holds what was seen of others.
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


def _run(module: nn.Module, kind: Kind) -> tuple[str, bool]:
    """As check, by running a copy of `module` with random weights, in float64 on the CPU.

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
        raise MisfitError(f"it cannot be copied for a trial: {error}") from None
    for m in twin.modules():
        for parameter, t in m._parameters.items():
            if t is not None:
                m._parameters[parameter] = nn.Parameter(random(t.shape), requires_grad=False)
    for hooks in _hooks(twin, CALL_HOOKS):
        getattr(twin, hooks).clear()
    parts = len(convs) if kind is SPLIT else 1
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
            raise MisfitError(f"a trial on {list(x.shape)} failed: {error}") from None
    for order, out in outs.items():
        if all(
            isinstance(other, torch.Tensor)
            and out.shape == other.shape
            and (out - other).abs().max() <= _ROUNDING * other.abs().max()
            for other in expected
        ):
            return order, not all(torch.equal(given, x) for given in givens)
    raise MisfitError("its forward computes something else than PSA, in either branch order")
