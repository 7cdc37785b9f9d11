"""Gradient checkpointing: the backward pass computes a block's maps again, instead of keeping them
from the forward pass (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint


def checkpointed(block: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """forward(x), the forward pass of `block`, of which only x is kept for the backward pass.

    Results, gradients and buffers are those of the plain call. torch.fx and torch.jit.trace record
    that one.
    """
    recorded = isinstance(x, Proxy) or torch._C._get_tracing_state() is not None
    if recorded or not torch.is_grad_enabled():
        return forward(x)
    options: dict[str, Any] = {}
    if not torch.compiler.is_compiling():  # compiled code never updates buffers twice
        options["context_fn"] = partial(_contexts, block)
    return cast(Tensor, checkpoint(forward, x, use_reentrant=False, **options))


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Those around the first computation and around each later one."""
    return nullcontext(), _BuffersOfBefore(block)


class _BuffersOfBefore(AbstractContextManager[None]):
    """Inside, the block has copies of the buffers that it had when this was made.

    BatchNorm's statistics would count twice, and layers that read their statistics in training
    would find others. It is entered once for each backward pass through the graph.
    """

    def __init__(self, block: nn.Module) -> None:
        self.before = {module: _copies(module._buffers) for module in block.modules()}
        self.own: dict[nn.Module, dict[str, Tensor | None]] = {}

    def __enter__(self) -> None:
        for module, buffers in self.before.items():
            self.own[module] = module._buffers
            module._buffers = _copies(buffers)

    def __exit__(self, *error: object) -> None:
        for module, buffers in self.own.items():
            module._buffers = buffers


def _copies(buffers: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.clone() for name, value in buffers.items()}
