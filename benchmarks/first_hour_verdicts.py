"""What the first hour's steps have shown, each in one line, from the files that they wrote."""

from __future__ import annotations

import csv
import itertools
import re
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from provenance import sources

ROOT = Path(__file__).resolve().parent.parent

Verdict = tuple[bool, str]


@dataclass(frozen=True)
class Files:
    """The results that other programs write, under the device's name."""

    folder: Path
    device: str

    def rows(self, kind: str) -> list[dict[str, str]]:
        path = self.folder / f"{self.device}-{kind}.csv"
        return list(csv.DictReader(path.open())) if path.exists() else []

    def measured(self, kind: str) -> list[dict[str, str]]:
        """The rows of gpu.py's table that these kernels gave."""
        digest = sources()
        return [r for r in self.rows("gpu") if (r["kind"], r["sources"]) == (kind, digest)]

    def text(self, kind: str) -> str:
        path = self.folder / f"{self.device}-{kind}.txt"
        return path.read_text() if path.exists() else ""


# What tells rows of one kind apart, beside the contender.
CASE = ("mode", "layout", "dtype", "n", "planes", "size")


def built(output: str, files: Files) -> Verdict:
    return True, "built"


def suite(output: str, files: Files) -> Verdict:
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?)\b", output)}
    passed = counts.pop("passed", 0)
    return passed > 0 and not counts, f"{passed} passed, {sum(counts.values())} failed"


def cases(output: str, files: Files) -> Verdict:
    found = re.findall(r"(\d+) cases, (\d+) failed", output)
    if not found:
        return False, "no count of cases"
    total, failed = (int(n) for n in found[-1])
    return total > 0 and failed == 0, f"{total} cases, {failed} failed"


def sanitizers(output: str, files: Files) -> Verdict:
    lines = re.findall(r"^([a-z]+check: .*)$", files.text("sanitizer"), flags=re.MULTILINE)
    wrong = [line for line in lines if ": clean" not in line]
    return bool(lines) and not wrong, "; ".join(wrong or lines) or "no report"


def plans(output: str, files: Files) -> Verdict:
    """Is the plan that is ranked first the fastest?"""
    shapes: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    for row in files.rows("plans"):
        key = tuple(row[k] for k in CASE)
        shapes.setdefault(key, []).append((int(row["rank"]), float(row["us"])))
    if not shapes:
        return False, "no plan was timed"
    lost = {k: min(times)[1] / min(us for _, us in times) - 1 for k, times in shapes.items()}
    worst = max(lost, key=lambda k: lost[k])
    mean = statistics.mean(lost.values())
    return True, (
        f"the first plan is {mean:.1%} slower than the best on average, "
        f"{lost[worst]:.0%} at most, for {' '.join(worst)}"
    )


# The targets of the attention step: the part of a copy's rate at N = 64 and 256 in the first two
# stages, and the time at N = 1.
OF_COPY = {"forward": 0.85, "backward": 0.80}
MICROSECONDS = 10.0


def missed_target(row: dict[str, str]) -> str:
    """What the row falls short of; "" if nothing."""
    shape = f"{row['mode']} ({row['n']}, {row['planes']}, {row['size']})"
    if row["n"] == "1":
        us = float(row["device_us"])
        return f"{shape} {us:.1f} us" if us > MICROSECONDS else ""
    wide = int(row["planes"]) > 128
    short = not wide and float(row["of_copy"]) < OF_COPY[row["mode"]]
    return f"{shape} {float(row['of_copy']):.0%}" if short else ""


def attention(output: str, files: Files) -> Verdict:
    """One kernel a pass, and how far from the targets and from the opponents."""
    measured = files.measured("attention")
    fused = [r for r in measured if r["contender"] == "fused"]
    if not fused:
        return False, "nothing was measured"
    against = [
        float(other["device_us"]) / float(row["device_us"])
        for row in fused
        for other in measured
        if other["contender"] not in ("fused", "copy") and all(other[k] == row[k] for k in CASE)
    ]
    several = [r for r in fused if r["kernels"] != "1"]
    missed = sorted({m for m in map(missed_target, fused) if m})
    words = f"{min(against):.2f}x to {max(against):.2f}x the opponents" if against else "alone"
    return not several, (
        f"{len(fused)} cases, {len(several)} with more than one kernel; {words}; "
        f"{len(missed)} targets missed{': ' if missed else ''}{', '.join(missed[:4])}"
    )


def times_by_case(rows: Iterable[dict[str, str]]) -> dict[tuple[str, ...], dict[str, float]]:
    """Microseconds of each contender, by mode, layout, dtype, N, planes and size."""
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        case = tuple(row[name] for name in CASE)
        times.setdefault(case, {})[row["contender"]] = float(row["device_us"])
    return times


def ratios(times: Iterable[dict[str, float]], name: str) -> str:
    """How many times as fast the fused contender is as another; "" where that is not known."""
    found = [t[name] / t["fused"] for t in times if name in t]
    return f"{min(found):.2f} to {max(found):.2f} times as fast as {name}" if found else ""


def epilogue(output: str, files: Files) -> Verdict:
    """What BatchNorm and ReLU gain in the kernel's own pass."""
    times = times_by_case(files.measured("epilogue"))
    whole = [t for t in times.values() if len(t) == 3]
    if not whole:
        return False, "nothing was measured"
    words = [ratios(whole, name) for name in ("fused, then layers", "rewrite compiled")]
    return True, f"{len(whole)} cases: {', '.join(words)}"


OPPONENTS = ("layers", "published eager", "published compiled")


def training(output: str, files: Files, opponent: str = "published eager") -> Verdict:
    """A module's forward and backward pass, in each dtype, where the opponent was measured."""
    rows = [r for r in files.measured("module") if r["mode"] == "train"]
    whole = {case: t for case, t in times_by_case(rows).items() if "fused" in t and opponent in t}
    if not whole:
        return False, "nothing was measured"
    words = []
    for dtype in dict.fromkeys(case[CASE.index("dtype")] for case in whole):
        here = [t for case, t in whole.items() if dtype in case]
        found = [ratios(here, name) for name in OPPONENTS]
        words.append(f"{dtype}: {', '.join(filter(None, found))}")
    return True, f"{len(whole)} cases; {'; '.join(words)}{launched(rows)}"


def network(output: str, files: Files, opponent: str = "published eager") -> Verdict:
    """EPSANet-50, where the opponent was measured: milliseconds in channels_last."""
    rows = files.measured("network")
    whole = {case: t for case, t in times_by_case(rows).items() if "fused" in t and opponent in t}
    if not whole:
        return False, "nothing was measured"
    words = [
        f"{mode} {dtype} {n}: {t['fused'] / 1e3:.1f} ms, {t[opponent] / t['fused']:.2f} times"
        for (mode, layout, dtype, n, *_), t in whole.items()
        if layout == "channels_last"
    ]
    overall = ratios(whole.values(), opponent)
    return True, f"{len(whole)} cases, {overall}; {'; '.join(words)}{launched(rows)}"


def launched(rows: list[dict[str, str]]) -> str:
    """Says how many times hold what the host needs to launch kernels."""
    number = sum(row["timing"] == "launched" for row in rows)
    return f"; {number} rows were not captured in a graph" if number else ""


def module(output: str, files: Files) -> Verdict:
    """The attention step's part of a module, and whether merged groups pay in cuDNN."""
    parts: dict[tuple[str, ...], dict[str, float]] = {}
    for row in files.measured("share"):
        key = tuple(row[k] for k in ("layout", "dtype", "planes", "size"))
        parts.setdefault(key, {})[row["contender"]] = float(row["device_us"])
    shares, gains = [], {}
    for key, times in parts.items():
        convs = [v for k, v in times.items() if re.fullmatch(r"conv \d+", k)]
        if "attention" in times and convs:
            shares.append(times["attention"] / (times["attention"] + sum(convs)))
        for name, us in times.items():
            if match := re.match(r"(conv \d+) in", name):
                gains[(*key, name)] = times[match[1]] / us
    if not shares:
        return False, "nothing was measured"
    best = max(gains, key=lambda k: gains[k]) if gains else None
    merged = f"; merged groups gain up to {gains[best]:.1f}x: {' '.join(best)}" if best else ""
    return True, f"attention is {min(shares):.0%} to {max(shares):.0%} of the module{merged}"


def predictions(files: Files) -> list[str]:
    """What roofline.py predicts of the measured cases, and whether it held."""
    sys.path.insert(0, str(ROOT))  # these need the extension, which was built in place
    from devices import BANDWIDTH, DEVICES
    from roofline import row as predicted

    words = files.device.split("-")
    names = [*words, *map("".join, itertools.pairwise(words))]  # an rtx-4090 is an rtx4090
    known = [name for name in DEVICES if name in names]
    if not known:
        return [f"roofline.py does not know {files.device}"]
    name, floors, wrong = known[0], [], []
    for r in files.measured("attention"):
        if r["contender"] != "fused":
            continue
        numbers = (int(r[k]) for k in ("n", "planes", "size"))
        p = predicted(DEVICES[name], BANDWIDTH[name], r["mode"], r["layout"], r["dtype"], *numbers)
        floors.append(float(r["device_us"]) / p["floor_us"])
        launches = (int(r["kernels"]), int(r["memsets"]))
        if launches != (p["kernels"], p["memsets"]):
            wrong.append(
                f"{r['mode']} {r['layout']} {r['dtype']} ({r['n']}, {r['planes']}, {r['size']}): "
                f"{launches[0]} kernels and {launches[1]} memsets, predicted {p['kernels']} and "
                f"{p['memsets']}"
            )
    if not floors:
        return ["roofline.py: nothing was measured"]
    below = sum(f < 1 for f in floors)
    return [
        f"{min(floors):.1f} to {max(floors):.1f} times the floor of the memory's traffic, "
        f"{below} of {len(floors)} cases below it",
        *(wrong or ["kernels and memsets as predicted"]),
    ]
