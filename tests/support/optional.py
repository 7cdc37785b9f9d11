"""Packages that some tests need and others do not."""

import importlib
from types import ModuleType

import pytest


def optional(name: str) -> ModuleType:
    """The module `name`; skips the test, saying why, where it cannot be imported.

    RuntimeError too: that is what PyPI's torchvision, which is made for CUDA, raises beside a
    torch without.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")
