"""benchmarks/roofline.py against arithmetic by hand."""

import csv

import pytest
import roofline
from support.processes import python


def test_the_floor_of_stage_1_on_an_h100(tmp_path):
    """64 samples of 64 x 56 x 56 floats are 51 380 224 bytes. Reading and writing them once takes
    30.7 us at 3350 GB/s. The backward pass moves half as much again."""
    path = tmp_path / "made" / "roofline.csv"
    text = python(roofline.__file__, "--batch", "64", "--dtype", "float32", "--out", str(path))
    assert "H100 SXM (sm_90, 132 multiprocessors) at 3350 GB/s" in text
    assert f"wrote {path}" in text
    with path.open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * 2 * 4  # passes, layouts, stages
    forward, backward = (
        next(
            r
            for r in table
            if r["pass"] == pass_ and r["layout"] == "contiguous" and r["planes"] == "64"
        )
        for pass_ in ("forward", "backward")
    )
    assert int(forward["bytes"]) == 2 * 51380224
    assert float(forward["floor_us"]) == pytest.approx(30.675, abs=1e-3)
    assert int(backward["bytes"]) == 3 * 51380224
    assert float(backward["floor_us"]) == pytest.approx(46.012, abs=1e-3)
    # Clusters hold a sample: one read. No counter needs a memset.
    for row in (forward, backward):
        assert (row["variant"], row["l2_bytes"], row["memsets"]) == ("resident", "0", "0")


def test_streaming_reads_the_features_again():
    """An A100 has no clusters. Each of its 108 multiprocessors holds 4 blocks of 256 threads:
    registers limit it to 1024 of 2048 threads. All blocks run at once."""
    row = roofline.row(
        roofline.DEVICES["a100"], 2000, "forward", "contiguous", "bfloat16", 64, 64, 56
    )
    assert (row["variant"], row["memsets"]) == ("streaming", 1)
    assert row["l2_bytes"] == 64 * 64 * 56 * 56 * 2
    assert row["floor_us"] == pytest.approx(2 * row["l2_bytes"] / 2e6, abs=1e-3)
    assert (row["blocks_per_sm"], row["occupancy"], row["waves"]) == (4, 0.5, 1)
    assert row["blocks"] == 4 * 108


def test_large_blocks_are_few_on_a_multiprocessor():
    """A sample has 802 816 bytes. Each of 8 blocks in a cluster holds 100 352, and 3088 bytes of
    sums and small vectors. A multiprocessor has 233 472 bytes; the system takes 1024 a block."""
    row = roofline.row(
        roofline.DEVICES["h100"], 3350, "forward", "contiguous", "float32", 64, 64, 56
    )
    assert (row["cluster"], row["shared_bytes"], row["blocks"]) == (8, 103440, 512)
    assert row["blocks_per_sm"] == 233472 // (103440 + 1024) == 2
    assert row["waves"] == 2  # 512 blocks, 264 at once


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--bandwidth", "0"], "--bandwidth: expected GB/s above 0, got 0.0"),
        (["--batch", "32", "0"], "--batch: expected numbers of at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(wrong, message, capsys):
    with pytest.raises(SystemExit):
        roofline.main(wrong)
    assert message in capsys.readouterr().err
