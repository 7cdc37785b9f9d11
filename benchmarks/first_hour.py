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
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import first_hour_verdicts as verdicts
from first_hour_verdicts import ROOT, Files, Verdict
from provenance import commit, sources

BUILD = ROOT / "build" / "gpu"
OUT_OF_TIME = "out of time"  # as gpu.py says
FIELDS = ("step", "status", "seconds", "verdict", "sources", "commit", "date")


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
    bench = ["env", "PYTHONPATH=.", python, "benchmarks/gpu.py", "--part"]
    program = str(BUILD / "cases")
    compiled = "published compiled"
    # What begins before the minutes are over may be a compilation, so the limit is later.
    return [
        Step("build", "Does it compile?", [*make, "build/gpu/built"], 470, verdicts.built),
        Step("suite", "Do the operator's tests pass, a capture without warm-up among them?",
             [*make, "gpu-test"], 470, verdicts.suite),
        Step("cases", "Does every plan pass, without torch?",
             ["sh", "-c", f"make build/gpu/cases && {program}"], 300, verdicts.cases),
        Step("ptx", "Do kernels pass that the driver compiled from PTX of 8.0?",
             ["sh", "-c", f"make build/gpu/cases-ptx && {program}-ptx --quick --part 0/8"], 300,
             verdicts.cases),
        Step("plans", "Is the best plan ranked first?", [*make, "gpu-plans"], 240, verdicts.plans),
        Step("attention", "How fast is the attention step?",
             [*bench, "attention", "--minutes", "7"], 470, verdicts.attention),
        Step("network", "How fast is EPSANet-50, in inference and in training?",
             [*bench, "network", "--minutes", "6", "--no-compile"], 470, verdicts.network),
        Step("training", "How fast is a module's forward and backward pass?",
             [*bench, "training", "--minutes", "6.5", "--no-compile"], 470, verdicts.training),
        Step("epilogue", "What do BatchNorm and ReLU gain in the same pass?",
             [*bench, "epilogue", "--minutes", "5"], 470, verdicts.epilogue),
        Step("sanitizers", "Do the sanitizers report anything?",
             ["bash", "benchmarks/sanitize.sh", program, "440"], 470, verdicts.sanitizers),
        Step("network-compiled", "How fast is EPSANet-50 against the published one, compiled?",
             [*bench, "network", "--minutes", "5"], 470,
             partial(verdicts.network, opponent=compiled)),
        Step("training-compiled", "And a module's forward and backward pass?",
             [*bench, "training", "--minutes", "6.5"], 470,
             partial(verdicts.training, opponent=compiled)),
        Step("module", "Which part of a module is the attention step?",
             [*bench, "module", "--minutes", "7"], 470, verdicts.module),
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
    if OUT_OF_TIME in output:  # a further run of the step takes the rows that are missing
        passed, verdict = False, f"{verdict}; {OUT_OF_TIME}"
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
        print(*verdicts.predictions(files), sep="\n")
    print(f"not answered: {', '.join(missing)}" if missing else "every question has its answer")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
