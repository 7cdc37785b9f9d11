"""The errors of inputs and of images, and the packages that only training needs."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """An input cannot be used; the message says what was expected and what was found.

    The command line prints it without a traceback.
    """


class CorruptImageError(Exception):
    """An image cannot be read; the message names it and the reason."""


def required(module: str, why: str, install: str) -> ModuleType:
    """Import and return a module.

    Raises:
        InputError: its package is not installed; the message has the command that installs it.
            Other errors of the import stay what they are.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise InputError(
            f"{why} needs the package {module.partition('.')[0]}, which is not installed: "
            f"pip install {install}"
        ) from None
