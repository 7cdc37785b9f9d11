"""record_attention: what the PSA modules of a model weigh each scale with."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_module, given
from .functional import in_transform
from .modules.split import SplitPSA
from .reference import DETACHED, PSAModule


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
        ValueError: the model has no PSA module, none of a name, or one whose own `forward` or
            `attention` takes no return_attention.
    """
    check_module("record_attention: model", model)
    modules = _chosen(model, names)
    record: dict[str, list[Tensor]] = {name: [] for name in modules}
    sinks = {name: _Sink(calls) for name, calls in record.items()}
    with ExitStack() as stack:
        for name, module in modules.items():
            recorder = _RECORDERS.get(module) or _Recorder.of(module)
            recorder.add(sinks[name])
            stack.callback(recorder.remove, sinks[name])
        yield record
    if not any(sink.called for sink in sinks.values()):
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
            "record_attention: model: expected PSA modules of epsa_fused, got none. fuse(model) "
            "replaces those of other code; optimize_for_inference leaves none to record"
        )
    if names is not None:
        if isinstance(names, str):
            raise TypeError(f"record_attention: names: expected several, got {given(names)}")
        wanted = list(names)
        for name in wanted:
            if name not in found:
                raise ValueError(
                    f"record_attention: names: expected some of {', '.join(map(repr, found))}, "
                    f"got {given(name)}"
                )
        found = {name: module for name, module in found.items() if name in wanted}
    for name, module in found.items():
        for method in ("forward", "attention"):
            own = vars(module).get(method)  # not getattr: a child may have its name
            takes = (
                _of_class_takes_return_attention(getattr(type(module), method, None))
                if own is None
                else _takes_return_attention(own)
            )
            if not takes:
                raise ValueError(
                    f"record_attention: model: expected modules that take return_attention, got "
                    f"{name!r}, a {type(module).__name__} with {_article(method)} of its own"
                )
    return found


def _takes_return_attention(method: Callable[..., Any] | None) -> bool:
    return method is None or "return_attention" in inspect.signature(method).parameters


# A look costs some microseconds, and a model has a few classes.
_of_class_takes_return_attention = lru_cache(maxsize=64)(_takes_return_attention)


def _article(method: str) -> str:
    return f"an {method}" if method == "attention" else f"a {method}"


@dataclass(eq=False)
class _Sink:
    """The list of one module in one context."""

    calls: list[Tensor]
    called: bool = False


class _Recorder:
    """The hooks of one module: they ask it for its attention, and keep that from the caller.

    All contexts around a call share them. Copies and pickles of the module hold recorders that do
    nothing.
    """

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._sinks: list[_Sink] = []
        self._handles: list[Any] = []

    @classmethod
    def of(cls, module: nn.Module) -> _Recorder:
        self = _RECORDERS[module] = cls()
        self._module = module
        self._handles = [
            module.register_forward_pre_hook(self.ask, with_kwargs=True),
            # before hooks that expect the output alone
            module.register_forward_hook(self.take, with_kwargs=True, prepend=True),
        ]
        return self

    def add(self, sink: _Sink) -> None:
        self._sinks.append(sink)

    def remove(self, sink: _Sink) -> None:
        self._sinks.remove(sink)
        if not self._sinks and self._module is not None:
            for handle in self._handles:
                handle.remove()
            del _RECORDERS[self._module]
            self._module = None

    def ask(
        self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        asked = args[1] if len(args) > 1 else options.get("return_attention", False)
        if module is not self._module or len(args) > 2 or asked is not False:
            return None  # the call is as it should be, or an error
        return args[:1], {**options, "return_attention": DETACHED}

    def take(
        self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], result: Any
    ) -> Any:
        if module is not self._module or not isinstance(result, tuple):
            return result
        out, attention = result
        # Tracers and transforms call with stand-ins. Gradient checkpointing calls once more, inside
        # of a backward pass.
        again = torch._C._current_graph_task_id() != -1
        if type(attention) is Tensor and not in_transform() and not again:
            for sink in self._sinks:
                sink.called = True
                sink.calls.append(attention.detach())
        return out if options.get("return_attention") == DETACHED else result

    def __reduce__(self) -> tuple[type[_Recorder], tuple[()]]:
        return _Recorder, ()

    def __deepcopy__(self, _: dict[int, Any]) -> _Recorder:
        return _Recorder()


_RECORDERS: weakref.WeakKeyDictionary[nn.Module, _Recorder] = weakref.WeakKeyDictionary()
