"""README.md: every block of Python and every command in it is run here, or named here with the
reason why not."""

import csv
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import published
from support.optional import optional
from support.paths import ROOT

README = (ROOT / "README.md").read_text()

# Why these commands of the sh blocks are not run. What they do is covered where it says so.
NOT_RUN = {
    "make demo": "sets up .venv by pip; benchmarks/demo.py itself is run below",
    "make test": "sets up .venv by pip, and runs these tests",
    'pip install "torch>=2.11" "setuptools>=77" ninja pybind11': "changes the environment",
    "pip install --no-build-isolation .": "changes the environment; make does it for these tests",
    ".venv/bin/python benchmarks/latency.py --level attention": "minutes of timing; the demo runs "
    "its quick setting",
    ".venv/bin/python benchmarks/latency.py --level module": "minutes of timing",
    ".venv/bin/python benchmarks/latency.py --level convolutions": "minutes of timing",
    ".venv/bin/python benchmarks/latency.py --level network": "most of an hour of timing",
    ".venv/bin/python benchmarks/branches.py": "minutes of timing",
    "python -m epsa_fused.train --data imagenet --out runs/imagenet --amp bf16 --channels-last "
    "--workers 8": "needs ImageNet; test_train.py trains on a folder of images",
    ".venv/bin/python benchmarks/accuracy.py": "half an hour; a short setting is run below",
    "make gpu-test": "needs a GPU",
    "make gpu-sanitize": "needs a GPU",
    "make gpu-bench": "needs a GPU",
    "make gpu-plans": "needs a GPU",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def block(language: str, marker: str) -> str:
    found = [b for b in blocks(language) if marker in b]
    assert len(found) == 1, f"{len(found)} blocks of README have {marker!r}, expected one"
    return found[0]


def commands(code: str) -> list[str]:
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in code.splitlines())
    return [line for line in lines if line]


# ---- Python ----

SLOW = {"torch.compile(model", "torch.onnx.export"}
PACKAGE = "aoti_compile_and_package"  # run by test_the_cpp_block

# What each block is known by, and the packages that it needs besides.
PYTHON = {
    "psa = FusedPSAModule(64, 64)": (),
    "from epsa_fused import psa_attention": (),
    "model.forward_pyramid": (),
    "model.load_state_dict(checkpoint": (),
    "timm.create_model": ("timm",),
    "fpn_backbone(model": ("torchvision",),
    "epsa_fused.fuse(model)": (),
    "epsa_fused.prepack(model": (),
    "torch.compile(model": (),
    PACKAGE: (),
    "torch.onnx.export": ("onnx", "onnxscript"),
}


def run_block(marker: str, folder: Path) -> dict:
    """What it prints and the shapes of its tensors; it runs in `folder`, in its own process."""
    code = block("python", marker)
    show = """
import json
_shapes = {k: list(v.shape) for k, v in list(globals().items()) if isinstance(v, torch.Tensor)}
with open("shapes.json", "w") as _file:
    json.dump(_shapes, _file)
"""
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport torch\n{show}"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, f"{code}\n{result.stderr[-4000:]}"
    shapes = json.loads((folder / "shapes.json").read_text())
    return {"stdout": result.stdout, "shapes": shapes}


def environment() -> dict[str, str]:
    """As here, with this Python and this checkout's package first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PATH": path, "PYTHONPATH": python_path}


def test_every_python_block_is_known():
    for code in blocks("python"):
        assert sum(marker in code for marker in PYTHON) == 1, code


@pytest.mark.parametrize(
    "marker",
    [pytest.param(m, marks=pytest.mark.slow if m in SLOW else ()) for m in PYTHON if m != PACKAGE],
)
def test_python_block(marker, tmp_path):
    for package in PYTHON[marker]:
        optional(package)
    # the file that one of them loads: as the published training script saves it
    if "load_state_dict(checkpoint" in marker:
        model = torch.nn.DataParallel(published.epsanet50())
        torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "epsanet50.pth.tar")
    result = run_block(marker, tmp_path)
    shapes = result["shapes"]
    # every shape that a comment of the block gives
    for name, shape in re.findall(r"^(\w+) = .*# (\[[\d, ]+\])$", block("python", marker), re.M):
        assert str(shapes[name]) == shape
    if "fuse(model)" in marker:
        assert result["stdout"].startswith("fuse: 16 replaced, 0 left alone\n")
    if "onnx" in marker:
        assert (tmp_path / "epsanet50.onnx").exists()


# ---- commands ----

CPP = "run_package.cpp"


# They are run with SHORT added.
TRAIN = [
    "python -m epsa_fused.train --out runs/digits",
    "python -m epsa_fused.train --out runs/digits --resume",
    "torchrun --standalone --nproc-per-node 2 -m epsa_fused.train --out runs/pair",
]
SHORT = " --epochs 1 --batch 512"  # two steps


def test_every_command_is_run_or_named():
    seen = [c for code in blocks("sh") if CPP not in code for c in commands(code)]
    assert sorted(seen) == sorted([*NOT_RUN, "python -m epsa_fused", *TRAIN])


def test_the_self_check():
    result = subprocess.run(
        ["python", "-m", "epsa_fused"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_trainings(tmp_path):
    for package in ("tqdm", "sklearn"):
        optional(package)
    for command in TRAIN:
        result = subprocess.run(
            ["bash", "-c", command + SHORT],
            cwd=tmp_path,
            env=environment() | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert result.returncode == 0, result.stdout + result.stderr[-4000:]
        assert "done: 2 steps" in result.stdout
        assert ("resumed after 2 steps" in result.stdout) == ("--resume" in command)
    for run in ("digits", "pair"):
        assert (tmp_path / "runs" / run / "best.pt").exists()


@pytest.mark.slow
def test_the_accuracy_benchmark(tmp_path):
    for package in ("tqdm", "sklearn", "matplotlib"):
        optional(package)
    command = [sys.executable, ROOT / "benchmarks" / "accuracy.py", "--epochs", "1", "--seeds", "1"]
    for again in (False, True):  # the second time it finds its trainings done
        result = subprocess.run(
            [*command, "--out", "results"],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert result.returncode == 0, result.stdout + result.stderr[-4000:]
        assert result.stdout.count("resumed after") == (3 if again else 0)
        assert "0 of 2 change their accuracy" in result.stdout
        rows = (tmp_path / "results" / "accuracy-digits.csv").read_text().splitlines()
        assert len(rows) == 4 and rows[0].startswith("network,seed,top1")


@pytest.mark.slow
def test_the_cpp_block(tmp_path):
    """In a folder as a clone is, after the block that makes what it reads."""
    run_block(PACKAGE, tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block("sh", CPP)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == "[8, 1000]"
    assert (tmp_path / "logits.f32").stat().st_size == 8 * 1000 * 4


def test_the_accuracy_table_gives_the_committed_results():
    """benchmarks/accuracy.py wrote both."""
    with (ROOT / "benchmarks" / "results" / "accuracy-digits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    for network in ("SE", "PSA, reference", "PSA, fused"):
        own = [row for row in rows if row["network"] == network]
        top1 = [100 * float(row["top1"]) for row in own]
        speed = statistics.median(float(row["images_per_s"]) for row in own)
        row = (
            f"| {network} | {int(own[0]['parameters']):,} | {statistics.mean(top1):.2f} ± "
            f"{statistics.stdev(top1):.2f} | {min(top1):.2f} | {speed:,.0f} |"
        )
        assert row in README, row


@pytest.mark.slow
def test_the_demo(tmp_path):
    """What `make demo` runs."""
    for package in ("sklearn", "matplotlib"):
        optional(package)
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "demo.py")],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    last = result.stdout.split("EPSANet-50 on photographs")[1]
    assert last.count("  ok  ") == 4 and "WRONG" not in last


def test_make_knows_its_targets():
    """Those that the text names too."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make\s+([\w-]+)", README, re.MULTILINE))
    assert {"demo", "test", "bench", "cuda-check"} <= named <= targets


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)


def test_the_models_table_gives_the_asserted_figures():
    """test_models.py asserts them against the networks."""
    from test_models import FIGURES

    for build, (parameters, multiply_adds, millions, billions) in FIGURES.items():
        row = (
            f"| `{build.__name__}` | {parameters / 1e6:.2f} / {millions:.2f} "
            f"| {multiply_adds / 1e9:.2f} / {billions:.2f} |"
        )
        assert row in README, row


def test_the_detectors_table_gives_the_asserted_figures():
    """test_detection.py asserts them against the detectors."""
    from test_detection import FIGURES

    for detector in ("FasterRCNN", "MaskRCNN", "RetinaNet"):
        small, large = (f for (name, _), f in FIGURES.items() if name == detector)
        row = (
            f"| {detector.replace('RCNN', ' R-CNN')} | {small[0] / 1e6:.2f} / {small[1]:.2f} "
            f"| {large[0] / 1e6:.2f} / {large[1]:.2f} |"
        )
        assert row in README, row
