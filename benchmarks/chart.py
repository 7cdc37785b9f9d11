"""The benchmark's chart: the time of each opponent over the fused time."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {
    "published eager": "#b9c6d3",
    "published compiled": "#8fa6bd",
    "rewrite eager": "#5b7fa6",
    "rewrite compiled": "#27527f",
}


def draw(rows: list[dict], facts: dict, path: Path) -> None:
    """Draw one panel per level, mode and layout of the first dtype, one group of bars per shape."""
    dtype = next(row["dtype"] for row in rows if row["level"] != "host")
    rows = [row for row in rows if row["level"] != "host" and row["dtype"] == dtype]
    panels = list(dict.fromkeys((r["level"], r["mode"], r["layout"]) for r in rows))
    columns = 2 if len(panels) > 1 else 1
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(7 * columns, 3.2 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        here = [r for r in rows if (r["level"], r["mode"], r["layout"]) == panel]
        shapes = list(dict.fromkeys((r["n"], r["planes"], r["size"]) for r in here))
        names = [name for name in COLORS if any(r["contender"] == name for r in here)]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            found = {(r["n"], r["planes"], r["size"]): r for r in here if r["contender"] == name}
            values = [found[shape]["over_fused"] for shape in shapes]
            places = [k + (i - (len(names) - 1) / 2) * width for k in range(len(shapes))]
            bars = axis.bar(places, values, width, color=COLORS[name], label=name)
            axis.bar_label(bars, fmt="%.1f", fontsize=6)
        axis.axhline(1, color="#c0392b", linewidth=1)
        axis.set_yscale("log")
        axis.set_xticks(range(len(shapes)), [f"({n}, {p}, {h})" for n, p, h in shapes], fontsize=7)
        axis.set_ylabel("time / fused time")
        axis.set_title(", ".join(panel), fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(fontsize=7, frameon=False)
    figure.suptitle(
        f"{facts['device']}, {facts['threads']} threads, {dtype}, torch {facts['torch']}: "
        "opponents over fused (red line: equal); shapes are (N, planes, H)",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
