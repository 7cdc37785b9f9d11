"""Training on images: `python -m epsa_fused.train`, or :func:`train` with a :class:`Config`."""

from .config import Config
from .errors import InputError
from .training import Accuracy, Result, train

__all__ = ["Accuracy", "Config", "InputError", "Result", "train"]
