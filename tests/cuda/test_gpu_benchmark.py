"""benchmarks/gpu.py on small cases: on the CPU with a stand-in for its meter, on a GPU with it."""

import csv
import math
import shutil

import gpu
import gpu_attention
import gpu_convolutions
import gpu_epilogue
import gpu_modules
import pytest
import torch
from first_hour import Files
from gpu_bench import Bench
from gpu_results import FIELDS, Results, key_of
from gpu_timing import Meter
from opponents import Case
from support.paths import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from epsa_fused import PSAModule

FACTS = {
    **{"device": "A GPU", "torch": "2.11.0+cu130", "cuda": "13.0", "sources": "0123456789ab"},
    **{"commit": "1234567", "date": "2026-01-31"},
}
LAYOUTS = ("contiguous", "channels_last")
COMMITTED = ROOT / "benchmarks" / "results" / "nvidia-h200-gpu.csv"


class Capturing(TorchDispatchMode):
    """Refuses what a graph cannot capture: reading a result on the host."""

    READS = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.equal,
        torch.ops.aten.is_nonzero,
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in self.READS:
            raise RuntimeError(f"{function}: operation not permitted when stream is capturing")
        return function(*args, **(kwargs or {}))


class StandIn(Meter):
    """Runs everything that the real one runs, and gives figures that nobody measured."""

    device = "cpu"

    def synchronize(self):
        pass

    def sets(self, nbytes):
        return 2

    def capture(self, calls):
        with Capturing():
            for call in calls:
                call()
        return lambda: [call() for call in calls]

    def elapsed(self, run):
        run()
        return 2e-6

    def launches(self, call):
        call()
        return 7, 1

    def peak_memory(self, call):
        call()
        return 5_000_000


@pytest.fixture(autouse=True)
def _one_thread():
    """Small networks' gradients take a multiple of the time with more."""
    torch.set_num_threads(1)


@pytest.fixture
def meter(device):
    if device == "cpu":
        yield StandIn(2)
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield Meter(2)


def new_bench(meter, folder, **options):
    return Bench(meter, Results(folder / "a-gpu-gpu.csv", FACTS), **options)


@pytest.fixture
def bench(meter, tmp_path, compiled):
    return new_bench(meter, tmp_path)


@pytest.fixture
def compiled(monkeypatch):
    """What would be compiled. Compilers have tests of their own, and take long."""
    found = []

    def note(function, **options):
        found.append(function)
        return function

    monkeypatch.setattr(torch, "compile", note)
    return found


def rows(bench):
    with bench.results.path.open(newline="") as file:
        return list(csv.DictReader(file))


def contenders(bench):
    return [row["contender"] for row in rows(bench)]


FIGURES = ("device_us", "iqr_us", "wall_us", "peak_mb", "kernels", "memsets")


def assert_measured(row, error, figures=FIGURES):
    assert row["timing"] == "graph"
    for name in figures:
        assert float(row[name]) >= 0, name
    assert float(row["device_us"]) > 0
    assert float(row["error"]) < error
    assert row["sources"] == FACTS["sources"]


# ---- parts ----


def test_the_attention_step(bench):
    for mode in ("forward", "backward"):
        case = Case("attention", mode, "channels_last", "bfloat16", 2, 64, 8)
        for names in gpu_attention.PASSES:
            gpu_attention.run(case, names, bench)
    assert bench.failed == []
    assert contenders(bench) == ["copy", *(n for names in gpu_attention.PASSES for n in names)] * 2
    for row in rows(bench):
        if row["contender"] == "copy":
            assert float(row["gb_per_s"]) >= 0 and not row["error"]
        else:
            # plain PyTorch loses gradients of the SE in 16 bits
            exact = row["mode"] == "forward" or row["contender"] == "fused"
            assert_measured(row, 0.02 if exact else math.inf)
            assert row["of_copy"]


def test_the_epilogue(bench):
    case = Case("attention", "forward", "contiguous", "float32", 2, 64, 8)
    gpu_epilogue.run(case, bench)
    assert bench.failed == []
    assert contenders(bench) == ["fused", "fused, then layers", "rewrite compiled"]
    for row in rows(bench):
        assert_measured(row, 1e-5)
        assert row["kind"] == "epilogue"


def test_modules(bench):
    gpu_modules.run(Case("module", "forward", "channels_last", "bfloat16", 2, 64, 8), bench)
    assert bench.failed == []
    assert contenders(bench) == ["fused", "layers", "published eager"]
    for row in rows(bench):
        assert_measured(row, 0.03)


@pytest.mark.parametrize("dtype", ("float32", "tf32", "bfloat16"))
def test_the_convolutions(dtype, bench):
    gpu_convolutions.run(Case("share", "forward", "contiguous", dtype, 2, 64, 8), bench)
    assert bench.failed == []
    merged = [name for name in contenders(bench) if "groups" in name]
    assert {*contenders(bench)} - {*merged} == {"attention", *(f"conv {i}" for i in (1, 2, 3, 4))}
    assert len(merged) == (0 if dtype == "float32" else 2 + 3 + 4)
    assert all(float(row["device_us"]) > 0 for row in rows(bench))


def test_merged_groups_give_the_same_results():
    module = PSAModule(64, 64).double()
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    pairs = dict(gpu_convolutions.convolutions(module, torch.contiguous_format, merge=True))
    for name, convolution in pairs.items():
        torch.testing.assert_close(convolution(x), pairs[name[: len("conv 1")]](x))


def test_what_reads_on_the_host_is_timed_as_launched(capsys):
    """On a GPU a failed capture would spoil those of the tests after it."""
    meter, x = StandIn(2), torch.ones(2)
    for call, expected in ((lambda: x * 2, "graph"), (lambda: (x * 2).sum().item(), "launched")):
        assert meter.time_columns([call])["timing"] == expected
    assert "not captured, timed as launched" in capsys.readouterr().err


# ---- resuming, time ----


def test_a_second_run_measures_the_missing_rows_alone(meter, tmp_path, compiled):
    case = Case("attention", "forward", "contiguous", "float32", 2, 64, 8)
    for names in (("fused",), ("fused", "rewrite eager")):
        gpu_attention.run(case, names, new_bench(meter, tmp_path))
    bench = new_bench(meter, tmp_path)
    assert contenders(bench) == ["copy", "fused", "rewrite eager"]
    other = Bench(meter, Results(bench.results.path, FACTS | {"sources": "others"}))
    gpu_attention.run(case, ("fused",), other)
    assert len(rows(other)) == 3 + 2


def test_no_step_begins_after_the_time(bench, monkeypatch):
    begun = []
    steps = (lambda bench: iter([lambda: begun.append(1)] * 3),)
    monkeypatch.setitem(gpu.PARTS, "module", steps)
    assert not gpu.run_part("module", bench, -1) and begun == []
    assert gpu.run_part("module", bench, 5) and len(begun) == 3


# ---- the file ----


def test_the_committed_results_are_still_read(tmp_path):
    path = tmp_path / "nvidia-h200-gpu.csv"
    shutil.copy(COMMITTED, path)
    with path.open(newline="") as file:
        before = list(csv.DictReader(file))
    sources = before[-1]["sources"]
    results = Results(path, FACTS | {"sources": sources})
    assert {key_of(row) for row in before if row["sources"] == sources} == results.done
    key = {"kind": "network", "mode": "train", "layout": "contiguous", "dtype": "bfloat16"}
    key |= {"n": 64, "planes": 50, "size": 224, "contender": "fused"}
    results.add(key | {"device_us": 1.5, "reference": "float64"})
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        *after, new = list(reader)
    assert reader.fieldnames == FIELDS
    assert [{k: row[k] for k in before[0]} for row in after] == before
    assert (new["reference"], new["se_error"], new["sources"]) == ("float64", "", sources)
    assert key_of(new) in Results(path, FACTS | {"sources": sources}).done
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert len(Files(tmp_path, "nvidia-h200").rows("gpu")) == len(before) + 1


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "a-gpu-gpu.csv"
    path.write_text("contender,median_us\nfused,10\n")
    with pytest.raises(SystemExit, match="expected the columns of this benchmark"):
        Results(path, FACTS)


# ---- the command ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    (
        (("--part", "load"), "--part: invalid choice: 'load'"),
        (("--repeats", "1"), "--repeats: expected at least 2, got 1"),
        (("--minutes", "few"), "--minutes: invalid float value: 'few'"),
    ),
)
def test_wrong_options(arguments, said, capsys):
    with pytest.raises(SystemExit):
        gpu.main(list(arguments))
    assert said in capsys.readouterr().err


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--part", "module"])
    assert "expected a GPU and a build with CUDA kernels; found GPU False" in (
        capsys.readouterr().err
    )
