"""The options of a training from a TOML file, for `--config`."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .errors import InputError, required


def read_options(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The options that a file sets, by the names of the fields of `Config`.

    Args:
        path: a TOML file whose keys are options of the command line: `image-size = 160`.
        known: the options that there are.

    Raises:
        InputError: the file cannot be read, is no TOML, or has a key that is no option.
    """
    # Python 3.10 has no tomllib. tomli is the same.
    toml = required("tomllib" if sys.version_info >= (3, 11) else "tomli", "--config", "tomli")
    try:
        with path.open("rb") as file:
            content = toml.load(file)
    except OSError as error:
        raise InputError(f"--config: {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are two
        raise InputError(f"--config: {path}: expected TOML: {error}") from error
    options = {name.replace("_", "-"): name for name in known}
    if unknown := [key for key in content if key not in options]:
        raise InputError(
            f"--config: {path}: expected options of the command line, such as image-size, got "
            f"{', '.join(unknown)}"
        )
    return {options[key]: value for key, value in content.items()}
