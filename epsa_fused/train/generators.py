"""The global random generators of torch, NumPy and Python: their seeds and states."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch


def seed(seed: int) -> None:
    """Seed the generators of :func:`random_state`."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def seed_host(*numbers: int) -> int:
    """Seed those of the CPU, by numbers that are not negative; returns the seed.

    A GPU's generator stays: dropout there goes on as it was.
    """
    (value,) = np.random.SeedSequence(numbers).generate_state(1).tolist()
    torch.default_generator.manual_seed(value)
    np.random.seed(value)
    random.seed(value)
    return cast(int, value)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of torch's, NumPy's and Python's global generators in this process."""
    name, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


@contextlib.contextmanager
def kept_on_host() -> Iterator[None]:
    """Put the CPU's generators back to where they are now."""
    host = torch.device("cpu")
    state = random_state(host)
    try:
        yield
    finally:
        set_random_state(state, host)
