"""A module compiled with frozen weights: torch.compile makes constants of them, and packs them."""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

# Sizes that one model may be compiled for. Dynamo's own limit would call the model in eager mode.
_SIZES = 64


class FrozenModule:
    """Calls a module compiled for each size of its inputs. For calls without gradients."""

    def __init__(self, module: nn.Module) -> None:
        self._compiled = torch.compile(module, dynamic=False)
        self._seen: set[tuple[Any, ...]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = _signature((args, kwargs))
        if key in self._seen:
            return self._compiled(*args, **kwargs)
        # torch.compile's `options` come too late: its tracing reads the process's setting.
        with (
            torch._inductor.config.patch(freezing=True),
            torch._dynamo.config.patch(recompile_limit=_SIZES),
        ):
            result = self._compiled(*args, **kwargs)
        self._seen.add(key)
        return result


def _signature(arguments: Any) -> tuple[Any, ...]:
    leaves, tree = tree_flatten(arguments)
    return (str(tree), *map(_kind, leaves))


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return type(value), repr(value)
