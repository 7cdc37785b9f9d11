"""Every block of Python and every command of README and docs is run here, or named here with the
reason why not."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import published
from support.optional import optional
from support.pages import (
    PAGES,
    Block,
    block,
    blocks,
    commands,
    environment,
    run_python,
    run_shell,
)
from support.paths import ROOT, TESTS

import epsa_fused

# ---- Python ----

PACKAGE = block("python", "aoti_compile_and_package")  # run by test_the_cpp_block
SLOW = ("torch.compile(model", "torch.onnx.export")
NEEDS = {
    "plots": ("matplotlib",),
    "load_trained(": ("numpy", "PIL"),
    "epsa_fused.train": ("numpy", "tqdm"),
    "huggingface_hub": ("huggingface_hub", "safetensors"),
    "import timm": ("timm",),
    "from torchvision": ("torchvision",),
    "torch.onnx.export": ("onnx", "onnxscript"),
}
PYTHON = [b for b in blocks("python") if b != PACKAGE]
FAST = [b for b in PYTHON if not any(marker in b.code for marker in SLOW)]


def packages(code: str) -> list[str]:
    return [name for marker, names in NEEDS.items() if marker in code for name in names]


def train_on_noise(out: Path) -> None:
    """A training's best.pt, of a small network."""
    model = epsa_fused.models.small_epsanet(3)
    run = {"model": "small_epsanet", "classes": ["ant", "bee", "cat"], "psa": "fused"}
    images = {"mean": (124.0,) * 3, "std": (58.0,) * 3, "shape": (32, 32, 3), "white": 255}
    out.mkdir(parents=True)
    torch.save(
        {"format": 2, "run": run | {"dropout": 0.0}, "state_dict": model.state_dict(), "top1": 0.5}
        | images
        | {"centre": 0.875},
        out / "best.pt",
    )


def prepared(folder: Path, code: str) -> Path:
    """The folder with what the block reads: the published code, a checkpoint of its training."""
    folder.mkdir()
    if "models.epsanet" in code:
        (folder / "models").mkdir()
        (folder / "models" / "epsanet.py").write_text((TESTS / "support/published.py").read_text())
    if "load_trained(" in code:
        train_on_noise(folder / "runs" / "imagenet")
        from PIL import Image

        Image.new("RGB", (300, 200), "orange").save(folder / "cat.jpg")
    if "torch.load(" in code:
        model = torch.nn.DataParallel(published.epsanet50())
        torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "checkpoint.pth.tar")
    return folder


def importable(code: str) -> bool:
    try:
        for name in packages(code):
            optional(name)
    except pytest.skip.Exception:
        return False
    return True


@pytest.fixture(scope="module")
def fast_results(tmp_path_factory) -> dict[Block, dict]:
    folder = tmp_path_factory.mktemp("blocks")
    runnable = [b for b in FAST if importable(b.code)]
    return run_python({prepared(folder / str(i), b.code): b for i, b in enumerate(runnable)})


@pytest.mark.parametrize(
    "found",
    [pytest.param(b, marks=() if b in FAST else pytest.mark.slow, id=str(b)) for b in PYTHON],
)
def test_python_block(found, request, tmp_path):
    for package in packages(found.code):
        optional(package)
    if found in FAST:
        result = request.getfixturevalue("fast_results")[found]
    else:
        result = run_python({prepared(tmp_path / "block", found.code): found})[found]
    assert result["error"] is None, f"{found.code}\n{result['error']}"
    # every shape that a comment of the block gives
    for name, shape in re.findall(r"^(\w+) = .*# (\[[\d, ]+\])$", found.code, re.MULTILINE):
        assert str(result["shapes"][name]) == shape
    if ".fuse(" in found.code:
        assert result["stdout"].startswith("fuse: 16 replaced, 0 left alone\n")
    if "onnx" in found.code:
        assert (tmp_path / "block" / "epsanet50.onnx").exists()


# ---- commands ----

ACTIVATE = ". .venv/bin/activate"
CPP = "run_package.cpp"

# Why these commands are not run. What they do is covered where it says so.
TIMM = "needs timm's train.py and ImageNet; tests/models/test_timm.py gives it another script"
WEIGHTS = "needs such data; tests/train/test_trained.py starts from weights"
PREDICT = "tests/train/test_trained.py runs the command on a training of its own"
EVALUATE = "needs such data; tests/train/test_evaluate.py evaluates a training of its own"
SETS_UP = "sets up .venv by pip, minutes"
TIMING = "minutes of timing or more; test_the_demo runs the quick setting"
SERVING = "minutes of timing; test_serving_benchmark.py runs less of it"
GPU = "needs a GPU"
NOT_RUN = {
    "make demo": f"{SETS_UP}; test_the_demo runs what it does then",
    'make demo TORCH="torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu"': SETS_UP,
    "make test": f"{SETS_UP}, and runs these tests",
    "make wheel": f"{SETS_UP}; test_wheel.py makes one",
    'pip install "torch>=2.11" "setuptools>=77" ninja "pybind11>=2.13"': "changes the environment",
    "pip install --no-build-isolation .": "changes the environment; make does it for these tests",
    'pip install --no-build-isolation ".[train]"': "changes the environment",
    "python benchmarks/latency.py --level attention": TIMING,
    "python benchmarks/latency.py --level module": TIMING,
    "python benchmarks/latency.py --level convolutions": TIMING,
    "python benchmarks/latency.py --level network": TIMING,
    "python benchmarks/branches.py": TIMING,
    "python benchmarks/serving.py --part speed --batch 1 8": SERVING,
    "python benchmarks/serving.py --part start --batch 1": SERVING,
    "python benchmarks/serving.py --table benchmark_results/serving.csv": SERVING,
    "pip install openvino onnxruntime onnx": "changes the environment",
    "python benchmarks/accuracy.py": "half an hour; test_the_accuracy_benchmark runs less of it",
    "python benchmarks/accuracy.py --start": "tests/train/test_accuracy.py runs less of it",
    "python docs/figures/gallery.py": "trains for minutes; test_gallery.py runs less of it",
    "python benchmarks/roofline.py": "tests/cuda/test_roofline.py runs it",
    "python -m epsa_fused.predict runs/imagenet cat.jpg dog.jpg": PREDICT,
    "python -m epsa_fused.train --data flowers --weights best.pt": WEIGHTS,
    "python -m epsa_fused.train --data imagenet --out runs/imagenet --evaluate": EVALUATE,
    "python -m epsa_fused.train --data imagenet --weights other.pt --evaluate": EVALUATE,
    "torchrun --standalone --nproc-per-node 8 -m epsa_fused.train --data imagenet --out "
    "runs/imagenet --batch 512 --lr 0.2 --warmup 5 --amp bf16 --channels-last --workers 5": (
        "needs ImageNet and eight GPUs; test_the_trainings runs two processes"
    ),
    "python -m epsa_fused.predict runs/imagenet cat.jpg --json": PREDICT,
    "pip install timm": "changes the environment",
    "python examples/timm_train.py train.py --data-dir imagenet --model epsanet50 --amp": TIMM,
    "python -m epsa_fused.train --data imagenet --out runs/imagenet --amp bf16 --channels-last "
    "--workers 8": "needs ImageNet; tests/train/test_train.py trains on a folder of images",
    'make test PYTEST_ARGS="tests/cuda/test_simt_emulator.py"': SETS_UP,
    'make test PYTEST_ARGS="tests/cuda/test_simt_kernels.py"': SETS_UP,
    'make test-all PYTEST_ARGS="tests/cuda/test_simt_kernels.py"': SETS_UP,
    "make gpu-test": GPU,
    "make gpu-sanitize": GPU,
    "make gpu-sanitize-module": GPU,
    "make gpu-bench": GPU,
    'make gpu-bench BENCH_ARGS="--part network"': GPU,
    "make gpu-plans": GPU,
}
SELF_CHECK = "python -m epsa_fused"
FIGURES = "python docs/figures/benchmarks.py"  # test_pages.py runs it
TRAIN = [
    "python -m epsa_fused.train --out runs/digits",
    "python -m epsa_fused.train --out runs/digits --resume",
    "torchrun --standalone --nproc-per-node 2 -m epsa_fused.train --out runs/pair",
]
SHORT = " --epochs 1 --batch 512"  # two steps
# test_the_cpp_block and test_the_emulators_block run these
IN_BLOCKS = ("TORCH=", "OPERATORS=", "g++ ", "./run_package ", "./cases ")
NEEDS_PYTHON = ("python ", "torchrun ", "TORCH=", "OPERATORS=")


def test_every_command_is_run_or_named():
    seen = {c for page in PAGES for c in commands(page) if not c.startswith(IN_BLOCKS)}
    assert seen == {*NOT_RUN, ACTIVATE, SELF_CHECK, *TRAIN, FIGURES}


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_come_after_what_they_need(page):
    """A shell that ran only the page's commands finds Python and the package."""
    ready = False
    for command in commands(page):
        ready |= command in (ACTIVATE, "pip install --no-build-isolation .")
        assert ready or not command.startswith(NEEDS_PYTHON), command


def test_readme_in_a_new_shell(tmp_path):
    """Its commands in their order, in a shell whose PATH has no environment."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("this Python is in no environment that could be activated")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    path = [p for p in os.environ["PATH"].split(os.pathsep) if not p.startswith(sys.prefix)]
    script = "\n".join(c for c in commands("README.md") if c not in NOT_RUN)
    assert ACTIVATE in script and SELF_CHECK in script
    result = run_shell(script.replace("activate", "activate\nset +u"), tmp_path,
                       PATH=os.pathsep.join(path))  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "self-check on cpu" in result.stdout and "WRONG" not in result.stdout


def run_trainings(commands: list[str], folder: Path) -> None:
    """One after another, each with SHORT added."""
    for command in commands:
        result = run_shell(command + SHORT, folder, OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stdout + result.stderr[-4000:]
        assert "done: 2 steps" in result.stdout
        assert ("resumed after 2 steps" in result.stdout) == ("--resume" in command)


def test_the_trainings(tmp_path):
    for package in ("tqdm", "sklearn"):
        optional(package)
    with ThreadPoolExecutor() as pool:  # most of their time goes into imports
        list(pool.map(run_trainings, (TRAIN[:2], TRAIN[2:]), (tmp_path, tmp_path)))
    for run in ("digits", "pair"):
        assert (tmp_path / "runs" / run / "best.pt").exists()


@pytest.mark.slow
def test_the_accuracy_benchmark(tmp_path):
    for package in ("tqdm", "sklearn", "matplotlib"):
        optional(package)
    command = f"python {ROOT}/benchmarks/accuracy.py --epochs 1 --seeds 1 --out results"
    for again in (False, True):  # the second time it finds its trainings done
        result = run_shell(command, tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr[-4000:]
        assert result.stdout.count("resumed after") == (3 if again else 0)
        assert "0 of 2 change their accuracy" in result.stdout
        rows = (tmp_path / "results" / "accuracy-digits.csv").read_text().splitlines()
        assert len(rows) == 4 and rows[0].startswith("network,seed,top1")


@pytest.mark.slow
def test_the_cpp_block(tmp_path):
    """In a folder as a clone is, after the block that makes what it reads."""
    result = run_python({prepared(tmp_path / "clone", ""): PACKAGE})[PACKAGE]
    assert result["error"] is None, result["error"]
    (tmp_path / "clone" / "examples").symlink_to(ROOT / "examples")
    script = block("sh", CPP).code.replace(ACTIVATE, "")  # environment() has this Python first
    result = run_shell(script, tmp_path / "clone")
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == "[8, 1000]"
    assert (tmp_path / "clone" / "logits.f32").stat().st_size == 8 * 1000 * 4


def test_the_paths_in_commands_exist():
    folders = ("csrc/", "tests/", "benchmarks/", "examples/", "docs/")
    for command in {c for page in PAGES for c in commands(page)}:
        for word in re.split(r"[\s=\"]+", command):
            if word.startswith(folders):
                assert list(ROOT.glob(word)), command


@pytest.mark.slow
def test_the_emulators_block(tmp_path):
    """The case program, built and run in a folder that has the sources."""
    for folder in ("csrc", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    result = run_shell(block("sh", "-DEPSA_EMULATED").code, tmp_path)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert re.fullmatch(r"[1-9]\d* cases, 0 failed", result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_demo(tmp_path):
    """What `make demo` runs."""
    for package in ("sklearn", "matplotlib"):
        optional(package)
    result = run_shell(f"python {ROOT}/benchmarks/demo.py", tmp_path)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    last = result.stdout.split("EPSANet-50 on photographs")[1]
    assert last.count("  ok  ") == 4 and "WRONG" not in last
    assert (tmp_path / result.stdout.splitlines()[-1]).suffix == ".png"
    assert (tmp_path / result.stdout.splitlines()[-1]).exists()


def test_progress_shows_lines_silence_and_failure(tmp_path):
    """.ci/progress.py, in front of what `make` installs and compiles."""
    command = "echo '[1/2] c++ -MMD -c /x/csrc/a.cpp -o a.o'; sleep 0.5; echo other; exit 3"
    # that go into the log alone, never as long apart as SILENCE
    unseen = "for i in 1 2 3 4 5 6 7 8 9; do echo unseen; sleep 0.1; done"
    script = f"""
import sys; sys.path.insert(0, {str(ROOT / ".ci")!r})
import progress; progress.SILENCE = 0.2
sys.exit(progress.main(sys.argv[1:]))"""

    def run(*options: str, command: str = command) -> subprocess.CompletedProcess:
        arguments = [sys.executable, "-c", script, *options, "sh", "-c", command]
        return subprocess.run(
            arguments, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
        )

    plain, bars, compiling = run(), run("--bars"), run("--compile", "build/log")
    assert plain.returncode == bars.returncode == compiling.returncode == 3
    for result in (plain, bars):
        assert result.stdout.startswith("[1/2]") and "other" in result.stdout
    for result in (plain, bars, compiling):
        assert re.search(r"^  \.\.\. \d+ s", result.stdout, re.MULTILINE)
    first, second = compiling.stdout.splitlines()[:2]
    assert first.startswith("  [1/2]") and first.endswith("csrc/a.cpp") and "[1/2]" in second
    assert "the build failed" in compiling.stdout
    assert (tmp_path / "build" / "log").read_text().endswith("other\n")
    unseen_lines = run("--compile", "build/unseen", command=unseen).stdout
    assert re.search(r"^  \.\.\. \d+ s", unseen_lines) and "unseen" not in unseen_lines
