"""Pictures of what :func:`record_attention` collects, by matplotlib (the extra `plots`).

Each function draws into `axes`, or into a new figure, and returns the axes. A scale's weight is the
mean of its attention over channels: 1 / S for each of S scales that count alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ._checks import MOST, check_int, check_number, given

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Sequence[Tensor]]

# A colour and a marker for each of up to eight scales, the smallest kernels lightest.
_COLOURS = "viridis_r"
_MARKERS = "os^DvP*X"


def scale_weights(record: Record) -> dict[str, Tensor]:
    """The mean over channels of all calls of each module: [images, S], by the module's name.

    Raises:
        ValueError: the record is empty.
    """
    weights = {
        name: torch.cat([a.double().mean(2) for a in calls]).cpu()
        for name, calls in record.items()
        if calls
    }
    if not weights:
        raise ValueError("record: expected calls of record_attention, got none")
    return weights


def depth(record: Record, labels: Sequence[str] | None = None, axes: Axes | None = None) -> Axes:
    """The weight of each scale against the depth of its module, with the spread over images.

    Args:
        record: of :func:`record_attention`.
        labels: of the scales, such as ("3x3", "5x5", "7x7", "9x9"); None numbers them.
        axes: to draw into; None for a new figure.
    """
    weights = scale_weights(record)
    scales = _scales(weights)
    labels = _labels(labels, scales)
    axes = _axes(axes)
    places = range(1, len(weights) + 1)
    for s, (label, colour) in enumerate(zip(labels, _colours(scales), strict=True)):
        marker = _MARKERS[s % len(_MARKERS)]
        of_scale = [w[:, s] for w in weights.values()]
        means = torch.stack([w.mean() for w in of_scale])
        spread = torch.stack([w.std(correction=0) for w in of_scale])
        axes.plot(places, means.tolist(), marker=marker, markersize=4, color=colour, label=label)
        low, high = (means - spread).tolist(), (means + spread).tolist()
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(1 / scales, color="grey", linewidth=0.8, linestyle=":")
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("PSA module, from the input")
    axes.set_ylabel("weight of a scale")
    axes.margins(y=0.2)  # room for the legend
    axes.legend(frameon=False, ncols=min(scales, 4))
    return axes


def classes(
    record: Record,
    targets: Tensor | Sequence[int],
    names: Sequence[str] | None = None,
    *,
    module: str | None = None,
    labels: Sequence[str] | None = None,
    reach: float | None = None,
    axes: Axes | None = None,
) -> Axes:
    """The mean weight of each scale for the images of each class, in one module.

    Args:
        record: of :func:`record_attention`, with one call of the module for each batch.
        targets: the class of each image, in the order of the calls.
        names: of the classes; None numbers them.
        module: its name in the record; None for the last one.
        labels, axes: as of :func:`depth`.
        reach: how far the colours go from 1 / S, to either side. None takes the table's largest
            difference; give tables that are compared the same.

    Raises:
        ValueError: an unknown module, or another number of targets than of images.
    """
    weights = scale_weights(record)
    module = next(reversed(weights)) if module is None else module
    if module not in weights:
        known = ", ".join(map(repr, weights))
        raise ValueError(f"classes: module: expected one of {known}, got {given(module)}")
    of_images = weights[module]
    wanted = torch.as_tensor(targets)
    if wanted.shape != of_images.shape[:1]:
        raise ValueError(
            f"classes: targets: expected the class of each of {len(of_images)} images, got shape "
            f"{list(wanted.shape)}"
        )
    found = wanted.unique().tolist()
    for number in found:
        check_int("classes: targets", number, 0, MOST if names is None else len(names) - 1)
    table = torch.stack([of_images[wanted == c].mean(0) for c in found])
    rows = [str(c) if names is None else names[c] for c in found]
    axes = _table(table, rows, _labels(labels, table.shape[1]), reach, axes)
    axes.set_title(module)
    return axes


def image(
    record: Record,
    index: int = 0,
    labels: Sequence[str] | None = None,
    axes: Axes | None = None,
    *,
    reach: float | None = None,
) -> Axes:
    """The weight of each scale in each module, for one image.

    Args:
        record, labels, axes: as of :func:`depth`.
        reach: as of :func:`classes`.
        index: of the image, counted over all calls.

    Raises:
        ValueError: modules were called with different numbers of images, as one that a model calls
            twice is.
    """
    weights = scale_weights(record)
    counts = {name: len(w) for name, w in weights.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"image: record: expected as many images of each module, got {counts}")
    check_int("image: index", index, 0, min(counts.values()) - 1)
    table = torch.stack([w[index] for w in weights.values()])
    return _table(table, list(weights), _labels(labels, _scales(weights)), reach, axes)


# ---- parts ----


def _scales(weights: Mapping[str, Tensor]) -> int:
    """S of all modules."""
    found = {w.shape[1] for w in weights.values()}
    if len(found) > 1:
        raise ValueError(
            f"record: expected modules of one number of scales, got {sorted(found)}; "
            "record_attention(model, names) chooses some"
        )
    return found.pop()


def _labels(labels: Sequence[str] | None, scales: int) -> list[str]:
    if labels is None:
        return [f"scale {s + 1}" for s in range(scales)]
    if isinstance(labels, str) or len(labels) != scales:
        raise ValueError(f"labels: expected {scales}, got {given(labels)}")
    return list(labels)


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as pyplot
    except ImportError as error:
        raise ImportError(
            "epsa_fused.plots draws with matplotlib: pip install matplotlib, or epsa_fused[plots]"
        ) from error
    return pyplot


def _axes(axes: Axes | None) -> Axes:
    if axes is None:
        axes = cast("Axes", _pyplot().subplots(layout="constrained")[1])
    return axes


def _colours(count: int) -> list[Any]:
    colours = _pyplot().get_cmap(_COLOURS)
    # without the lightest, which a white page hides
    return [colours(0.2 + 0.8 * i / max(count - 1, 1)) for i in range(count)]


def _table(
    table: Tensor, rows: list[str], columns: list[str], reach: float | None, axes: Axes | None
) -> Axes:
    even = 1 / table.shape[1]
    if reach is None:
        reach = max((table - even).abs().max().item(), 1e-6)
    check_number("reach", reach)
    if not 0 < reach < math.inf:
        raise ValueError(f"reach: expected a number above 0, got {given(reach)}")
    axes = _axes(axes)
    drawn = axes.imshow(
        table.numpy(), cmap="PuOr_r", vmin=even - reach, vmax=even + reach, aspect="auto"
    )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.figure.colorbar(drawn, ax=axes, label="weight of a scale")
    return axes
