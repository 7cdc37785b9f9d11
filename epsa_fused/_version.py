"""The version: pyproject.toml reads it from here, so a vendored copy knows it too."""

__version__ = "0.1.0"
