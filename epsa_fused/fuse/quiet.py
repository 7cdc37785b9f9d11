"""What keeps a trial and the caller's settings apart."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

# What a trial changes is that of all threads. A forward may call fuse().
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Around a trial of a copy of `module`: neither it nor the caller's things change the other."""
    with _ONE_AT_A_TIME, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numpy = sys.modules["numpy"]
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(_without_hooks_on_all_modules())
        stack.enter_context(_with_its_buffers(module))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        # oneDNN may round to bfloat16, as torch.set_float32_matmul_precision("medium") allows.
        # torch.backends.mkldnn.flags() does not leave its other settings as they were.
        stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
        torch._C._set_mkldnn_enabled(False)
        yield


@contextmanager
def _without_hooks_on_all_modules() -> Iterator[None]:
    """The hooks of register_module_forward_hook and its like would see modules of the trial.

    Their dicts stay the same objects, by which handles remove hooks.
    """
    kinds = [
        hooks
        for name, hooks in vars(nn.modules.module).items()
        if name.startswith("_global_") and isinstance(hooks, dict)
    ]
    kept = [dict(hooks) for hooks in kinds]
    for hooks in kinds:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(kinds, kept, strict=True):
            hooks.update(before)


@contextmanager
def _with_its_buffers(module: nn.Module) -> Iterator[None]:
    """A copy may call layers of `module` itself, by a function that it keeps."""
    before = [(t, t.clone()) for t in module.buffers() if not t.is_meta]
    try:
        yield
    finally:
        for t, value in before:
            if not torch.equal(t, value):
                t.data.copy_(value)


def seed() -> None:
    """Set the generators that a forward may draw from; those of GPUs stay."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def random_state() -> tuple[Any, ...]:
    """Of the generators that a forward may draw from."""
    numpy = sys.modules.get("numpy")
    drawn = () if numpy is None else numpy.random.get_state()
    own = tuple(v.tobytes() if hasattr(v, "tobytes") else v for v in drawn)
    return torch.default_generator.get_state().numpy().tobytes(), random.getstate(), own
