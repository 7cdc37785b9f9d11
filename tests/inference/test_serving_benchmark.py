"""benchmarks/serving.py on small images, without the contenders that compile."""

import csv

import pytest
import serving

QUICK = ("--size", "32", "--rounds", "1", "--seconds", "0.01", "--batch", "1", "2")
CONTENDERS = ("published", "fused, packed", "optimize_for_inference, compile=False")


def test_rows(tmp_path, capsys):
    path = serving.main([*QUICK, "--contender", *CONTENDERS, "--out", str(tmp_path)])
    rows = list(csv.DictReader(path.open()))
    assert [row["contender"] for row in rows] == list(CONTENDERS) * 4
    assert {(row["dtype"], row["batch"]) for row in rows} == {
        (dtype, batch) for dtype in ("float32", "bfloat16") for batch in ("1", "2")
    }
    for row in rows:
        assert float(row["median_ms"]) > 0 and float(row["load_s"]) >= 0
        assert float(row["images_per_s"]) == pytest.approx(
            int(row["batch"]) / float(row["median_ms"]) * 1e3, rel=0.05
        )
        assert float(row["error"]) < 0.1 and row["isa"] and row["commit"]
    assert "images/s" in capsys.readouterr().out


def test_a_wrong_contender_ends_the_run(monkeypatch, tmp_path):
    def wrong(images, threads):
        run = serving.published(images, threads)
        return lambda: run() * 1.1

    monkeypatch.setitem(serving.CONTENDERS, "fused, packed", wrong)
    with pytest.raises(SystemExit, match=r"fused, packed, float32: error .* expected at most"):
        serving.main([*QUICK, "--contender", "fused, packed", "--out", str(tmp_path)])


def test_contenders_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setitem(serving.NEEDS, "OpenVINO", "no-such-package")
    assert not serving.takes_part("OpenVINO", "float32")
    assert not serving.takes_part("ONNX Runtime", "bfloat16")
    assert serving.takes_part("published", "bfloat16")
