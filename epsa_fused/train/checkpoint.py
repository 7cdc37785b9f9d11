"""Checkpoint files."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, cast

import torch

from . import files
from .errors import InputError

FORMAT = 2


def write(path: Path, state: dict[str, Any], keep: Path | None = None) -> None:
    """Save `state` by :func:`files.write`, whole or not at all.

    Raises:
        InputError: the file cannot be written; the message says why, and what is there now.
    """
    # Serialise to memory first: the errors of torch.save on a full disk do not name the disk.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files.write(path, buffer.getbuffer(), keep)


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
    check_format(path, state)
    return cast(dict[str, Any], state)


def check_format(path: Path, state: Any) -> None:
    """Raise InputError if a file that was read is of another format than this version's."""
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise InputError(f"{path}: expected a checkpoint of format {FORMAT}, got {found}")


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
