"""benchmarks/gpu.py on small cases: on the CPU with a stand-in for its meter, on a GPU with it."""

import csv
import math
import shutil

import gpu
import gpu_attention
import gpu_convolutions
import gpu_epilogue
import gpu_modules
import gpu_networks
import gpu_training
import pytest
import torch
from first_hour import Files
from gpu_bench import Bench
from gpu_networks import AUTOCAST
from gpu_results import FIELDS, Results, key_of
from gpu_timing import WARM_UP, Meter
from opponents import Case, LayersModule, Step
from support.networks import narrow
from support.paths import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from epsa_fused import FusedPSAModule, PSAModule

FACTS = {
    **{"device": "A GPU", "torch": "2.11.0+cu130", "cuda": "13.0", "sources": "0123456789ab"},
    **{"programs": "ba9876543210", "commit": "1234567", "date": "2026-01-31"},
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


# ---- training of modules ----


def training_case(dtype="bfloat16", layout="channels_last"):
    return Case("module", "train", layout, dtype, 2, 64, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_training(dtype, layout, bench, compiled):
    case = training_case(dtype, layout)
    for names in gpu_training.PASSES:
        gpu_training.run(case, names, bench)
    assert bench.failed == []
    assert contenders(bench) == ["fused", "layers", "published eager", "published compiled"]
    assert [type(module) for module in compiled] == [PSAModule]
    rounding = torch.finfo(getattr(torch, dtype)).eps
    for row in rows(bench):
        assert_measured(row, 100 * rounding if dtype == "float32" else 4 * rounding)
        assert (row["kind"], row["mode"]) == ("module", "train")
    fused = rows(bench)[0]
    assert float(fused["se_error"]) < (1e-3 if dtype == "float32" else 0.1)


def test_training_has_every_gradient(meter):
    contender = gpu_training.Pass(FusedPSAModule, training_case(), meter.device, torch.bfloat16)
    x, grad = gpu_training.inputs_of(training_case(), meter.device, torch.bfloat16)
    results = contender.results(x, grad)
    assert [*results] == ["output", "x", *dict(contender.module.named_parameters())]
    assert all(result.count_nonzero() for result in results.values())


def test_the_calls_of_training_have_inputs_of_their_own(bench, monkeypatch):
    """Together they exceed the cache, and all have gradients to compute."""
    seen = []
    really = gpu_training.Pass.run

    def note(self, x, grad):
        assert x.requires_grad and x.is_leaf
        seen.append((x.data_ptr(), grad.data_ptr()))
        return really(self, x, grad)

    monkeypatch.setattr(gpu_training.Pass, "run", note)
    gpu_training.run(training_case(), ("fused",), bench)
    timed = seen[3:]  # behind the exact results, the usual ones and the contender's
    sets = bench.meter.sets(training_case().nbytes)
    assert len({x for x, _ in timed}) == len({grad for _, grad in timed}) == sets


class WrongOutput(LayersModule):
    def forward(self, x):
        return super().forward(x) * 1.1


class WrongGradient(LayersModule):
    """Its output is right."""

    def forward(self, x):
        out, wrong = super().forward(x), self.conv_4.weight.sum() * 3
        return out + (wrong - wrong.detach())


class NotANumber(LayersModule):
    def forward(self, x):
        out = super().forward(x)
        return out + torch.where(torch.arange(len(x), device=x.device) == 1, torch.nan, 0).to(
            x.dtype
        ).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
@pytest.mark.parametrize(
    ("wrong", "named"),
    ((WrongOutput, "output"), (WrongGradient, "conv_4.weight"), (NotANumber, "output")),
)
def test_a_wrong_module_is_refused_and_the_others_go_on(
    wrong, named, dtype, bench, monkeypatch, capsys
):
    monkeypatch.setitem(gpu_training.CONTENDERS, "layers", wrong)
    gpu_training.run(training_case(dtype), ("fused", "layers", "published eager"), bench)
    assert contenders(bench) == ["fused", "published eager"]
    (failed,) = bench.failed
    assert f"(2, 64, 8): layers: {named}: error" in failed and "expected at most" in failed
    assert f"FAILED {failed}" in capsys.readouterr().err
    assert bench.missing(rows(bench)[0] | {"contender": "layers"})  # a later run measures it


# ---- networks ----


@pytest.fixture
def small(monkeypatch):
    def network(fused, dtype):
        torch.manual_seed(0)
        return narrow((1, 1, 1, 1), fused=fused).eval().to(dtype)

    monkeypatch.setattr(gpu_networks, "network", network)


def network_case(mode="train", dtype=AUTOCAST, layout="channels_last", n=4):
    return Case("network", mode, layout, dtype, n, 50, 32)


def run_network(case, names, bench):
    references = gpu_networks.References(bench)
    for name in names:
        gpu_networks.run(case, name, references, bench)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("mode", "dtype"), (("train", AUTOCAST), ("forward", "bfloat16"), ("forward", "float32"))
)
def test_networks(mode, dtype, layout, bench, small, compiled):
    run_network(network_case(mode, dtype, layout), gpu_networks.CONTENDERS, bench)
    assert bench.failed == []
    assert contenders(bench) == ["fused", "published eager", "published compiled"]
    assert len(compiled) == 1
    for row in rows(bench):
        assert_measured(row, {AUTOCAST: 0.5, "bfloat16": 0.1, "float32": 1e-4}[dtype])
        assert row["reference"] == "float64" and row["n"] == "4"


def test_the_network_is_epsanet50(bench):
    run_network(Case("network", "forward", "channels_last", "float32", 1, 50, 32), ["fused"], bench)
    contender = gpu_networks.Contender("fused", network_case("forward", "float32"), "cpu")
    assert sum(isinstance(m, FusedPSAModule) for m in contender.module.modules()) == 16
    assert contenders(bench) == ["fused"]


def test_inference_computes_no_gradients(bench, small):
    contender = gpu_networks.Contender(
        "fused", network_case("forward", "bfloat16"), bench.meter.device
    )
    assert not contender.module.training
    assert not contender.call().requires_grad
    trained = gpu_networks.Contender("fused", network_case(), bench.meter.device)
    assert trained.module.training and trained.module.fc.weight.dtype == torch.float32


@pytest.mark.parametrize(("mode", "dtype"), (("train", AUTOCAST), ("forward", "bfloat16")))
def test_a_wrong_network_is_refused_and_the_others_go_on(mode, dtype, bench, small, monkeypatch):
    right = gpu_networks.network

    def network(fused, dtype):
        built = right(fused, dtype)
        if fused:
            built.fc.register_forward_hook(lambda module, inputs, out: out * 3)
        return built

    monkeypatch.setattr(gpu_networks, "network", network)
    run_network(network_case(mode, dtype), ("fused", "published eager"), bench)
    assert contenders(bench) == ["published eager"]
    (failed,) = bench.failed
    assert "fused: l" in failed and "expected at most" in failed


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
)
out_of_memory = pytest.mark.parametrize("lack", OUT_OF_MEMORY, ids=("torch", "engine", "cudnn"))


@out_of_memory
def test_a_reference_that_does_not_fit_is_in_float32(bench, small, monkeypatch, lack):
    really = gpu_networks.Contender.results

    def results(self):
        if self.images.dtype == torch.float64:
            raise lack
        return really(self)

    monkeypatch.setattr(gpu_networks.Contender, "results", results)
    run_network(network_case(), ("fused",), bench)
    assert [row["reference"] for row in rows(bench)] == ["float32"]


def test_a_reference_is_computed_once(bench, small, monkeypatch):
    """For both layouts and all contenders."""
    computed = []
    really = gpu_networks.References._compute
    monkeypatch.setattr(
        gpu_networks.References,
        "_compute",
        lambda self, case: computed.append(case) or really(self, case),
    )
    references = gpu_networks.References(bench)
    for layout in LAYOUTS:
        for name in ("fused", "published eager"):
            gpu_networks.run(network_case(layout=layout), name, references, bench)
    assert len(rows(bench)) == 4 and len(computed) == 1


def test_a_reference_that_fails_is_tried_once(bench, small, monkeypatch):
    tried = []

    def results(self):
        tried.append(self.images.dtype)
        raise RuntimeError("a broken reference")

    monkeypatch.setattr(gpu_networks.Contender, "results", results)
    references = gpu_networks.References(bench)
    for layout in LAYOUTS:
        gpu_networks.run(network_case(layout=layout), "fused", references, bench)
    assert len(tried) == 1 and len(bench.failed) == 2
    assert all(line.endswith("a broken reference") for line in bench.failed)


@pytest.mark.parametrize("part", ("network", "training"))
def test_the_search_is_off_for_float64_alone(bench, small, monkeypatch, part):
    """cuDNN remembers a guessed plan by shape and dtype. A timed row would keep the guess."""
    searched = {}
    contender = gpu_networks.Contender if part == "network" else gpu_training.Pass
    really = contender.results

    def results(self, *arguments):
        dtype = next(self.module.parameters()).dtype
        searched.setdefault(dtype, []).append(torch.backends.cudnn.benchmark)
        return really(self, *arguments)

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(contender, "results", results)
    if part == "network":
        run_network(network_case("forward", "bfloat16"), ("fused",), bench)
    else:
        gpu_training.run(training_case("bfloat16"), ("fused",), bench)
    assert len(rows(bench)) == 1
    assert searched == {torch.bfloat16: [True, True], torch.float64: [False]}


@out_of_memory
def test_what_does_not_fit_is_left_out(bench, small, monkeypatch, capsys, lack):
    def columns(calls):
        raise lack

    monkeypatch.setattr(bench.meter, "columns", columns)
    run_network(network_case(), ("fused",), bench)
    assert rows(bench) == [] and bench.failed == []
    assert f"fused: left out, {str(lack).splitlines()[0]}\n" in capsys.readouterr().out


# ---- a captured training step ----


def small_step(meter, network=None):
    network = (network or narrow((1, 1, 1, 1), fused=True)).to(meter.device).train()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Step(
        network,
        network,
        images.to(meter.device),
        lambda: torch.autocast(meter.device, torch.bfloat16),
    )


def test_a_replayed_step_reads_the_weights_of_the_moment(meter):
    """Autocast's copies of the weights are a part of the step."""
    step, losses = small_step(meter), []
    for _ in range(WARM_UP):
        step.run()
    replay = meter.capture([lambda: losses.append(step.run())])
    replay()
    assert abs(losses[-1].item() - math.log(10)) > 1e-3
    with torch.no_grad():
        step.module.fc.weight.zero_()
        step.module.fc.bias.zero_()
    replay()
    assert losses[-1].item() == pytest.approx(math.log(10), abs=1e-5)


def test_a_step_trains_and_leaves_no_gradients(meter):
    step = small_step(meter)
    before = {name: p.detach().clone() for name, p in step.module.named_parameters()}
    step.run()
    assert all(p.grad is None for p in step.module.parameters())
    for name in ("conv1.weight", "fc.weight"):
        assert (step.module.get_parameter(name) != before[name]).any()
    results = step.results()
    assert [*results] == ["loss", "logits", "classifier's gradient"]
    assert all(p.grad is None for p in step.module.parameters())


def test_the_optimizer_makes_its_state_before_the_capture(meter, monkeypatch):
    """In the first step, which allocates it, and the second takes another path."""
    step = small_step(meter)
    states = []
    really = meter.capture

    def capture(calls):
        states.append(len(step.optimizer.state))
        return really(calls)

    monkeypatch.setattr(meter, "capture", capture)
    meter.device_times([step.run])
    assert states == [len([*step.module.parameters()])]


def test_what_reads_on_the_host_is_timed_as_launched(capsys):
    """On a GPU a failed capture would spoil those of the tests after it."""
    meter, x = StandIn(2), torch.ones(2)
    for call, expected in ((lambda: x * 2, "graph"), (lambda: (x * 2).sum().item(), "launched")):
        assert meter.time_columns([call])["timing"] == expected
    assert "not captured, timed as launched" in capsys.readouterr().err


# ---- the other parts ----


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


# ---- order, resuming, time ----


@pytest.mark.parametrize(
    ("part", "first", "cases"),
    (
        (gpu_training, ("bfloat16", 64, "channels_last", 64), 2 * 2 * 2 * 4),
        (gpu_networks, (AUTOCAST, 64, "channels_last", 50), 2 * 8),
    ),
)
def test_the_most_wanted_come_first_and_what_is_compiled_last(part, first, cases):
    found = list(part.cases())
    assert len(set(found)) == len(found) == cases
    assert (found[0].dtype, found[0].n, found[0].layout, found[0].planes) == first
    assert found[0].mode == "train"
    assert [name.endswith("compiled") for name in part.CONTENDERS] == [
        *([False] * (len(part.CONTENDERS) - 1)),
        True,
    ]
    assert [name for names in part.PASSES for name in names] == [*part.CONTENDERS]


def test_networks_have_the_wanted_cases():
    found = {(c.mode, c.dtype, c.n) for c in gpu_networks.cases()}
    assert {("train", AUTOCAST, 64), ("train", AUTOCAST, 128)} <= found
    assert {("forward", "bfloat16", n) for n in (1, 64, 256)} <= found
    assert {c.size for c in gpu_networks.cases()} == {224}


@pytest.fixture
def quick(monkeypatch, small):
    """One small case of each new part."""
    monkeypatch.setattr(gpu_training, "cases", lambda: iter([training_case()]))
    monkeypatch.setattr(gpu_networks, "cases", lambda: iter([network_case()]))


def test_a_second_run_measures_the_missing_rows_alone(meter, tmp_path, quick, compiled, capsys):
    first = new_bench(meter, tmp_path, with_compile=False)
    assert gpu.run_part("training", first, 5) and gpu.run_part("network", first, 5)
    eager = ["fused", "layers", "published eager", "fused", "published eager"]
    assert contenders(first) == eager
    capsys.readouterr()
    second = new_bench(meter, tmp_path)
    assert gpu.run_part("training", second, 5) and gpu.run_part("network", second, 5)
    assert contenders(second) == [*eager, "published compiled", "published compiled"]
    assert len(capsys.readouterr().out.splitlines()) == 2
    for name in ("sources", "programs", "torch"):
        assert Results(first.results.path, FACTS | {name: "another"}).done == set()


def test_no_step_begins_after_the_time(bench, monkeypatch):
    begun = []
    steps = (lambda bench: iter([lambda: begun.append(1)] * 3),)
    monkeypatch.setitem(gpu.PARTS, "network", steps)
    assert not gpu.run_part("network", bench, -1) and begun == []
    assert gpu.run_part("network", bench, 5) and len(begun) == 3


# ---- the file ----


def test_the_committed_results_are_still_read(tmp_path):
    path = tmp_path / "nvidia-h200-gpu.csv"
    shutil.copy(COMMITTED, path)
    with path.open(newline="") as file:
        before = list(csv.DictReader(file))
    sources = before[-1]["sources"]
    # Nothing says which Python code those rows are of. So they are measured again.
    results = Results(path, FACTS | {"sources": sources})
    assert results.done == set()
    key = {"kind": "network", "mode": "train", "layout": "contiguous", "dtype": AUTOCAST}
    key |= {"n": 64, "planes": 50, "size": 224, "contender": "fused"}
    results.add(key | {"device_us": 1.5, "reference": "float64"})
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        *after, new = list(reader)
    assert reader.fieldnames == FIELDS
    assert [{k: row[k] for k in before[0]} for row in after] == before
    assert (new["reference"], new["se_error"], new["sources"]) == ("float64", "", sources)
    assert Results(path, FACTS | {"sources": sources}).done == {key_of(new)}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert len(Files(tmp_path, "nvidia-h200").rows("gpu")) == len(before) + 1


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "a-gpu-gpu.csv"
    path.write_text("contender,median_us\nfused,10\n")
    with pytest.raises(SystemExit, match="expected the columns of this benchmark"):
        Results(path, FACTS)


# ---- the command ----


def run_main(monkeypatch, folder, *arguments):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu._C, "build_info", lambda: {"cuda": True})
    monkeypatch.setattr(gpu, "prepare", StandIn)
    monkeypatch.setattr(gpu, "facts", lambda: FACTS)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return gpu.main([*arguments, "--out", str(folder), "--repeats", "2"])


def test_the_command(monkeypatch, tmp_path, quick, capsys):
    assert run_main(monkeypatch, tmp_path / "new", "--part", "network", "--no-compile") == 0
    path = tmp_path / "new" / "a-gpu-gpu.csv"
    assert f"complete: {path}" in capsys.readouterr().out
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["contender"] for row in found] == ["fused", "published eager"]
    assert found[0]["device"] == "A GPU" and found[0]["kernels"] == "7"
    assert run_main(monkeypatch, tmp_path, "--part", "training", "--minutes", "-1") == 0
    assert "out of time: run again to go on" in capsys.readouterr().out


def test_the_command_fails_where_a_row_could_not_be_measured(monkeypatch, tmp_path, quick, capsys):
    monkeypatch.setitem(gpu_training.CONTENDERS, "layers", WrongOutput)
    assert run_main(monkeypatch, tmp_path, "--part", "training", "--no-compile") == 1
    assert "layers: output: error" in capsys.readouterr().out.splitlines()[-1]


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
        gpu.main(["--part", "network"])
    assert "expected a GPU and a build with CUDA kernels; found GPU False" in (
        capsys.readouterr().err
    )
