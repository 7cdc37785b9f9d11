"""Draws what PSA computes and what is fused: attention-light.svg and attention-dark.svg.

python docs/figures/attention.py [FOLDER]
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from style import THEMES, TIMES, Theme, main, save

WIDTH, HEIGHT = 20.0, 9.3
BRANCHES = tuple(f"{k} {TIMES} {k}" for k in (3, 5, 7, 9))
ROWS = (6.85, 5.4, 3.95, 2.5)  # centre of each branch
CHANNELS = 5
# Attention of each branch (row) and channel (column); a column sums to one.
ATTENTION = (
    (0.52, 0.10, 0.22, 0.14, 0.34),
    (0.22, 0.16, 0.46, 0.22, 0.12),
    (0.12, 0.58, 0.20, 0.18, 0.40),
    (0.14, 0.16, 0.12, 0.46, 0.14),
)


def text(
    axes: Axes, x: float, y: float, words: str, theme: Theme, size: float = 10, **more
) -> None:
    style = {"color": theme.text, "ha": "center", "va": "center", "fontsize": size} | more
    axes.text(x, y, words, **style)


def arrow(axes: Axes, start: tuple, end: tuple, theme: Theme, color: str | None = None) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>,head_length=4,head_width=2.4",
            color=color or theme.muted,
            linewidth=1.1,
            shrinkA=0,
            shrinkB=0,
        )
    )


def box(axes: Axes, x: float, y: float, w: float, h: float, **style) -> None:
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.18", **style))


def maps(axes: Axes, x: float, y: float, color: str, theme: Theme, weights=None) -> None:
    """A stack of channels, the last one in front; `weights` set how strong each one is."""
    side, step = 0.74, 0.12
    left, bottom = x - side / 2 - 2 * step, y - side / 2 + 2 * step
    for i in range(CHANNELS):
        place = (left + i * step, bottom - i * step)
        strength = 0.75 if weights is None else 0.12 + 1.3 * weights[i]
        axes.add_patch(Rectangle(place, side, side, facecolor=theme.page, edgecolor="none"))
        axes.add_patch(
            Rectangle(
                place,
                side,
                side,
                facecolor=(color, min(strength, 1.0)),
                edgecolor=theme.page,
                linewidth=0.9,
            )
        )


def row_of_cells(axes: Axes, x: float, y: float, color: str, theme: Theme, weights=None) -> None:
    """One value for each channel."""
    side = 0.3
    for i in range(CHANNELS):
        strength = 0.75 if weights is None else 0.12 + 1.3 * weights[i]
        axes.add_patch(
            Rectangle(
                (x + (i - CHANNELS / 2) * side, y - side / 2),
                side,
                side,
                facecolor=(color, min(strength, 1.0)),
                edgecolor=theme.page,
                linewidth=0.9,
            )
        )


def frames(axes: Axes, theme: Theme) -> None:
    box(axes, 2.0, 0.45, 17.75, 8.65, facecolor=theme.panel, edgecolor=theme.line, linewidth=1.0)
    box(axes, 6.6, 0.7, 12.85, 7.65, facecolor=theme.page, edgecolor=theme.accent, linewidth=1.6)
    text(axes, 2.3, 8.72, "FusedPSAModule", theme, 11, ha="left", weight="bold")
    text(
        axes, 19.45, 8.72, "on the CPU: one operator", theme, 9.5,
        ha="right", color=theme.muted,
    )  # fmt: skip
    text(axes, 6.9, 7.98, "psa_attention", theme, 11, ha="left", weight="bold", color=theme.accent)
    text(
        axes, 19.15, 7.98, "one operator, forward and backward", theme, 9.5, ha="right",
        color=theme.muted,
    )  # fmt: skip


def branches(axes: Axes, theme: Theme) -> None:
    middle = sum(ROWS) / len(ROWS)
    for kernel, y, color, weights in zip(BRANCHES, ROWS, theme.branches, ATTENTION, strict=True):
        arrow(axes, (1.62, middle + (y - middle) * 0.12), (2.45, y), theme)
        box(axes, 2.5, y - 0.36, 1.6, 0.72, facecolor=theme.page, edgecolor=color, linewidth=1.4)
        text(axes, 3.3, y, kernel, theme, 10)
        arrow(axes, (4.15, y), (4.75, y), theme)
        maps(axes, 5.6, y, color, theme)
        arrow(axes, (6.45, y), (7.2, y), theme)
        row_of_cells(axes, 8.05, y, color, theme)
        arrow(axes, (8.9, y), (9.5, y), theme)
        arrow(axes, (11.2, y), (11.8, y), theme)
        row_of_cells(axes, 12.75, y, color, theme, weights)
        arrow(axes, (13.7, y), (14.35, y), theme)
        text(axes, 14.62, y, TIMES, theme, 15, color=theme.muted)
        arrow(axes, (14.9, y), (15.5, y), theme)
        maps(axes, 16.4, y, color, theme, weights)
        # the maps themselves go to the product, below the row of values
        axes.plot(
            [6.3, 6.45, 14.62], [y - 0.4, y - 0.62, y - 0.62], color=theme.muted, linewidth=0.7,
            zorder=1.5,
        )  # fmt: skip
        arrow(axes, (14.62, y - 0.63), (14.62, y - 0.22), theme)


def shared_parts(axes: Axes, theme: Theme) -> None:
    """What is drawn once for all branches."""
    low, high = ROWS[-1] - 0.5, ROWS[0] + 0.5
    style = {"facecolor": theme.panel, "edgecolor": theme.line, "linewidth": 1.0, "zorder": 2}
    box(axes, 9.55, low, 1.6, high - low, **style)
    text(axes, 10.35, (low + high) / 2, "SE\n\nC → r → C\n\nReLU\nsigmoid", theme, 9.5)
    x, side = 12.75, 0.3 * CHANNELS
    axes.add_patch(
        Rectangle(
            (x - side / 2 - 0.1, low + 0.1), side + 0.2, high - low - 0.2, fill=False,
            edgecolor=theme.muted, linewidth=0.9, linestyle=(0, (3, 2)),
        )
    )  # fmt: skip


def ends(axes: Axes, theme: Theme) -> None:
    middle = sum(ROWS) / len(ROWS)
    maps(axes, 0.85, middle, theme.neutral, theme)
    text(axes, 0.85, middle - 0.85, "x", theme, 10, va="top")
    # the published order puts the last branch first
    side = 1.05
    for i, color in enumerate(reversed(theme.branches)):
        weights = ATTENTION[-1 - i]
        bottom = middle + (1 - i) * side
        for channel in range(CHANNELS):
            axes.add_patch(
                Rectangle(
                    (18.3, bottom + side - (channel + 1) * side / CHANNELS), 0.75,
                    side / CHANNELS, facecolor=(color, min(0.12 + 1.3 * weights[channel], 1.0)),
                    edgecolor=theme.page, linewidth=0.9,
                )
            )  # fmt: skip
    for i, y in enumerate(ROWS):
        arrow(axes, (17.25, y), (18.22, middle - (1.5 - i) * side), theme)
    text(axes, 18.67, middle - 2.25, "out", theme, 10, va="top")


def captions(axes: Axes, theme: Theme) -> None:
    captions = {
        3.3: "grouped\nconvolutions",
        5.6: "maps\nof S branches",
        8.05: "mean over\nH and W",
        10.35: "one network\nfor all",
        12.75: "softmax across\nthe branches",
        15.9: "each map times\nits attention",
        18.3: "concatenated:\n4, 3, 2, 1",
    }
    for x, words in captions.items():
        text(axes, x, 1.0, words, theme, 8.6, va="bottom", color=theme.muted, linespacing=1.25)


def draw(theme: Theme, folder: Path) -> None:
    figure = plt.figure(figsize=(10.6, 10.6 * HEIGHT / WIDTH), facecolor=theme.page)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0.3, HEIGHT - 0.05))
    axes.axis("off")
    for part in (frames, branches, shared_parts, ends, captions):
        part(axes, theme)
    save(figure, folder / f"attention-{theme.name}.svg")


def draw_all(folder: Path) -> None:
    for theme in THEMES:
        draw(theme, folder)


if __name__ == "__main__":
    main(draw_all)
