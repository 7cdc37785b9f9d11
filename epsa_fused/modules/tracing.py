"""Tracers that read a forward instead of running it: torch.fx, and torch.jit.script."""

from __future__ import annotations

from typing import NoReturn, cast

from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from .calling import hooks_on_all_modules, warn_once


def as_leaf(module: nn.Module, x: Proxy, return_attention: bool | str) -> Tensor | None:
    """Record the call of `module` as one node of torch.fx's graph.

    Inside a graph the module stays itself: hooks, devices and packed weights are those of the time
    of the call.

    Args:
        module: called with the proxy.
        x: stands for the argument.
        return_attention: of the call.

    Returns:
        A proxy of the result. None where the layers must be recorded instead, with a warning. The
        traced module itself cannot be a node. Hooks of the module have run on the proxy, or will,
        and would run again with the node.
    """
    tracer = cast(Tracer, x.tracer)
    if module is tracer.root:
        warn_once(module, "torch.fx.symbolic_trace looks into the module that it is given")
        return None
    if module._forward_hooks or module._forward_pre_hooks or hooks_on_all_modules():
        warn_once(module, "torch.fx.symbolic_trace records the module's hooks")
        return None
    path = tracer.path_of_module(module)
    options = {"return_attention": return_attention} if return_attention else {}
    return cast(Tensor, tracer.create_proxy("call_module", path, (x,), options))


class NotScriptable(nn.Module):
    """A module that torch.jit.script refuses with advice."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}, which calls operators by "
            "conditions in Python; use torch.jit.trace, torch.export.export or torch.compile"
        )
