"""Calling the layers instead of the operators: where something around the call asks for it, and
the warning that it happens."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.module_tracker import ModuleTracker

from ..functional import in_transform


def why_here() -> str | None:
    """The reason why the layers must be called whatever they are, or None.

    It lies around the call: hooks on all modules, a transform, an exporter.
    """
    if hooks_on_all_modules():
        return "hooks are registered for all modules"
    if in_transform():
        return "a torch.func transform or forward-mode differentiation is in force"
    if torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export():
        return "torch.onnx.export(dynamo=False) has no fused operators"
    return None


def hooks_on_all_modules() -> bool:
    """Whether hooks are registered for all modules, besides those of torch's ModuleTracker.

    FlopCounterMode has one. It notes which module runs and changes nothing. The operators tell it
    their operations by formulas, which are exact also for grouped convolutions. A subclass of it
    may do anything.
    """
    registered = nn.modules.module
    if not registered._has_any_global_hook():
        return False
    kinds = (
        registered._global_forward_pre_hooks,
        registered._global_forward_hooks,
        registered._global_backward_pre_hooks,
        registered._global_backward_hooks,
    )
    return any(
        type(getattr(hook, "__self__", None)) is not ModuleTracker
        for kind in kinds
        for hook in kind.values()
    )


# The reasons given so far. Kept outside of the modules, so copies and pickles know nothing of it.
_given: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def warn_once(module: nn.Module, why: str) -> None:
    """Warn that `module` calls layers, once for each module and reason.

    Under torch.compile the warning comes with each trace.
    """
    message = (
        f"{type(module).__name__} calls layers in place of its fused operators: {why}. "
        "epsa_fused.why_not_fused(module) tells the reason of the moment."
    )
    if torch.compiler.is_compiling():
        _warn(message)
        return
    given = _given.setdefault(module, set())
    if why not in given:
        _warn(message)
        given.add(why)  # after the warning: as an error it comes with every call


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=6)  # the module's caller


# Dynamo then runs the function while it traces. torch.compiler.assume_constant_result does the
# same, but its import takes a second.
_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]
