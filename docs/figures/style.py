"""Colours of the figures on a light and on a dark page, and how they are saved."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Theme:
    name: str
    page: str
    panel: str
    text: str
    muted: str
    line: str
    accent: str
    neutral: str
    branches: tuple[str, str, str, str]


THEMES = (
    Theme(
        name="light",
        page="#ffffff",
        panel="#f4f6f8",
        text="#1f2328",
        muted="#656d76",
        line="#d0d7de",
        accent="#3949ab",
        neutral="#8c959f",
        branches=("#3b7dd8", "#1aa37a", "#e08a1e", "#c2478f"),
    ),
    Theme(
        name="dark",
        page="#0d1117",
        panel="#161b22",
        text="#e6edf3",
        muted="#9198a1",
        line="#30363d",
        accent="#8c9eff",
        neutral="#768390",
        branches=("#5b9bf0", "#35c596", "#f0a540", "#e06bb0"),
    ),
)


def plain_axes(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.page)
    axes.tick_params(colors=theme.muted, labelcolor=theme.text, length=0)
    axes.spines[:].set_visible(False)


def save(figure: Figure, path: Path, description: str | None = None) -> None:
    """As SVG with its words as text, the same bytes in every run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"svg.hashsalt": path.name, "svg.fonttype": "none", "path.simplify": True}
    metadata = {"Date": None, "Creator": None, "Description": description}
    with matplotlib.rc_context(settings):
        figure.savefig(path, metadata=metadata)
    plt.close(figure)


def main(draw_all: Callable[[Path], None]) -> None:
    draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
