"""Whole networks in training and serving: torch.compile, torch.export, AOTInductor from Python and
C++, autocast, DDP, FSDP2, copies and files. ONNX is in test_onnx.py."""

import copy
import io
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import serve
import torch
from support import published
from support.paths import ROOT
from support.tolerance import assert_near, assert_no_worse
from torch import nn

import epsa_fused
from epsa_fused import EPSANet, FusedPSAModule, FusedSplitPSA, epsanet50, fuse

OP = torch.ops.epsa_fused.psa_forward.default
TERMS = 9 * 512  # products in the longest sum of a network's layers


@pytest.fixture(autouse=True)
def _no_caches():
    """Graphs of earlier runs and tests are dropped."""
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


def small_network(**options) -> EPSANet:
    return EPSANet((1, 1, 1, 1), 10, planes=(64, 64, 64, 128), expansion=2, **options)


# Four modules of the small one show what sixteen do.
NETWORKS = pytest.mark.parametrize(
    "make", (small_network, pytest.param(epsanet50, marks=pytest.mark.slow))
)


def small_model() -> nn.Module:
    """A module of each kind that is fused, as fuse() leaves them."""
    psa = published.PSAModule(16, 64, conv_groups=(1, 2, 4, 8))
    return fuse(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), psa, published.ExternalPSA(64)))


def assert_as_exact_as_eager(actual, model, x) -> None:
    """In float32, where Inductor computes BatchNorms and means in another order."""
    exact = copy.deepcopy(model).double()(x.double())
    assert_no_worse(actual, model(x), exact, terms=TERMS)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# ---- torch.compile ----


def check_compiled(network: nn.Module, train: bool, dynamic: bool, backend: str) -> None:
    """One graph of the whole network gives eager's results, for every batch where `dynamic`."""
    network = network.double().train(train)
    eager = copy.deepcopy(network)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    for batch in (2, 3) if dynamic else (2,):
        x = torch.randn(batch, 3, 64, 64, dtype=torch.float64)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        with torch.set_grad_enabled(train):
            out, expected = compiled(x), eager(x)
        assert_near(out, expected)
        if train:
            for result in (out, expected):
                result.square().mean().backward()
            assert_near(gradients(network), gradients(eager))
            for name, statistics in network.named_buffers():
                assert_near(statistics, eager.get_buffer(name))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("train", (False, True), ids=("eval", "train"))
@NETWORKS
def test_the_whole_network_is_one_graph(make, train):
    check_compiled(make(), train, dynamic=True, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("train", (False, True), ids=("eval", "train"))
def test_the_whole_network_through_inductor(train, dynamic):
    check_compiled(epsanet50(10), train, dynamic, backend="inductor")


# ---- torch.export, AOTInductor ----


@NETWORKS
def test_export_of_any_batch_and_size(make, tmp_path):
    network = make().eval()
    modules = sum(isinstance(m, FusedPSAModule) for m in network.modules())
    assert modules in (4, 16)
    size = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        network, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: size, 2: size, 3: size},)
    )
    assert sum(node.target is OP for node in program.graph.nodes) == modules
    torch.export.save(program, tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    shapes = [(2, 3, 64, 64), (3, 3, 40, 96)]
    if torch.__version__ >= "2.13":  # before, MaxPool2d's sizes must stay even or odd
        shapes.append((1, 3, 97, 65))
    for shape in shapes:
        x = torch.randn(shape)
        assert torch.equal(loaded(x), network(x))


PACKAGES = {
    "small": small_model,
    "epsanet50": lambda: epsanet50(10),
}


@pytest.fixture(
    scope="module",
    params=("small", pytest.param("epsanet50", marks=pytest.mark.slow)),
)
def package(request, tmp_path_factory):
    """(folder, model): an AOTInductor package of any batch by examples/serve.py, and its model."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = PACKAGES[request.param]().eval()
    serve.package(model, torch.randn(2, 3, 64, 64), str(folder / "model.pt2"))
    return folder, model


@pytest.fixture(scope="module")
def library():
    return str(Path(epsa_fused.__file__).parent / "_ops.so")


def test_aot_inductor_from_python(package, library):
    """The process loads the operators' library and nothing else of the package."""
    folder, model = package
    x = torch.randn(3, 3, 64, 64)
    torch.save(x, folder / "x.pt")
    code = f"""
        import sys, torch
        torch.ops.load_library({library!r})
        run = torch._inductor.aoti_load_package({str(folder / "model.pt2")!r})
        torch.save(run(torch.load({str(folder / "x.pt")!r})), {str(folder / "out.pt")!r})
        assert "epsa_fused" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
    assert_as_exact_as_eager(torch.load(folder / "out.pt"), model, x)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """examples/run_package.cpp, compiled as README does it."""
    torch_root = Path(torch.__file__).parent
    binary = tmp_path_factory.mktemp("program") / "run_package"
    source = ROOT / "examples" / "run_package.cpp"
    command = ["g++", "-std=c++20", "-O1", "-Wall", str(source), "-o", str(binary)]
    command += [f"-I{torch_root / 'include'}"]
    command += [f"-L{torch_root / 'lib'}", f"-Wl,-rpath,{torch_root / 'lib'}"]
    command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, timeout=300)
    return binary


def test_aot_inductor_from_cpp(package, library, program):
    """No Python in the process: the dynamic linker names every library that it loads."""
    folder, model = package
    x = torch.randn(3, 3, 64, 64)
    x.numpy().tofile(folder / "x.bin")
    arguments = [library, folder / "model.pt2", folder / "x.bin", folder / "out.bin", 3, 3, 64, 64]
    result = subprocess.run(
        [str(program), *map(str, arguments)],
        env={"LD_DEBUG": "files", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    expected = model(x).detach()
    assert result.stdout.strip() == str(list(expected.shape))
    out = torch.from_file(str(folder / "out.bin"), size=expected.numel()).view_as(expected)
    assert_as_exact_as_eager(out, model, x)
    assert "_ops.so" in result.stderr and "libtorch_cpu.so" in result.stderr
    assert "libpython" not in result.stderr and "libtorch_python" not in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({0: "no_such.so"}, r"no_such.so: cannot open shared object file"),
        ({2: "no_such.bin"}, r"no_such.bin: expected 147456 bytes, the float32 values of \[3, 3,"),
        ({4: "2"}, r"x.bin: expected 98304 bytes"),
    ),
    ids=("library", "input", "shape"),
)
def test_the_cpp_program_says_what_is_wrong(change, message, library, program, tmp_path):
    torch.randn(3, 3, 64, 64).numpy().tofile(tmp_path / "x.bin")
    arguments = [library, "no_such.pt2", tmp_path / "x.bin", tmp_path / "out.bin", 3, 3, 64, 64]
    for position, value in change.items():
        arguments[position] = value
    result = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1 and not (tmp_path / "out.bin").exists()
    assert re.search(message, result.stderr), result.stderr


# ---- autocast ----


def test_autocast_is_as_exact_as_the_reference():
    """The fused network in bfloat16 is as near to float64 as the plain one is."""
    torch.manual_seed(1)
    fused = epsanet50(10).eval()
    plain = epsanet50(10, fused=False).eval()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs = [model(x) for model in (fused, plain)]
    assert outs[0].dtype == outs[1].dtype == torch.bfloat16
    assert_no_worse(outs[0], outs[1], exact)


def test_a_training_step_under_autocast():
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    x, target = torch.randn(8, 3, 64, 64), torch.arange(8)
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert {p.grad.dtype for p in network.parameters()} == {torch.float32}
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ---- copies and files ----


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("duplicate", (copy.deepcopy, through_pickle, through_a_file))
@pytest.mark.parametrize("make", (small_network, small_model))
def test_copies(make, duplicate):
    model = make().eval()
    other = duplicate(model)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(other(x), model(x))
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in other.modules()] == kinds
    assert FusedPSAModule in kinds and (make is small_network or FusedSplitPSA in kinds)
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert not torch.equal(other(x), model(x))


# ---- several processes ----

WORKER = """
    import sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from epsa_fused import EPSANet

    torch.set_num_threads(1)
    rank, store, expected = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(store, 2))
    inputs = torch.load(expected)

    def sharded(network):
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            for block in stage:
                fully_shard(block, mesh=mesh)
        model = fully_shard(network, mesh=mesh)
        assert type(network.layer1[0].conv2.se.fc1.weight).__name__ == "DTensor"
        return model

    for wrapped in (nn.parallel.DistributedDataParallel, sharded):
        network = EPSANet(
            (1, 1, 1, 1), 10, planes=(64, 64, 64, 128), expansion=2,
            norm_layer=lambda channels: nn.GroupNorm(4, channels),
        ).double()
        network.load_state_dict(inputs["state"])
        # each process has half of the batch; the gradients are the mean of both
        model = wrapped(network)  # DDP must outlive the backward pass, which it hooks into
        model(inputs["x"].chunk(2)[rank]).sin().mean().backward()
        gradients = [p.grad for p in network.parameters()]
        if wrapped is sharded:
            gradients = [grad.full_tensor() for grad in gradients]
        actual = torch.cat([grad.flatten() for grad in gradients])
        error = (actual - inputs["grads"]).abs().max() / inputs["grads"].abs().max()
        assert error < 1e-12, (wrapped, error)
    dist.destroy_process_group()
    print("equal")
"""


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)
def test_two_processes_get_the_gradients_of_the_whole_batch(tmp_path):
    """By DDP and FSDP2. GroupNorm, so that a sample's result does not depend on the others."""
    network = small_network(norm_layer=lambda channels: nn.GroupNorm(4, channels)).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    network(x).sin().mean().backward()
    torch.save(
        {
            "state": network.state_dict(),
            "x": x,
            "grads": gradients(network),
        },
        tmp_path / "expected.pt",
    )
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", textwrap.dedent(WORKER), str(rank)),
                *(str(tmp_path / "store"), str(tmp_path / "expected.pt")),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0 and "equal" in output, output
