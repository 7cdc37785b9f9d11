"""Whether Winograd's method may compute 3x3 convolutions, in this process."""

from __future__ import annotations

import os

from ._checks import check_flag

_value = os.environ.get("EPSA_WINOGRAD", "1")
_allowed = _value == "1"
# The variable's error is raised where the choice is used, so that importing the package works.
_wrong = None if _value in ("0", "1") else f"EPSA_WINOGRAD: expected 0 or 1, got {_value!r}"


def set_winograd(allowed: bool) -> None:
    """Allow or forbid Winograd's method on the CPU, for all calls of this process that follow.

    The method computes 3x3 convolutions of stride 1 where that is faster. Small values beside large
    ones lose digits by it, and infinities may come out as NaN
    (:func:`epsa_fused.convolution.spc_conv` tells more). The environment variable EPSA_WINOGRAD=0
    forbids it from the start. A module's own `winograd` comes first.

    A compiled model compiles again after a change. An exported program keeps its choice.

    Raises:
        TypeError: `allowed` is no bool.
    """
    global _allowed, _wrong
    check_flag("set_winograd: allowed", allowed)
    _allowed, _wrong = allowed, None


def winograd_allowed(own: bool | None = None) -> bool:
    """Whether Winograd's method may be used.

    Args:
        own: a module's or a call's own choice; None if it has none.

    Raises:
        TypeError: `own` is no bool.
        ValueError: the environment variable is neither 0 nor 1, and nothing else chooses.
    """
    if own is None:
        if _wrong is not None:
            raise ValueError(_wrong)
        return _allowed
    check_flag("winograd", own)
    return own
