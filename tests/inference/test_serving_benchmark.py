"""benchmarks/serving.py on small images, without the contenders that compile."""

import csv
import json
import subprocess

import pytest
import serving
import serving_results
import torch
from serving_contenders import CONTENDERS, Contender, Setting, prepare, why_not
from serving_start import LOGITS, start
from support.optional import optional
from support.paths import ROOT
from support.processes import run_code

QUICK = ("--size", "32", "--rounds", "1", "--seconds", "0.01", "--starts", "1", "--batch", "1")
SPEED = (*QUICK, "--part", "speed")
NAMES = ("published", "fused, packed", "optimize_for_inference, compile=False")


def run(folder, *arguments):
    path = serving.main([*arguments, "--out", str(folder)])
    return list(csv.DictReader(path.open()))


# ---- speed and start ----


def test_speed(tmp_path, capsys):
    rows = run(tmp_path, *SPEED, "--batch", "1", "2", "--contender", *NAMES)
    assert [row["contender"] for row in rows] == list(NAMES) * 4
    assert {(row["dtype"], row["batch"]) for row in rows} == {
        (dtype, batch) for dtype in ("float32", "bfloat16") for batch in ("1", "2")
    }
    for row in rows:
        assert row["part"] == "speed" and float(row["median_ms"]) > 0
        assert float(row["images_per_s"]) == pytest.approx(
            int(row["batch"]) / float(row["median_ms"]) * 1e3, rel=0.05
        )
        assert float(row["error"]) < 0.1 and row["isa"] and row["commit"]
        assert not row["start_s"] and not row["memory_mb"]
    assert "images/s" in capsys.readouterr().out


def test_each_start_is_a_process_of_its_own(tmp_path, monkeypatch):
    """With caches of its own for Inductor, and the threads that were asked for."""
    started = []
    really_run = subprocess.run

    def record(command, **options):
        if command[0] != "git":
            started.append((command[2], options["env"]))
        return really_run(command, **options)

    monkeypatch.setattr("subprocess.run", record)
    options = ("--part", "start", "--threads", "1", "--dtype", "bfloat16", "--starts", "2")
    rows = run(tmp_path, *QUICK, *options, "--contender", *NAMES[:2])
    assert [name for name, _ in started] == [*NAMES[:2], *NAMES[:2]]
    assert len({environment["TORCHINDUCTOR_CACHE_DIR"] for _, environment in started}) == 4
    assert {environment["OMP_NUM_THREADS"] for _, environment in started} == {"1"}
    assert [row["contender"] for row in rows] == list(NAMES[:2])
    for row in rows:
        assert row["part"] == "start" and not row["median_ms"]
        assert float(row["start_s"]) > 0 and int(row["memory_mb"]) > 50
        assert float(row["error"]) < 0.1


@pytest.mark.parametrize("name", ("OpenVINO", "ONNX Runtime"))
def test_those_that_load_a_file_start_without_torch(name, tmp_path):
    for package in ("onnx", CONTENDERS[name].package):
        optional(package)
    prepare(tmp_path, torch.zeros(2, 3, 32, 32), [name])
    given = json.dumps({"dtype": "float32", "threads": 1, "folder": str(tmp_path)})
    code = f"""
        import sys
        import serving_start
        serving_start.main({name!r}, {given!r})
        import numpy
        logits = numpy.load({str(tmp_path / LOGITS)!r})
        print(logits.shape, "torch" in sys.modules)
    """
    assert "(2, 1000) False" in run_code(code, PYTHONPATH=str(ROOT / "benchmarks"))


def test_a_process_that_fails_ends_the_run(tmp_path):
    setting = Setting("float32", 1, tmp_path)  # without images
    with pytest.raises(SystemExit, match=r"published: its process ended with 1\n[^$]*images.npy"):
        start("published", setting, ROOT)


# ---- what is refused ----


def test_a_wrong_contender_ends_the_run(monkeypatch, tmp_path):
    def wrong(setting):
        right = CONTENDERS["published"].load(setting)
        return lambda: right() * 1.1

    monkeypatch.setitem(CONTENDERS, "fused, packed", Contender(wrong))
    with pytest.raises(SystemExit, match=r"fused, packed, float32: error .* expected at most"):
        run(tmp_path, *SPEED, "--contender", "fused, packed")


def test_contenders_that_are_not_installed_are_left_out(monkeypatch, tmp_path, capsys):
    missing = Contender(CONTENDERS["OpenVINO"].load, package="no_such_package")
    monkeypatch.setitem(CONTENDERS, "OpenVINO", missing)
    assert why_not("ONNX Runtime", "bfloat16") == "no bfloat16"
    assert why_not("published", "bfloat16") is None
    rows = run(tmp_path, *SPEED, "--dtype", "float32", "--contender", "OpenVINO", "published")
    assert [row["contender"] for row in rows] == ["published"]
    assert "left out: OpenVINO in float32, no_such_package not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    (
        (("--batch", "0"), "--batch: expected at least 1, got 0"),
        (("--threads", "-1"), "--threads: expected at least 1, got -1"),
        (("--seconds", "0"), "--seconds: expected more than 0, got 0.0"),
        (("--table", "none.csv"), "--table: expected a result's CSV, found no file none.csv"),
        (("--part", "load"), "--part: invalid choice: 'load'"),
        (("--contender", "TVM"), "--contender: invalid choice: 'TVM'"),
        (("--dtype", "float16"), "--dtype: invalid choice: 'float16'"),
    ),
)
def test_wrong_options(arguments, said, capsys):
    with pytest.raises(SystemExit):
        serving.main(list(arguments))
    assert said in capsys.readouterr().err


# ---- results by pieces ----

FACTS = {
    **{"size": "224", "device": "a processor", "isa": "avx2", "versions": "torch 2.13.0"},
    **{"commit": "1234567", "date": "2026-01-31"},
}


def row(contender="published", median=10.0, **values):
    key = {"part": "speed", "contender": contender, "dtype": "float32", "batch": 1, "threads": 2}
    return key | {"median_ms": median} | FACTS | values


def test_pieces_merge_by_key(tmp_path):
    path = tmp_path / "new" / "serving.csv"
    serving_results.merge(path, [row(), row("fused, packed", 5.0), row(threads=1, median=20.0)])
    begun = row(part="start", median="", start_s=2.5)
    serving_results.merge(path, [begun, row(median=9.0, commit="89abcde")])
    found = serving_results.read(path)
    assert [(r["part"], r["contender"], r["threads"], r["median_ms"]) for r in found] == [
        ("speed", "published", "2", "9.0"),  # the new one, in the place of the old
        ("speed", "fused, packed", "2", "5.0"),
        ("speed", "published", "1", "20.0"),
        ("start", "published", "2", ""),
    ]
    assert [r["commit"] for r in found] == ["89abcde", "1234567", "1234567", "1234567"]
    assert [entry.name for entry in path.parent.iterdir()] == ["serving.csv"]


def test_a_second_run_adds_to_the_first(tmp_path):
    options = (*SPEED, "--dtype", "float32", "--contender", "published")
    run(tmp_path, *options)
    rows = run(tmp_path, *options, "--batch", "2", "1")
    assert [row["batch"] for row in rows] == ["1", "2"]
    with pytest.raises(SystemExit, match=r"rows of size '32', this run is of '64'; .* --name"):
        run(tmp_path, *options, "--size", "64")


@pytest.mark.parametrize("name", ("size", "device", "isa", "versions"))
def test_rows_of_another_machine_are_refused(name, tmp_path):
    path = tmp_path / "serving.csv"
    serving_results.check_facts(path, FACTS)
    serving_results.merge(path, [row()])
    serving_results.check_facts(path, FACTS | {"commit": "unknown", "date": "2027-01-01"})
    with pytest.raises(SystemExit, match=f"has rows of {name} .* this run is of 'other'"):
        serving_results.check_facts(path, FACTS | {name: "other"})


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "serving.csv"
    path.write_text("contender,median_ms\npublished,10\n")
    with pytest.raises(SystemExit, match="expected the columns of this benchmark"):
        serving_results.check_facts(path, FACTS)


# ---- tables ----


def test_tables(tmp_path, capsys):
    """test_pages.py compares those of docs/serving.md with the committed results."""
    path = tmp_path / "serving.csv"
    rows = [
        row(contender, median, dtype=dtype, batch=batch)
        for contender, dtype, *medians in (
            ("published", "float32", 90.0, 401.0),
            ("published, frozen", "float32", 60.0, 300.0),
            ("optimize_for_inference", "float32", 40.0, 200.0),
            ("optimize_for_inference", "bfloat16", 16.0, 50.0),
            ("OpenVINO", "bfloat16", 18.4, 99.6),
        )
        for batch, median in zip((1, 8), medians, strict=True)
    ]
    rows += [row(threads=1, median=180.0)]
    rows += [row(part="start", start_s=3.14, memory_mb=300)]
    for entry in rows:
        entry["versions"] = "torch 2.13.0+cpu, openvino 2026.4.1"
    serving_results.merge(path, rows)
    serving.main(["--table", str(path)])
    two, one, starts = capsys.readouterr().out.strip().split("\n\n")
    for line in (
        "| step | needs | float32, batch 1 / 8 | over the step before | bfloat16, batch 1 / 8 |",
        "| 1. published code, channels_last | | 90 / 401 | | - |",
        "| 2. the same, compiled and frozen | a C++ compiler | 60 / 300 | 1.5x / 1.3x | - |",
        "| 6. the same, `dtype=torch.bfloat16` | a C++ compiler, AMX or AVX512_BF16 | "
        "| 2.5x / 4.0x | 16 / 50 |",
        "| OpenVINO 2026.4 | openvino | - | | 18 / 100 |",
    ):
        assert line in two.splitlines()
    assert "| 1. published code, channels_last | | 180 | | - |" in one.splitlines()
    assert starts.splitlines()[2] == "| published code, channels_last | 3.1 | 300 | - | - |"
