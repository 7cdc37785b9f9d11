"""Gradient checkpointing: the backward pass computes a block's maps again, instead of keeping them
from the forward pass (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint


def checkpointed(blocks: nn.Sequential, x: Tensor) -> Tensor:
    """blocks(x), of which only each block's input is kept for the backward pass.

    Results, gradients and buffers are those of the plain call. torch.fx and torch.jit.trace record
    that one.
    """
    recorded = isinstance(x, Proxy) or torch._C._get_tracing_state() is not None
    if recorded or not torch.is_grad_enabled():
        return cast(Tensor, blocks(x))
    for block in blocks:
        options: dict[str, Any] = {}
        if not torch.compiler.is_compiling():  # compiled code never updates buffers twice
            options["context_fn"] = partial(_contexts, block)
        x = checkpoint(block, x, use_reentrant=False, **options)
    return x


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Those around the first computation and around the second."""
    return nullcontext(), _buffers_kept(block)


@contextmanager
def _buffers_kept(block: nn.Module) -> Iterator[None]:
    """Inside, the block has copies of its buffers: BatchNorm's statistics would count twice."""
    own = {module: module._buffers for module in block.modules()}
    for module, buffers in own.items():
        module._buffers = {k: None if v is None else v.clone() for k, v in buffers.items()}
    try:
        yield
    finally:
        for module, buffers in own.items():
            module._buffers = buffers
