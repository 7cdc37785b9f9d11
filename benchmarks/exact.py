"""How far a contender may be from the exact results, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epsa_fused.inference.accuracy import FACTOR


class WrongResultError(RuntimeError):
    """A contender's result that rounding does not explain."""


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


def roundings(dtype: torch.dtype) -> float:
    """Some of the dtype's, and of sums in float32, which each method takes in an order of its own.

    They are relative to the largest element.
    """
    return 4 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Exact:
    """Exact results by their names, and how far others may be from them."""

    tensors: dict[str, Tensor]
    allowed: dict[str, float]

    @staticmethod
    def of(exact: dict[str, Tensor], usual: dict[str, Tensor], rounding: float) -> Exact:
        allowed = {name: allowed_error(exact[name], usual[name], rounding) for name in exact}
        return Exact(exact, allowed)

    def check(self, results: dict[str, Tensor]) -> None:
        """WrongResultError for the first that is too far from the exact one."""
        if results.keys() != self.tensors.keys():
            raise WrongResultError(f"expected {', '.join(self.tensors)}, got {', '.join(results)}")
        for name, result in results.items():
            error, allowed = distance(result, self.tensors[name]), self.allowed[name]
            if not error <= allowed:  # as for NaN
                raise WrongResultError(f"{name}: error {error:.3g}, expected at most {allowed:.3g}")

    def error(self, results: dict[str, Tensor]) -> float:
        """The largest relative error of the given ones."""
        return relative_error([*results.values()], [self.tensors[name] for name in results])
