"""How far a contender may be from the exact results, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from epsa_fused.inference.accuracy import FACTOR


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def distance(result: Tensor, exact: Tensor) -> float:
    return largest(result.double() - exact)


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error of a tensor over its largest element."""
    pairs = zip(results, exact, strict=True)
    return max((distance(a, b) / max(largest(b), 1e-30) for a, b in pairs), default=0.0)


def allowed_error(exact: Tensor, usual: Tensor, rounding: float) -> float:
    """What another formulation than the usual one may differ by.

    It is FACTOR times the usual one's error. `rounding` times the largest element is added, where
    the usual one happens to be exact.
    """
    return FACTOR * distance(usual, exact) + rounding * largest(exact)
