"""The models by name: the one list that timm, the training command and the docs' tables take.

To add a model, write its builder in epsanet.py or small.py under :func:`register`. Name it in
epsanet.py's `__all__`, or for a small one in models/__init__.py. With :class:`Figures` it is an
ImageNet model: timm gets it, and the tests compare the figures with the network and with the docs'
tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

_Builder = TypeVar("_Builder", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class Figures:
    """Size of a model with 1000 classes, and what its paper publishes for ImageNet at 224x224."""

    parameters: int
    multiply_adds: int  # of the convolutions outside the SE networks, and of the classifier
    published_parameters: float  # millions
    published_multiply_adds: float  # billions
    published_top1: float  # percent
    published_top5: float  # percent


MODELS: dict[str, Callable[..., Any]] = {}
FIGURES: dict[str, Figures] = {}


def register(figures: Figures | None = None) -> Callable[[_Builder], _Builder]:
    """A decorator that enters a builder into MODELS, and its figures into FIGURES."""

    def enter(build: _Builder) -> _Builder:
        MODELS[build.__name__] = build
        if figures is not None:
            FIGURES[build.__name__] = figures
        return build

    return enter
