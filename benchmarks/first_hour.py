"""All that a machine with an NVIDIA GPU can tell, in one command that may be stopped at any time.

    python benchmarks/first_hour.py                the steps that are missing, most wanted first
    python benchmarks/first_hour.py --minutes 12   starts no step that may take longer
    python benchmarks/first_hour.py --dry-run      names the steps, and runs nothing

A step has a question, a command, a limit and a verdict in one line. The verdict goes to
<out>/<device>-first-hour.csv as soon as the step ends; the command's output goes to
build/gpu/<step>.log. Steps whose verdict is known for the same kernels (csrc) are skipped. A step
that failed runs again. A build that is there already is used: `make` compares its time with the
sources'. The last lines compare what was measured with what roofline.py predicts.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from provenance import commit, sources

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
FIELDS = ("step", "status", "seconds", "verdict", "sources", "commit", "date")

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


# ---- verdicts ----


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
        key = tuple(row[k] for k in ("mode", "layout", "dtype", "n", "planes", "size"))
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
    case = ("mode", "layout", "dtype", "n", "planes", "size")
    ratios = [
        float(other["device_us"]) / float(row["device_us"])
        for row in fused
        for other in measured
        if other["contender"] not in ("fused", "copy") and all(other[k] == row[k] for k in case)
    ]
    several = [r for r in fused if r["kernels"] != "1"]
    missed = sorted({m for m in map(missed_target, fused) if m})
    against = f"{min(ratios):.2f}x to {max(ratios):.2f}x the opponents" if ratios else "alone"
    return not several, (
        f"{len(fused)} cases, {len(several)} with more than one kernel; {against}; "
        f"{len(missed)} targets missed{': ' if missed else ''}{', '.join(missed[:4])}"
    )


def epilogue(output: str, files: Files) -> Verdict:
    """What BatchNorm and ReLU gain in the kernel's own pass."""
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for row in files.measured("epilogue"):
        key = tuple(row[k] for k in ("layout", "dtype", "n", "planes", "size"))
        times.setdefault(key, {})[row["contender"]] = float(row["device_us"])
    whole = [t for t in times.values() if len(t) == 3]
    if not whole:
        return False, "nothing was measured"
    words = []
    for name in ("fused, then layers", "rewrite compiled"):
        ratios = [t[name] / t["fused"] for t in whole]
        words.append(f"{min(ratios):.2f} to {max(ratios):.2f} times as fast as {name}")
    return True, f"{len(whole)} cases: {', '.join(words)}"


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


# ---- steps ----


@dataclass(frozen=True)
class Step:
    name: str
    question: str
    command: list[str]
    limit: int  # seconds
    verdict: Callable[[str, Files], Verdict]


def steps(python: str) -> list[Step]:
    """Most wanted first. Each takes less than eight minutes."""
    make = ["make", f"GPU_PYTHON={python}"]
    bench = ["env", "PYTHONPATH=.", python, "benchmarks/gpu.py"]
    program = str(BUILD / "cases")
    return [
        Step("build", "Does it compile?", [*make, "build/gpu/built"], 470, built),
        Step("suite", "Do the operator's tests pass, a capture without warm-up among them?",
             [*make, "gpu-test"], 470, suite),
        Step("cases", "Does every plan pass, without torch?",
             ["sh", "-c", f"make build/gpu/cases && {program}"], 300, cases),
        Step("ptx", "Do kernels pass that the driver compiled from PTX of 8.0?",
             ["sh", "-c", f"make build/gpu/cases-ptx && {program}-ptx --quick --part 0/8"], 300,
             cases),
        Step("plans", "Is the best plan ranked first?", [*make, "gpu-plans"], 240, plans),
        Step("attention", "How fast is the attention step?",
             [*bench, "--part", "attention", "--minutes", "7"], 470, attention),
        Step("epilogue", "What do BatchNorm and ReLU gain in the same pass?",
             [*bench, "--part", "epilogue", "--minutes", "5"], 470, epilogue),
        Step("sanitizers", "Do the sanitizers report anything?",
             ["bash", "benchmarks/sanitize.sh", program, "440"], 470, sanitizers),
        Step("module", "Which part of a module is the attention step?",
             [*bench, "--part", "module", "--minutes", "7"], 470, module),
    ]  # fmt: skip


def run(step: Step) -> tuple[bool, str]:
    """Whether the command ended well in its time, and its output; the log has it too."""
    BUILD.mkdir(parents=True, exist_ok=True)
    log = BUILD / f"{step.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(step.limit)
        except BaseException as error:  # an interruption, too, must leave no process on the GPU
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return False, log.read_text(errors="replace") + f"\nended after {step.limit} s"
    return code == 0, log.read_text(errors="replace")


# ---- results ----


class Record:
    """The verdicts so far. The last row of a step counts."""

    def __init__(self, files: Files) -> None:
        self.path = files.folder / f"{files.device}-first-hour.csv"
        self.facts = {"sources": sources(), "commit": commit()}
        self.known = {
            row["step"]: row["verdict"]
            for row in files.rows("first-hour")
            if row["sources"] == self.facts["sources"] and row["status"] == "passed"
        }

    def add(self, step: Step, passed: bool, seconds: float, verdict: str) -> None:
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(
                self.facts
                | {
                    "step": step.name,
                    "status": "passed" if passed else "failed",
                    "seconds": round(seconds),
                    "verdict": verdict,
                    "date": time.strftime("%Y-%m-%d"),
                }
            )


def take(step: Step, files: Files, record: Record) -> bool:
    print(f"{step.name}: {step.question}", flush=True)
    start = time.monotonic()
    ended_well, output = run(step)
    passed, verdict = step.verdict(output, files)
    if not ended_well:
        last = output.strip().splitlines()[-1:] or ["no output"]
        passed, verdict = False, f"{verdict}; the command failed: {last[0][:200]}"
    seconds = time.monotonic() - start
    record.add(step, passed, seconds, verdict)
    print(f"  {'yes' if passed else 'NO'}, {seconds:.0f} s: {verdict}", flush=True)
    return passed


def take_all(todo: Iterable[Step], files: Files, minutes: float) -> list[str]:
    """Runs the steps that fit into the time. Returns the names of those that did not pass."""
    record, stop = Record(files), time.monotonic() + 60 * minutes
    missing = []
    for step in todo:
        if step.name in record.known:
            print(f"{step.name}: known, {record.known[step.name]}")
        elif time.monotonic() + step.limit > stop:
            print(f"{step.name}: left out, it may take {step.limit} s")
            missing.append(step.name)
        elif not take(step, files, record):
            missing.append(step.name)
            if step.name == "build":
                break
    return missing


def device_name() -> str:
    """As in the names of other results; SystemExit without a GPU."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"expected a machine with an NVIDIA GPU; nvidia-smi: {error}") from None
    return re.sub(r"[^a-z0-9]", "-", listed.splitlines()[0].lower())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60, help="for all steps [60]")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--python", default=sys.executable, help="with torch for CUDA")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--dry-run", action="store_true", help="name the steps, and run nothing")
    options = parser.parse_args(arguments)
    todo = steps(options.python)
    unknown = set(options.only or ()) - {step.name for step in todo}
    if unknown:
        parser.error(
            f"--only: expected {', '.join(s.name for s in todo)}, got {', '.join(sorted(unknown))}"
        )
    todo = [step for step in todo if not options.only or step.name in options.only]
    if options.dry_run:
        for step in todo:
            print(f"{step.name}: {step.question}\n  {shlex.join(step.command)}, {step.limit} s")
        return 0
    files = Files(options.out, device_name())
    missing = take_all(todo, files, options.minutes)
    if files.measured("attention"):
        print(*predictions(files), sep="\n")
    print(f"not answered: {', '.join(missing)}" if missing else "every question has its answer")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
