"""Short trainings for the tests: their settings, their data and their files."""

from __future__ import annotations

import atexit
import csv
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from support.paths import ROOT

from epsa_fused.models import MODELS
from epsa_fused.train import Config
from epsa_fused.train.data import open_data

CLASSES = ("ant", "bee", "cat")

# 12 steps on images(), and a checkpoint in the middle of each epoch
SHORT = {
    "model": "small_epsanet",
    "image_size": 8,
    "epochs": 2,
    "batch": 16,
    "lr": 0.02,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 4,
}
STEPS = 6  # an epoch
# Seconds until a waiting test fails. Nothing here takes long, but a shared machine may stop for
# minutes.
LIMIT = 900


@functools.cache
def images() -> str:
    """A folder of 96 images to train on and 24 held out; it goes when the tests are done."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return str(image_folder(Path(folder) / "images", train=32, held_out=8, size=10))


def settings(out: Path, **given: Any) -> Config:
    return Config.of(**({"data": images(), "out": str(out)} | SHORT | given))


def command_line(out: Path, **given: Any) -> list[str]:
    """The same as arguments of `python -m epsa_fused.train`."""
    words = ["--out", str(out)]
    for name, value in ({"data": images()} | SHORT | given).items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return words


def environment(**given: str) -> dict[str, str]:
    """For subprocesses: this checkout, and one thread, on which two trainings agree."""
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"} | given


TRAIN = [sys.executable, "-m", "epsa_fused.train"]


def rows(out: Path, name: str = "steps.csv") -> list[dict[str, str]]:
    with (out / name).open(newline="") as file:
        return list(csv.DictReader(file))


def losses(out: Path) -> list[tuple[str, ...]]:
    """The columns of steps.csv that two equal trainings share."""
    return [(row["step"], row["epoch"], row["lr"], row["loss"]) for row in rows(out)]


def losses_of(out: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(out)]


def trained(out: Path) -> torch.Tensor:
    """All weights as one vector in float64, without BatchNorm's statistics."""
    state = saved(out)["state_dict"]
    return torch.cat(
        [
            weight.flatten().double()
            for name, weight in state.items()
            if "running" not in name and "num_batches" not in name
        ]
    )


def saved(out: Path, name: str = "checkpoint.pt") -> dict[str, Any]:
    return torch.load(out / name, weights_only=True)


def wait_for_steps(process: subprocess.Popen, out, steps: int) -> None:
    """Waits until the log has so many rows."""
    limit = time.monotonic() + LIMIT
    while time.monotonic() < limit:
        file = out / "steps.csv"
        if file.exists() and file.read_bytes().count(b"\n") > steps:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    raise AssertionError(f"no {steps} steps in {LIMIT} s")


def evaluated(weights: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Loss and top-1 on the 24 held-out images of small_epsanet with what best.pt holds."""
    data = open_data(images(), SHORT["image_size"]).held_out
    pixels = torch.tensor(np.stack([data.image(i, None) for i in range(24)])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(weights[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    network = MODELS["small_epsanet"](3)
    network.load_state_dict(weights["state_dict"])
    labels = torch.tensor(data.labels)
    with torch.no_grad():
        logits = network.eval().to(dtype)(((pixels - mean) / std).to(dtype))
    return F.cross_entropy(logits, labels).item(), (
        logits.argmax(1) == labels
    ).double().mean().item()


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Names of entries that differ in any bit. Durations in seconds may differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a if k != "seconds" for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [
            d
            for i, pair in enumerate(zip(a, b, strict=True))
            for d in differences(*pair, f"{where}/{i}")
        ]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    return [] if type(a) is type(b) and a == b else [where]


def assert_same_run(a: Path, b: Path) -> None:
    assert differences(saved(a), saved(b)) == []
    assert losses(a) == losses(b)
    assert differences(rows(a, "epochs.csv"), rows(b, "epochs.csv")) == []
    assert differences(saved(a, "best.pt"), saved(b, "best.pt")) == []


def image_folder(folder: Path, train: int = 8, held_out: int = 4, size: int = 24) -> Path:
    """PNG and JPEG files of random pixels, brighter from class to class."""
    from PIL import Image

    random = np.random.default_rng(0)
    for part, count in (("train", train), ("val", held_out)):
        for i, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for j in range(count):
                pixels = random.integers(80 * i, 80 * (i + 1), (size, size + 6, 3)).astype(np.uint8)
                ending = "png" if j % 2 else "JPEG"
                Image.fromarray(pixels).save(folder / part / name / f"{j}.{ending}")
    return folder
