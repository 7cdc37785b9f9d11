"""Checkpoint files, which are complete or absent, and the state of the random generators."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from .errors import InputError, required

FORMAT = 2


def write(path: Path, state: dict[str, Any], keep: Path | None = None) -> None:
    """Save `state` so that a kill or a full disk at any moment leaves a complete file at `path`.

    A partial file beside `path` is written, forced to the disk and renamed to `path`. Then the
    rename itself is forced to the disk. With `keep`, the former file at `path` gets that name.

    Raises:
        InputError: the file cannot be written; the message says why, and what is there now.
    """
    # Serialise to memory first: the errors of torch.save on a full disk do not name the disk.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _name_too(path, keep)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        kept = "the last one that was saved is untouched" if path.exists() else "none was saved yet"
        raise InputError(
            f"{path}: cannot save {buffer.getbuffer().nbytes:,} bytes: {error.strerror}; {kept}"
        ) from error
    try:
        _sync(path.parent)
    except OSError as error:
        raise InputError(
            f"{path}: saved, but its folder cannot be forced to the disk: {error.strerror}; if the "
            "machine stops now, the one before it may be there instead"
        ) from error


def _name_too(path: Path, other: Path) -> None:
    """Give the file at `path` the second name `other`, and remove the former file of that name.

    A kill in between loses `other`, never `path`. Without hard links it may leave half a copy at
    `other`, which :func:`read` refuses.
    """
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError:  # not every file system has hard links
        try:
            shutil.copyfile(path, other)
        except OSError:  # a full disk must not leave half a checkpoint
            other.unlink(missing_ok=True)
            raise


def _sync(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, wanted: str = "a checkpoint to resume from") -> dict[str, Any]:
    """Read what :func:`write` saved, to the CPU: tensors and plain values only, no code.

    Raises:
        InputError: the file is missing, cut short, damaged or of another format.
    """
    if not path.exists():
        raise InputError(f"{path}: expected {wanted}, there is no such file")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} differs")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: expected a checkpoint of this program, got a file that holds more than "
            "tensors and plain values"
        ) from error
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError) as error:
        size = path.stat().st_size
        raise InputError(
            f"{path}: expected a whole checkpoint, got a file of {size:,} bytes that is cut short "
            f"or damaged ({error})"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise InputError(f"{path}: expected a checkpoint of format {FORMAT}, got {found}")
    return cast(dict[str, Any], state)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights of any network, to the CPU: a state_dict, or one under "state_dict" or
    "model". Files of safetensors have that ending. No code of the file is run.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    if not path.exists():
        raise InputError(f"expected a file of weights, there is no {path}")
    try:
        if path.suffix == ".safetensors":
            required("safetensors.torch", "reading safetensors", "safetensors")
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError("expected tensors and plain values, got a file that holds more") from error
    except InputError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"it is damaged, or of another kind ({error})") from error
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not state:
        raise InputError(f"expected a state_dict, got {type(state).__name__}")
    return state


def check_same(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError if settings differ from the checkpoint's; the message lists them."""

    def shown(value: Any) -> str:
        text = str(value)
        return text if len(text) <= 60 else text[:57] + "..."

    differing = [
        f"{name.replace('_', '-')}: {shown(saved.get(name))} in the checkpoint, "
        f"now {shown(now.get(name))}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if differing:
        raise InputError(f"{path} is of another training: " + "; ".join(differing))


def seed(seed: int) -> None:
    """Seed the generators of :func:`random_state`."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


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
