"""Files that are complete or absent, whenever the program is killed or the disk is full."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from .errors import InputError


def write(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Write a file so that a kill or a full disk at any moment leaves a complete one at `path`.

    A partial file beside `path` is written, forced to the disk and renamed to `path`. Then the
    rename itself is forced to the disk. With `keep`, the former file at `path` gets that name.

    Raises:
        InputError: the file cannot be written; the message says why, and what is there now.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
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
            f"{path}: cannot save {len(content):,} bytes: {error.strerror}; {kept}"
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
    `other`, which reading a checkpoint refuses.
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
