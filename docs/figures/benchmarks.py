"""Draws benchmarks/results as the pictures of docs/benchmarks.md and docs/serving.md, in a light
and a dark version.

    python docs/figures/benchmarks.py [FOLDER]

Each picture names in its metadata the results that it was drawn from, so that a test can tell when
one is out of date.
"""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from style import THEMES, TIMES, Theme, main, plain_axes, save

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MACHINE = "intel-xeon-2.5ghz"
MACHINES = {"serving": "intel-xeon-amx"}  # of results that are of another one
OPPONENTS = ("published eager", "published compiled", "rewrite eager", "rewrite compiled")
# Which results each picture shows.
SOURCES = {
    "attention-speed": ("attention",),
    "module-speed": ("module",),
    "network-speed": ("network", "network-train"),
    "convolution-rates": ("branches",),
    "serving-speed": ("serving",),
}


def path_of(name: str) -> Path:
    return RESULTS / f"{MACHINES.get(name, MACHINE)}-{name}.csv"


def rows(name: str, **wanted: str) -> list[dict[str, str]]:
    with path_of(name).open(newline="") as file:
        return [row for row in csv.DictReader(file) if wanted.items() <= row.items()]


def digest(picture: str) -> str:
    """Names the contents of a picture's results."""
    paths = map(path_of, SOURCES[picture])
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def shape(row: dict[str, str]) -> str:
    return f"({row['n']}, {row['planes']}, {row['size']})"


def best(found: list[dict[str, str]]) -> float:
    """The fastest opponent's time over the fused time."""
    return min(float(row["over_fused"]) for row in found if row["contender"] in OPPONENTS)


def panels(theme: Theme, titles: list[str], height: float) -> tuple[plt.Figure, list[Axes]]:
    figure, axes = plt.subplots(
        1, len(titles), figsize=(10, height), facecolor=theme.page, layout="constrained"
    )
    for axis, title in zip(axes, titles, strict=True):
        plain_axes(axis, theme)
        axis.set_title(title, color=theme.text, fontsize=11, loc="left", weight="bold")
    figure.get_layout_engine().set(w_pad=0.15)
    return figure, list(axes)


def bars(
    axis: Axes, labels: list[str], groups: dict[str, tuple[str, list[float]]], theme: Theme, form
) -> None:
    """Horizontal bars, the first label on top; `groups` are name: (colour, one value a label)."""
    thick = 0.78 / len(groups)
    for i, (name, (color, values)) in enumerate(groups.items()):
        places = [k + (i - (len(groups) - 1) / 2) * thick for k in range(len(labels))]
        drawn = axis.barh(places, values, thick * 0.9, color=color, label=name)
        axis.bar_label(drawn, map(form, values), padding=3, fontsize=8, color=theme.text)
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    axis.invert_yaxis()
    axis.set_xticks([])


def legend(figure: plt.Figure, axis: Axes, theme: Theme) -> None:
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
        labelcolor=theme.text,
    )


def times(value: float) -> str:
    return f"{value:.1f}{TIMES}"


def attention_speed(theme: Theme) -> plt.Figure:
    figure, axes = panels(theme, ["Forward", "Backward"], 4.6)
    for axis, mode in zip(axes, ("forward", "backward"), strict=True):
        here = rows("attention", level="attention", mode=mode, layout="contiguous", dtype="float32")
        shapes = list(dict.fromkeys(map(shape, here)))
        cases = [[row for row in here if shape(row) == s] for s in shapes]
        published = [
            float(next(r["over_fused"] for r in case if r["contender"] == "published eager"))
            for case in cases
        ]
        groups = {
            "times as fast as the published code": (theme.neutral, published),
            "times as fast as the fastest of four opponents": (
                theme.accent,
                [best(case) for case in cases],
            ),
        }
        axis.set_xlim(0, 27)
        axis.axvline(1, color=theme.muted, linewidth=1)
        bars(axis, shapes, groups, theme, times)
    legend(figure, axes[0], theme)
    return figure


def module_speed(theme: Theme) -> plt.Figure:
    figure, axes = panels(theme, ["Forward", "Forward and backward"], 4.2)
    for axis, mode in zip(axes, ("forward", "train"), strict=True):
        here = rows("module", level="module", mode=mode, dtype="float32")
        shapes = list(dict.fromkeys(map(shape, here)))
        groups = {
            f"{layout}: times as fast as the fastest opponent": (
                color,
                [
                    best([r for r in here if shape(r) == s and r["layout"] == layout])
                    for s in shapes
                ],
            )
            for layout, color in (
                ("contiguous", theme.accent),
                ("channels_last", theme.branches[1]),
            )
        }
        axis.set_xlim(0, 6.5)
        axis.axvline(1, color=theme.muted, linewidth=1)
        bars(axis, shapes, groups, theme, times)
    legend(figure, axes[0], theme)
    return figure


def network_speed(theme: Theme) -> plt.Figure:
    cases = {
        "Forward, one image": ("network", "forward", "1"),
        "Forward, 8 images": ("network", "forward", "8"),
        "Training step, 8 images": ("network-train", "train", "8"),
    }
    colors = {
        "published eager": theme.neutral,
        "published compiled": theme.neutral,
        "rewrite compiled": theme.neutral,
        "fused": theme.accent,
        "fused compiled": theme.accent,
    }
    figure, axes = panels(theme, list(cases), 2.6)
    for axis, (name, mode, n) in zip(axes, cases.values(), strict=True):
        here = {row["contender"]: row for row in rows(name, level="network", mode=mode, n=n)}
        values = [float(here[contender]["median_us"]) / 1000 for contender in colors]
        drawn = axis.barh(range(len(values)), values, 0.7, color=list(colors.values()))
        axis.bar_label(drawn, [f"{v:,.0f} ms" for v in values], padding=3, fontsize=8,
                       color=theme.text)  # fmt: skip
        axis.set_xlim(0, 1.3 * max(values))
        axis.set_xticks([])
        axis.set_yticks(range(len(colors)), list(colors) if axis is axes[0] else [], fontsize=9)
        axis.invert_yaxis()
    return figure


def convolution_rates(theme: Theme) -> plt.Figure:
    """The four stages of the small network, each branch and all of them in one call."""
    stages = (("64", "56"), ("128", "28"), ("256", "14"), ("512", "7"))
    titles = [f"{planes} planes, {size} {TIMES} {size}" for planes, size in stages]
    figure, axes = panels(theme, titles, 3.1)
    for axis, (planes, size) in zip(axes, stages, strict=True):
        here = rows("branches", network="small", planes=planes, size=size, stride="1")
        labels = [
            r["kernel"] if r["kernel"] == "all" else f"{r['kernel']} {TIMES} {r['kernel']}"
            for r in here
        ]
        torchs = [
            max(float(r["torch_gflops"]), float(r["torch_channels_last_gflops"])) for r in here
        ]
        groups = {
            "torch, in its faster layout": (theme.neutral, torchs),
            "fused": (theme.accent, [float(r["gflops"]) for r in here]),
        }
        peak = float(here[0]["peak_gflops"])
        axis.axvline(
            peak,
            color=theme.muted,
            linewidth=1,
            linestyle=(0, (3, 2)),
            zorder=0,
            label="a large matrix product",
        )
        axis.set_xlim(0, 270)
        bars(
            axis, labels if axis is axes[0] else [""] * len(labels), groups, theme, "{:.0f}".format
        )
    legend(figure, axes[0], theme)
    return figure


def serving_speed(theme: Theme) -> plt.Figure:
    """Images a second with all threads, one panel for each batch size."""
    found = rows("serving", part="speed")
    threads = max((row["threads"] for row in found), key=int)
    here = {
        (row["contender"], row["dtype"], row["batch"]): float(row["images_per_s"])
        for row in found
        if row["threads"] == threads
    }
    names = list(dict.fromkeys(name for name, _, _ in here))
    batches = sorted({batch for _, _, batch in here}, key=int)
    titles = ["One image" if batch == "1" else f"{batch} images" for batch in batches]
    figure, axes = panels(theme, titles, 4.2)
    for axis, batch in zip(axes, batches, strict=True):
        groups = {
            f"{dtype}: images a second": (
                color,
                [here.get((name, dtype, batch), 0) for name in names],
            )
            for dtype, color in (("float32", theme.accent), ("bfloat16", theme.branches[1]))
        }
        axis.set_xlim(0, 1.2 * max(max(values) for _, values in groups.values()))
        bars(
            axis,
            names if axis is axes[0] else [""] * len(names),
            groups,
            theme,
            lambda value: f"{value:.0f}" if value else "-",
        )
    legend(figure, axes[0], theme)
    return figure


DRAWN = {
    "attention-speed": attention_speed,
    "module-speed": module_speed,
    "network-speed": network_speed,
    "convolution-rates": convolution_rates,
    "serving-speed": serving_speed,
}


def draw_all(folder: Path) -> None:
    for theme in THEMES:
        for name, draw in DRAWN.items():
            save(draw(theme), folder / f"{name}-{theme.name}.svg", digest(name))


if __name__ == "__main__":
    main(draw_all)
