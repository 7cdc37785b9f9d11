"""record_attention: what the PSA modules of a model weigh each scale with."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ._checks import check_module, given
from .modules.split import SplitPSA
from .reference import PSAModule


@contextmanager
def record_attention(
    model: nn.Module, names: Iterable[str] | None = None
) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the attention of a model's PSA modules while the context is open.

    Each call of a module adds one tensor [N, S, C]: the weight of each scale (branch) for each
    channel of each sample, which sum to 1 over S. It is detached, indexed by branch (not by slot),
    in float32 (float64 for float64). The model's results are those without recording, and fused
    modules stay fused::

        with epsa_fused.record_attention(model) as scales:
            model(images)
        scales["layer1.0.conv2"][0].mean((0, 2))  # of each scale

    torch.compile reads a module's hooks when it compiles. Open the context before the first call.

    Args:
        model: with modules of :class:`PSAModule`, :class:`FusedPSAModule`, :class:`SplitPSA` or
            :class:`FusedSplitPSA`. :func:`fuse` puts them in the place of others.
        names: of the modules to record, as in `model.named_modules()`; None for all.

    Yields:
        The tensors of each call, by the module's name, in the order of the model.

    Raises:
        TypeError: `model` is no module, or `names` is a string.
        ValueError: the model has no PSA module, or none of a name.
    """
    check_module("record_attention: model", model)
    modules = _chosen(model, names)
    record: dict[str, list[Tensor]] = {name: [] for name in modules}
    with ExitStack() as handles:
        for name, module in modules.items():
            for handle in _hooks(module, record[name]):
                handles.callback(handle.remove)
        yield record
    if not any(record.values()):
        warnings.warn(
            "record_attention: no PSA module was called. A model that torch.compile compiled "
            "before keeps what it compiled; open the context before its first call.",
            stacklevel=3,  # where the context was opened
        )


def _chosen(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PSAModule | SplitPSA)
    }
    if not found:
        raise ValueError(
            "record_attention: model: expected PSA modules of epsa_fused, got none; "
            "epsa_fused.fuse(model) replaces those of other code"
        )
    if names is None:
        return found
    if isinstance(names, str):
        raise TypeError(f"record_attention: names: expected several, got {given(names)}")
    wanted = list(names)
    for name in wanted:
        if name not in found:
            raise ValueError(
                f"record_attention: names: expected some of {', '.join(map(repr, found))}, "
                f"got {given(name)}"
            )
    return {name: module for name, module in found.items() if name in wanted}


def _hooks(module: nn.Module, calls: list[Tensor]) -> Iterator[Any]:
    """Hooks that ask the module for its attention, and keep it from whoever did not ask."""
    asked: list[bool] = []  # of each call under way

    def ask(
        _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        own = args[1] if len(args) > 1 else options.get("return_attention", False)
        asked.append(own)
        return args[:1], {**options, "return_attention": True}

    def take(_: nn.Module, __: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> Any:
        calls.append(result[1].detach())
        return result if asked.pop() else result[0]

    yield module.register_forward_pre_hook(ask, with_kwargs=True)
    # before hooks that expect the output alone
    yield module.register_forward_hook(take, prepend=True)
