"""benchmarks/first_hour.py without a GPU: its steps, verdicts, time and resuming."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import time

import first_hour
import first_hour_verdicts as verdicts
import gpu
import pytest
from first_hour import Files, Step, take_all
from support.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"
H200 = Files(RESULTS, "nvidia-h200")


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(first_hour, "BUILD", tmp_path / "build")
    return Files(tmp_path / "results", "a-gpu")


def step(name, command, limit=20, verdict=verdicts.cases):
    return Step(name, "Does it?", ["sh", "-c", command], limit, verdict)


def recorded(files):
    return [(row["step"], row["status"], row["verdict"]) for row in files.rows("first-hour")]


GOOD = "echo 3 cases, 0 failed"


def test_verdicts_are_written_at_once_and_steps_go_on_after_a_failure(files):
    todo = [
        step("one", GOOD),
        step("two", "echo 3 cases, 1 failed; exit 1"),
        step("three", f"grep -c two {files.folder}/a-gpu-first-hour.csv; {GOOD}"),
    ]
    assert take_all(todo, files, minutes=5) == ["two"]
    assert recorded(files) == [
        ("one", "passed", "3 cases, 0 failed"),
        ("two", "failed", "3 cases, 1 failed; the command failed: 3 cases, 1 failed"),
        ("three", "passed", "3 cases, 0 failed"),
    ]
    assert (first_hour.BUILD / "two.log").read_text() == "3 cases, 1 failed\n"


def test_a_second_run_takes_the_missing_steps_alone(files, tmp_path):
    count = tmp_path / "count"
    todo = [step("one", f"echo 1 >> {count}; {GOOD}"), step("two", f"test -e {count}.2 && {GOOD}")]
    assert take_all(todo, files, minutes=5) == ["two"]
    (tmp_path / "count.2").touch()
    assert take_all(todo, files, minutes=5) == []
    assert count.read_text() == "1\n"
    assert [row[:2] for row in recorded(files)] == [
        ("one", "passed"),
        ("two", "failed"),
        ("two", "passed"),
    ]


def test_a_step_that_ran_out_of_time_is_taken_again(files):
    """With the words that gpu.py ends with."""
    todo = [step("one", f"{GOOD}; echo out of time: run again to go on")]
    for _ in range(2):
        assert take_all(todo, files, minutes=5) == ["one"]
    assert recorded(files) == [("one", "failed", "3 cases, 0 failed; out of time")] * 2


def test_other_kernels_are_measured_anew(files, monkeypatch):
    for digest, rows in (("a", 1), ("a", 1), ("b", 2)):
        monkeypatch.setattr(first_hour, "sources", lambda digest=digest: digest)
        assert take_all([step("one", GOOD)], files, minutes=5) == []
        assert len(recorded(files)) == rows


def test_a_step_that_takes_too_long_is_ended_with_its_children(files, tmp_path):
    child = tmp_path / "child"
    slow = step("slow", f"sleep 60 & echo $! > {child}; wait", limit=1)
    assert take_all([slow], files, minutes=5) == ["slow"]
    assert recorded(files)[0][2].endswith("the command failed: ended after 1 s")
    number, deadline = int(child.read_text()), time.monotonic() + 20
    while time.monotonic() < deadline:
        with (
            open(f"/proc/{number}/stat")
            if os.path.exists(f"/proc/{number}/stat")
            else open(os.devnull) as stat
        ):
            if (stat.read().split() or ["", "", "Z"])[2] == "Z":  # gone, or not yet waited for
                return
    pytest.fail("the child still runs")


def test_a_step_that_does_not_fit_is_left_out(files):
    todo = [step("long", GOOD, limit=400), step("short", GOOD)]
    assert take_all(todo, files, minutes=1) == ["long"]
    assert [row[0] for row in recorded(files)] == ["short"]


def test_nothing_follows_a_build_that_failed(files):
    assert take_all([step("build", "exit 1"), step("one", GOOD)], files, minutes=5) == ["build"]
    assert len(recorded(files)) == 1


def test_every_step_takes_less_than_eight_minutes_and_has_its_target():
    targets = (ROOT / "Makefile").read_text()
    for each in first_hour.steps("python3"):
        assert each.limit < 480, each
        command = " ".join(each.command)
        for word in command.split():
            if word.startswith("gpu-"):
                assert f"\n{word}:" in targets
            if word.startswith("benchmarks/"):
                assert (ROOT / word).exists()


def test_a_dry_run_names_the_steps():
    output = subprocess.run(
        [sys.executable, "benchmarks/first_hour.py", "--dry-run", "--only", "plans", "suite"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [line.split(":")[0] for line in output.splitlines()[::2]] == ["suite", "plans"]


def test_an_unknown_step(capsys):
    with pytest.raises(SystemExit):
        first_hour.main(["--only", "tests"])
    assert "expected build, suite" in capsys.readouterr().err


def test_without_a_gpu(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match="expected a machine with an NVIDIA GPU"):
        first_hour.main([])


# ---- verdicts ----


@pytest.mark.parametrize(
    ("output", "verdict"),
    (
        ("== 1731 passed, 1 skipped in 60 s ==", (True, "1731 passed, 0 failed")),
        ("== 2 failed, 9 passed, 1 error in 60 s ==", (False, "9 passed, 3 failed")),
        ("no tests ran", (False, "0 passed, 0 failed")),
    ),
)
def test_the_suite(output, verdict):
    assert verdicts.suite(output, H200) == verdict


@pytest.mark.parametrize(
    ("output", "verdict"),
    (
        ("a: ok\n2304 cases, 0 failed", (True, "2304 cases, 0 failed")),
        ("2304 cases, 2 failed", (False, "2304 cases, 2 failed")),
        ("0 cases, 0 failed", (False, "0 cases, 0 failed")),
        ("Segmentation fault", (False, "no count of cases")),
    ),
)
def test_the_cases(output, verdict):
    assert verdicts.cases(output, H200) == verdict


def test_the_sanitizers(files):
    files.folder.mkdir()
    for text, passed in (
        ("memcheck: clean: 9 cases\nracecheck: clean: 9 cases", True),
        ("memcheck: clean: 9 cases\nracecheck: ERRORS: 1 in 9 cases", False),
        ("", False),
    ):
        (files.folder / "a-gpu-sanitizer.txt").write_text(text)
        verdict = verdicts.sanitizers("", files)
        assert verdict[0] == passed and ("ERRORS" in verdict[1]) == ("ERRORS" in text)


def test_the_plans_of_the_committed_results():
    passed, verdict = verdicts.plans("", H200)
    words = r"the first plan is \d\.\d% slower than the best on average, \d+% at most, for \w+ward"
    assert passed and re.match(words, verdict)


def test_the_module_of_the_committed_results(monkeypatch):
    monkeypatch.setattr(verdicts, "sources", lambda: "others")
    assert verdicts.module("", H200) == (False, "nothing was measured")
    monkeypatch.setattr(verdicts, "sources", lambda: measured)
    measured = next(r["sources"] for r in H200.rows("gpu") if r["kind"] == "share")
    passed, verdict = verdicts.module("", H200)
    assert passed and "merged groups gain up to" in verdict


def test_the_epilogue(files):
    assert verdicts.epilogue("", files) == (False, "nothing was measured")
    case = {
        "kind": "epilogue", "mode": "forward", "layout": "contiguous", "dtype": "float32",
        "n": "64", "planes": "64", "size": "56", "sources": verdicts.sources(),
    }  # fmt: skip
    times = {"fused": "100", "fused, then layers": "250", "rewrite compiled": "150"}
    rows = [case | {"contender": name, "device_us": us} for name, us in times.items()]
    rows.append(rows[0] | {"n": "1"})  # its opponents are missing still
    files.folder.mkdir()
    with (files.folder / "a-gpu-gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert verdicts.epilogue("", files) == (
        True,
        "1 cases: 2.50 to 2.50 times as fast as fused, then layers, 1.50 to 1.50 times as fast as "
        "rewrite compiled",
    )


def write_times(files, base, times, **change):
    """Rows of one case, by contender; a case whose opponents are missing; one of other kernels."""
    base = {
        "layout": "channels_last", "planes": "64", "size": "56", "timing": "graph",
        "sources": verdicts.sources(),
    } | base | change  # fmt: skip
    rows = [base | {"contender": name, "device_us": us} for name, us in times.items()]
    rows += [rows[0] | {"n": "1"}, rows[0] | {"n": "2"}, rows[0] | {"n": "3"}]
    rows += [row | {"n": "2", "sources": "others"} for row in rows[1 : len(times)]]
    rows += [row | {"n": "3", "kind": "share", "mode": "forward"} for row in rows[1 : len(times)]]
    files.folder.mkdir(exist_ok=True)
    with (files.folder / "a-gpu-gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


TIMES = {"fused": "1000", "layers": "1500", "published eager": "2500"}


def test_training(files):
    assert verdicts.training("", files) == (False, "nothing was measured")
    case = {"kind": "module", "mode": "train", "dtype": "bfloat16", "n": "64"}
    write_times(files, case, TIMES)
    words = "1.50 to 1.50 times as fast as layers, 2.50 to 2.50 times as fast as published eager"
    assert verdicts.training("", files) == (True, f"1 cases; bfloat16: {words}")
    compiled = "published compiled"
    assert verdicts.training("", files, compiled) == (False, "nothing was measured")
    write_times(files, case, TIMES | {compiled: "1250"}, timing="launched")
    assert verdicts.training("", files, compiled) == (
        True,
        f"1 cases; bfloat16: {words}, 1.25 to 1.25 times as fast as {compiled}; "
        "7 rows were not captured in a graph",
    )
    write_times(files, case, TIMES, mode="forward")  # inference
    assert verdicts.training("", files) == (False, "nothing was measured")


def test_network(files):
    assert verdicts.network("", files) == (False, "nothing was measured")
    case = {"kind": "network", "mode": "train", "dtype": "autocast bfloat16", "n": "64"}
    write_times(files, case, TIMES | {"published compiled": "1250"})
    assert verdicts.network("", files) == (
        True,
        "1 cases, 2.50 to 2.50 times as fast as published eager; "
        "train autocast bfloat16 64: 1.0 ms, 2.50 times",
    )
    assert "1.25 to 1.25" in verdicts.network("", files, "published compiled")[1]
    write_times(files, case, {"published eager": "2500", "layers": "1500"})
    assert verdicts.network("", files) == (False, "nothing was measured")


def test_the_parts_of_the_benchmark_are_those_that_it_has():
    """The command's own parser reads the steps' arguments."""
    asked = {}
    for each in first_hour.steps("python3"):
        if "benchmarks/gpu.py" in each.command:
            given = each.command[each.command.index("benchmarks/gpu.py") + 1 :]
            asked[each.name] = gpu.make_parser().parse_args(given)
    assert {options.part for options in asked.values()} == {*gpu.PARTS}
    for name, options in asked.items():
        limit = next(s.limit for s in first_hour.steps("python3") if s.name == name)
        assert limit - 60 * options.minutes >= 50  # for what began just before
    for part in ("network", "training"):
        assert asked[part].no_compile and not asked[f"{part}-compiled"].no_compile


def write_gpu(files, **change):
    """Rows of one case: fused, a copy and an opponent of twice the time."""
    files.folder.mkdir(exist_ok=True)
    base = {
        "kind": "attention", "mode": "forward", "layout": "contiguous", "dtype": "float32",
        "n": "64", "planes": "64", "size": "56", "kernels": "1", "memsets": "0",
        "sources": first_hour.sources(), "of_copy": "0.9", "device_us": "100",
    } | change  # fmt: skip
    rows = [
        base | {"contender": "fused"},
        base | {"contender": "copy", "device_us": "50"},
        base | {"contender": "rewrite compiled", "device_us": "200"},
        base | {"contender": "fused", "sources": "others", "kernels": "9"},
    ]
    with (files.folder / "a-gpu-gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    ("change", "passed", "words"),
    (
        ({}, True, "1 cases, 0 with more than one kernel; 2.00x to 2.00x the opponents; 0 targets"),
        ({"kernels": "2"}, False, "1 with more than one kernel"),
        ({"of_copy": "0.6"}, True, "1 targets missed: forward (64, 64, 56) 60%"),
        ({"n": "1", "of_copy": "0.1"}, True, "1 targets missed: forward (1, 64, 56) 100.0 us"),
        ({"planes": "512", "of_copy": "0.1"}, True, "0 targets missed"),
    ),
)
def test_the_attention_step(files, change, passed, words):
    write_gpu(files, **change)
    verdict = verdicts.attention("", files)
    assert verdict[0] == passed and words in verdict[1]


def test_predictions(files):
    known = Files(files.folder, "nvidia-h200")
    write_gpu(files)
    assert verdicts.predictions(files) == ["roofline.py does not know a-gpu"]
    (files.folder / "a-gpu-gpu.csv").rename(files.folder / "nvidia-h200-gpu.csv")
    spaced = Files(files.folder, "nvidia-geforce-rtx-4090")
    assert verdicts.predictions(spaced) == ["roofline.py: nothing was measured"]
    # 103 MB at 4.8 TB/s take 21.4 us
    assert verdicts.predictions(known) == [
        "4.7 to 4.7 times the floor of the memory's traffic, 0 of 1 cases below it",
        "kernels and memsets as predicted",
    ]


def test_the_command_compares_with_predictions_where_nothing_is_installed(files, tmp_path):
    write_gpu(files)
    (files.folder / "a-gpu-gpu.csv").rename(files.folder / "nvidia-h200-gpu.csv")
    todo = step("build", "true", verdict=verdicts.built)
    assert take_all([todo], Files(files.folder, "nvidia-h200"), minutes=5) == []
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H200\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    hidden = (
        "import runpy, sys\n"
        "sys.path = [path for path in sys.path if path != sys.argv[1]]\n"
        "sys.argv[:3] = [sys.argv[2]]\n"
        "sys.path[0] = sys.argv[0].rpartition('/')[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    program = ROOT / "benchmarks" / "first_hour.py"
    command = [sys.executable, "-c", hidden, ROOT, program, "--only", "build"]
    output = subprocess.run(
        [*command, "--out", files.folder], cwd=tmp_path, env=environment, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert output.splitlines() == [
        "build: known, built",
        "4.7 to 4.7 times the floor of the memory's traffic, 0 of 1 cases below it",
        "kernels and memsets as predicted",
        "every question has its answer",
    ]
