"""benchmarks/sanitize.sh with stand-ins for the GPU's tools: what it reports, and its exit code."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from support.paths import ROOT

# The sanitizer's stand-in ends as the variable of its tool's name says. It runs in two parts.
TOOLS = {
    "nproc": "echo 3",
    "nvidia-smi": 'case "$*" in *driver*) echo 1.2 ;; *) echo "A GPU" ;; esac',
    "compute-sanitizer": """
        sleep 0.3  # longer than the program without a tool
        case "${!2}" in
          clean) echo "part ${!#}: ok, error 0.1"; echo "========= ERROR SUMMARY: 0 errors" ;;
          errors) echo "a: ok"; echo "========= ERROR SUMMARY: 2 errors"; exit 99 ;;
          half) [ "${!#}" = 0/2 ] || exit 99; echo "a: ok" ;;
          refused) echo "========= Error: device not supported"; exit 1 ;;
          slow) echo "a: ok"; echo "========= Invalid __global__ read"; exec sleep 60 ;;
        esac""",
    "program": 'echo "a: ok"; echo "1 cases, 0 failed"',
    "broken": 'echo "a: FAILED: wrong"; echo "1 cases, 1 failed"; exit 1',
}
CLEAN = dict.fromkeys(("memcheck", "synccheck", "initcheck", "racecheck"), "clean")


def sanitized(folder, program: str = "program", **ends: str) -> tuple[str, int]:
    for name, code in TOOLS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (folder / name).chmod(0o755)
    script = shutil.copy(ROOT / "benchmarks" / "sanitize.sh", folder)
    (folder / "results").mkdir()
    result = subprocess.run(
        ["bash", script, folder / program, "2"],
        env=os.environ | CLEAN | ends | {"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    report = (folder / "results" / "a-gpu-sanitizer.txt").read_text()
    assert result.stdout == report and result.stderr == ""
    return report, result.returncode


def test_every_tool_is_waited_for(tmp_path):
    report, code = sanitized(tmp_path)
    assert report.splitlines() == [
        "A GPU, driver 1.2",
        "without a tool: 1 cases, 0 failed",
        *(f"{tool}: clean: 2 cases" for tool in CLEAN),
    ]
    assert code == 0


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("errors", "racecheck: ERRORS: 4 in 2 cases"),
        ("half", "racecheck: ERRORS: 0 in 1 cases"),
        ("refused", "racecheck: did not run (status 1): ========= Error: device not supported"),
        ("slow", "racecheck: not finished in 2 s: 2 cases, 2 reports"),
    ],
)
def test_a_tool_that_does_not_end_clean_fails_the_run(end, words, tmp_path):
    report, code = sanitized(tmp_path, racecheck=end)
    assert words in report.splitlines()
    assert code == 1


def test_a_failed_case_fails_the_run(tmp_path):
    report, code = sanitized(tmp_path, "broken")
    assert "a: FAILED: wrong" in report.splitlines()
    assert code == 1
