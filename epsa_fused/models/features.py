"""Which of a network's maps a caller asks for, by timm's rules."""

from __future__ import annotations

from collections.abc import Sequence

from .._checks import check_int, check_ints


def taken_indices(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Indices from 0 to count - 1: the last `indices` ones, those of a sequence, or all for None.

    Raises:
        TypeError, ValueError: there are no such maps. Negative indices count from the end.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        check_int("indices", indices, 1, count)
        return list(range(count - indices, count))
    check_ints("indices", indices)
    if not indices:
        raise ValueError("indices: expected at least one index, got none")
    for i, index in enumerate(indices):
        check_int(f"indices[{i}]", index, -count, count - 1)
    return [index % count for index in indices]
