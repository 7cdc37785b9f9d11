"""Training on images: `python -m epsa_fused.train`, or :func:`train` with a :class:`Config`."""

from .errors import InputError, required

required("numpy", "training", "numpy")  # the rest of the package works without it

from .config import Config  # noqa: E402
from .evaluation import Accuracy  # noqa: E402
from .training import Result, train  # noqa: E402

__all__ = ["Accuracy", "Config", "InputError", "Result", "train"]
