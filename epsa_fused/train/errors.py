"""The error that a user can mend, and packages that only training needs."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was expected and what was found.

    The command line prints it without a traceback.
    """


def required(module: str, why: str, install: str) -> ModuleType:
    """The module of that name; InputError, with the command that installs it, where it is missing.

    Only the module itself: one that is installed and fails to import keeps its own error.
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
