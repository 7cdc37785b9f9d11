"""Training: settings, data, results and refused input."""

from __future__ import annotations

import errno
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.optional import optional
from support.tolerance import assert_near
from support.training import (
    CLASSES,
    command_line,
    environment,
    evaluated,
    image_folder,
    losses_of,
    rows,
    saved,
    settings,
    trained,
)

from epsa_fused.models import MODELS
from epsa_fused.train import Config, InputError, train
from epsa_fused.train.__main__ import main
from epsa_fused.train.data import open_data
from epsa_fused.train.errors import CorruptImageError
from epsa_fused.train.inputs import Inputs
from epsa_fused.train.loading import EvaluationBatches, Images, TrainingBatches, loader
from epsa_fused.train.processes import Processes
from epsa_fused.train.training import Training

# ---- settings ----


def test_the_defaults_are_the_papers():
    config = Config(data="somewhere")
    expected = {
        "model": "epsanet50",
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "epochs": 120,
        "schedule": "step",
        "decay_every": 30,
        "decay": 0.1,
        "smoothing": 0.1,
        "batch": 256,
        "image_size": 224,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_folder_gets_the_papers_recipe_and_digits_their_own(tmp_path):
    assert Config.of(str(tmp_path)) == Config(data=str(tmp_path))
    digits = Config.of_command_line([])
    assert (digits.data, digits.model, digits.batch) == ("digits", "small_epsanet", 64)
    given = Config.of_command_line(["--model", "small_senet", "--lr", "0.3", "--channels-last"])
    assert (given.model, given.lr, given.channels_last, given.batch) == (
        "small_senet",
        0.3,
        True,
        64,
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "--epochs: expected at least 1, got 0"),
        ({"momentum": 1.0}, r"--momentum: expected less than 1, got 1\.0"),
        ({"lr": float("nan")}, "--lr: expected at least 0, got nan"),
        ({"ema": 1.5}, "--ema: expected less than 1, got 1.5"),
        ({"model": "resnet"}, "--model: expected one of epsanet50, .* got 'resnet'"),
        ({"batch": 2.5}, "--batch: expected a value of type int, got 2.5"),
        ({"seed": -1}, "--seed: expected at least 0, got -1"),
        ({"checkpoint_every": True}, "--checkpoint-every: expected a value of type int, got True"),
    ],
)
def test_settings_out_of_their_limits(given, message):
    with pytest.raises(InputError, match=message):
        Config(**given)


def test_resume_may_stand_alone():
    given = {(): "no", ("--resume",): "yes", ("--resume", "auto"): "auto"}
    for arguments, resume in given.items():
        config = Config.of_command_line([*arguments, "--lr", "0.5"])
        assert (config.resume, config.lr) == (resume, 0.5)


def test_the_command_line_refuses_without_a_traceback(tmp_path, capsys):
    assert main(["--data", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        f"error: --data: expected 'digits' or a folder, got '{tmp_path / 'none'}': "
        "No such file or directory\n"
    )
    with pytest.raises(SystemExit):
        main(["--bath", "3"])
    assert "--bath" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_where_there_is_none(tmp_path):
    with pytest.raises(InputError, match=r"--device cuda: expected a CUDA device .* got 0"):
        train(settings(tmp_path, device="cuda"))


# ---- data ----


def test_the_digits_are_split_by_class():
    data = open_data("digits", 0)
    assert (len(data.train.labels), len(data.held_out.labels)) == (1347, 450)
    counts = np.bincount(data.held_out.labels)
    assert counts.min() >= 43 and counts.max() <= 46
    image = data.train.image(3, None)
    assert image.shape == (8, 8, 1) and image.dtype == np.uint8 and image.max() == 16
    # no image is on both sides
    both = np.concatenate([data.train.images, data.held_out.images]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) == 1797


def test_digits_are_shifted_by_at_most_a_pixel():
    source = open_data("digits", 0).train
    image = source.image(0, None)[..., 0]
    padded = np.pad(image, 1)
    shifted = {padded[i : i + 8, j : j + 8].tobytes() for i in range(3) for j in range(3)}
    random = np.random.default_rng(0)
    seen = {source.image(0, random)[..., 0].tobytes() for _ in range(200)}
    assert seen == shifted


def test_a_folder_of_images(tmp_path):
    data = open_data(str(image_folder(tmp_path)), 16)
    assert data.classes == list(CLASSES)
    assert data.train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    for index in (0, 9, 23):
        image = data.train.image(index, np.random.default_rng(0))
        assert image.shape == (16, 16, 3) and image.dtype == np.uint8
        # the classes' brightness: the right file was read
        assert image.mean() // 80 == data.train.labels[index]


def test_crops_lie_inside_and_have_the_areas_and_ratios_that_are_said(tmp_path):
    source = open_data(str(image_folder(tmp_path)), 16).train
    random = np.random.default_rng(0)
    for width, height in ((30, 24), (7, 300), (224, 224)):
        boxes = np.array([source._random_box(width, height, random) for _ in range(500)])
        left, top, right, bottom = boxes.T
        assert left.min() >= 0 and top.min() >= 0
        assert right.max() <= width and bottom.max() <= height
        ratios = (right - left) / (bottom - top)
        assert ratios.min() >= 3 / 4 - 1e-9 and ratios.max() <= 4 / 3 + 1e-9
        shares = (right - left) * (bottom - top) / (width * height)
        if width == height:
            assert shares.min() < 0.15 and shares.max() > 0.9 and shares.min() >= 0.08
    # 256 of 256 x 300, cut to 224, as Resize(256) and CenterCrop(224) do it
    assert source._centre(256, 300) == (16, 38, 240, 262)


def test_evaluation_takes_the_same_crop_every_time(tmp_path):
    source = open_data(str(image_folder(tmp_path)), 16).held_out
    assert np.array_equal(source.image(1, None), source.image(1, None))


def cifar10(folder, images=5, **other):
    """A folder in the format of the published one, which holds 10,000 images in each file."""
    random = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        data = random.integers(0, 256, (images, 3072)).astype(np.uint8)
        content = {"data": data, "labels": [1, 2, 3, 4, 9][:images], "batch_label": "x"} | other
        content = {key.encode(): value for key, value in content.items()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=3))
    return data


def test_cifar10_is_read_by_planes(tmp_path):
    last = cifar10(tmp_path)
    data = open_data(str(tmp_path), 0)
    assert (len(data.train.labels), len(data.held_out.labels)) == (25, 5)
    assert data.held_out.labels.tolist() == [1, 2, 3, 4, 9]
    image = data.held_out.image(2, None)
    assert np.array_equal(image, last[2].reshape(3, 32, 32).transpose(1, 2, 0))
    assert Config.of(str(tmp_path)).schedule == "cosine"


def test_cifar10_is_trained_on(tmp_path):
    cifar10(tmp_path / "cifar-10-batches-py")
    out = tmp_path / "out"
    data = str(tmp_path / "cifar-10-batches-py")
    given = {"epochs": 1, "batch": 5, "workers": 0, "log_every": 1}
    result = train(Config.of(data, out=str(out), **given))
    assert (result.steps, len(rows(out))) == (5, 5)
    assert result.accuracy.top1 * 5 % 1 == 0
    best = saved(out, "best.pt")
    assert best["state_dict"]["fc.weight"].shape[0] == 10
    with pytest.raises(InputError, match=r"training digest: \w+ in the checkpoint, now"):
        cifar10(tmp_path / "cifar-10-batches-py", labels=[1, 2, 3, 4, 8])
        train(Config.of(data, out=str(out), **given, resume="yes"))


class Evil:
    def __reduce__(self):
        return print, ("run",)


BROKEN_PICKLES = {
    "AttributeError": b"cnumpy\n_reconstruct\n.",
    "TypeError": b"cnumpy\nndarray\n)R.",
    "OverflowError": b"\x8e" + 7 * b"\xff" + b"\x7f.",
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(pickle.dumps(Evil()), r"a pickle .* holds a builtins.print", id="code"),
        pytest.param(b"\x80\x04K", r"data_batch_3: expected a pickle", id="cut short"),
        *(
            pytest.param(
                content, rf"data_batch_3: expected a pickle of CIFAR-10; {error}: ", id=error
            )
            for error, content in BROKEN_PICKLES.items()
        ),
        pytest.param(
            pickle.dumps({b"data": np.zeros((2, 5), np.uint8)}),
            r"expected .* uint8 \[N, 3072\], .* uint8 \(2, 5\)",
            id="shape",
        ),
        pytest.param(
            pickle.dumps({b"data": np.zeros((2, 3072))}), r"got dict .* float64", id="dtype"
        ),
        pytest.param(pickle.dumps({b"data": "x" * 99}), r"got dict with b'data' 'xxx", id="text"),
        pytest.param(
            pickle.dumps({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}),
            r"got dict .* \(0, 3072\)",
            id="none",
        ),
        pytest.param(
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": 7}),
            r"expected b'labels', a list of int, got 7",
            id="label list",
        ),
        pytest.param(
            pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}),
            r"expected 2 b'labels', got 1",
            id="labels",
        ),
        pytest.param(pickle.dumps([1]), r"expected a pickled dict .* got list", id="list"),
        pytest.param(
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}),
            r"expected labels from 0 to 9, got 1 to 10",
            id="label",
        ),
    ],
)
def test_what_is_no_cifar10_is_refused_and_not_run(tmp_path, capsys, content, message):
    cifar10(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_data(str(tmp_path), 0)
    assert capsys.readouterr().out == ""


def test_folders_that_hold_no_data(tmp_path):
    with pytest.raises(InputError, match=r"there is no train and no val in it, it is empty$"):
        open_data(str(tmp_path), 16)
    image_folder(tmp_path)
    file = tmp_path / "train" / "ant" / "0.JPEG"
    with pytest.raises(InputError, match=r"0.JPEG', which is a file"):
        open_data(str(file), 16)
    for image in (tmp_path / "val" / "bee").iterdir():
        image.unlink()
    with pytest.raises(InputError, match=r"val/bee: expected images \(.jpg, .*found none"):
        open_data(str(tmp_path), 16)
    (tmp_path / "val" / "bee").rmdir()
    with pytest.raises(InputError, match=r"same classes .* got 3 and 2; only in train: bee$"):
        open_data(str(tmp_path), 16)
    (tmp_path / "val").rename(tmp_path / "validation")
    with pytest.raises(InputError, match=r"there is no val in it, only train/, validation/$"):
        open_data(str(tmp_path), 16)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "val").mkdir()
    with pytest.raises(InputError, match=r"at least 2, found 0"):
        open_data(str(tmp_path / "empty"), 16)


# ---- order and loading ----


def test_an_epoch_has_every_image_at_most_once_and_epochs_differ():
    batches = TrainingBatches(100, 24, 2, rank=0, processes=1, seed=0)
    epochs = []
    for epoch in (0, 1):
        batches.start_at(epoch, 0)
        keys = [key for batch in batches for key in batch]
        assert len(keys) == 96 and all(key[:2] == (0, epoch) for key in keys)
        epochs.append([key[2] for key in keys])
        assert len(set(epochs[-1])) == 96
    assert epochs[0] != epochs[1]


def test_a_step_has_the_same_micro_batches_for_any_number_of_processes():
    alone = list(TrainingBatches(100, 24, 4, rank=0, processes=1, seed=3))
    pair = [list(TrainingBatches(100, 24, 4, rank=r, processes=2, seed=3)) for r in (0, 1)]
    assert len(alone) == 16 and all(len(batch) == 6 for batch in alone)
    assert alone == [batch for both in zip(*pair, strict=True) for batch in both]


def test_an_epoch_goes_on_from_any_step():
    batches = TrainingBatches(100, 24, 2, rank=0, processes=1, seed=0)
    whole = list(batches)
    batches.start_at(0, 3)
    assert list(batches) == whole[6:] and len(batches) == 2


def test_evaluation_has_every_image_once():
    shares = [list(EvaluationBatches(10, 3, rank=r, processes=3)) for r in range(3)]
    assert [len(batch) for share in shares for batch in share] == [3, 1, 3, 3]
    assert sorted(key[2] for share in shares for batch in share for key in batch) == list(range(10))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_depends_on_seed_epoch_and_image_alone(tmp_path, workers):
    source = open_data(str(image_folder(tmp_path)), 16).train
    keys = [[(5, 1, 3), (5, 1, 20)], [(5, 2, 3), (6, 1, 3)], [(5, 1, 3)]]
    global_state = torch.get_rng_state()
    first, second, third = loader(Images(source), keys, workers, pin=False)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert first.images.shape == (2, 3, 16, 16) and first.images.dtype == torch.uint8
    assert first.images.is_contiguous(memory_format=torch.channels_last)
    assert first.labels.tolist() == [0, 2] and first.seconds > 0
    assert torch.equal(first.images[0], third.images[0])
    assert not torch.equal(first.images[0], second.images[0])  # another epoch
    assert not torch.equal(first.images[0], second.images[1])  # another seed
    direct = Images(source).__getitems__(keys[0])
    assert torch.equal(first.images, direct.images)


# ---- images that cannot be read ----

BROKEN = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:300]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("not an image"),
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("how", BROKEN)
def test_an_image_that_cannot_be_read_is_named(tmp_path, how):
    source = open_data(str(image_folder(tmp_path)), 16).train
    file = tmp_path / "train" / "bee" / "2.JPEG"
    BROKEN[how](file)
    with pytest.raises(CorruptImageError, match=r"train/bee/2\.JPEG: \w+"):
        for index in range(8, 16):
            source.image(index, None)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE], ids=errno.errorcode.get)
def test_a_failing_disk_is_fatal_even_where_corrupt_images_are_not(
    tmp_path, monkeypatch, number, workers
):
    """The image is named, without a traceback from a loading process."""
    from PIL import Image

    open_image = Image.open

    def fails(file):
        if file.name.endswith("bee/2.JPEG"):
            raise OSError(number, os.strerror(number), file.name)
        return open_image(file)

    data = str(image_folder(tmp_path / "data"))
    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(InputError) as error:
        train(settings(tmp_path, data=data, batch=8, corrupt="skip", workers=workers))
    assert re.fullmatch(
        rf"\S*/bee/2\.JPEG: cannot be read: {os.strerror(number)}", str(error.value)
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL], ids=errno.errorcode.get)
def test_a_file_that_the_system_refuses_is_a_corrupt_image(tmp_path, monkeypatch, number):
    """A broken file may name a place to seek to, which gives EINVAL."""
    from PIL import Image

    def fails(path):
        raise OSError(number, os.strerror(number), str(path))

    source = open_data(str(image_folder(tmp_path)), 16).train
    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(CorruptImageError, match=r"train/ant/0\.JPEG: \w+: "):
        source.image(0, None)


def test_memory_that_runs_out_is_no_corrupt_image(tmp_path, monkeypatch):
    from PIL import Image

    def fails(*_):
        raise MemoryError

    data = str(image_folder(tmp_path / "data"))
    monkeypatch.setattr(Image.Image, "convert", fails)
    with pytest.raises(MemoryError):
        train(settings(tmp_path, data=data, batch=8, corrupt="skip"))


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images_are_fatal_or_left_out(tmp_path, capsys, workers):
    folder = image_folder(tmp_path / "data")
    for part in ("train", "val"):
        BROKEN["truncated"](folder / part / "cat" / "0.JPEG")
    given = {"data": str(folder), "batch": 8, "workers": workers}
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"val/cat/0\.JPEG|train/cat/0\.JPEG.*--corrupt skip"):
        train(settings(out, **given))
    assert saved(out)["epoch"] == 0
    capsys.readouterr()
    # a resumed run may choose otherwise
    result = train(settings(out, **given, corrupt="skip", resume="yes"))
    errors = capsys.readouterr().err
    assert errors.count("train/cat/0.JPEG") == 1 and errors.count("val/cat/0.JPEG") == 1
    assert result.steps == 6
    assert round(result.accuracy.top1 * 11, 6).is_integer()  # of 12 images one is left out


def test_a_batch_without_any_readable_image(tmp_path):
    folder = image_folder(tmp_path / "data")
    for file in (folder / "train").rglob("*.*"):
        BROKEN["empty"](file)
    with pytest.raises(
        InputError, match=r"step 1: expected at least one readable .* of 8, got none"
    ):
        train(settings(tmp_path / "out", data=str(folder), batch=8, corrupt="skip"))


# ---- training ----


@pytest.mark.parametrize("model", ["small_epsanet", "small_senet"])
def test_the_small_networks(model):
    network = MODELS[model](7, in_chans=2)
    assert network(torch.randn(3, 2, 9, 8)).shape == (3, 7)


FOUR_STEPS = {"batch": 24, "epochs": 1, "lr": 0.01}


@pytest.fixture
def in_float64(monkeypatch):
    """Networks and images of the trainings are float64. Their logged losses stay float32."""
    small_epsanet, prepared = MODELS["small_epsanet"], Inputs.prepared
    monkeypatch.setitem(MODELS, "small_epsanet", lambda *a, **k: small_epsanet(*a, **k).double())
    monkeypatch.setattr(Inputs, "prepared", lambda *args: prepared(*args).double())


@pytest.mark.parametrize("channels_last", (False, True))
def test_fused_trains_as_the_reference(tmp_path, in_float64, channels_last):
    """In every weight, to float64's rounding."""
    for psa in ("fused", "reference"):
        train(settings(tmp_path / psa, **FOUR_STEPS, psa=psa, channels_last=channels_last))
    fused, reference = (trained(tmp_path / psa) for psa in ("fused", "reference"))
    assert_near(fused, reference)
    losses = [torch.tensor(losses_of(tmp_path / psa)) for psa in ("fused", "reference")]
    assert len(losses[0]) == 4 and losses[0].unique().numel() == 4
    torch.testing.assert_close(*losses, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


def test_fused_drifts_no_further_than_the_reference(tmp_path, request):
    """Drift is the distance of the float32 weights from the float64 training's, in both layouts."""
    for psa in ("fused", "reference"):
        for layout in (False, True):
            out = tmp_path / f"{psa}{layout}"
            train(settings(out, **FOUR_STEPS, psa=psa, channels_last=layout))
    request.getfixturevalue("in_float64")
    train(settings(tmp_path / "exact", **FOUR_STEPS, psa="reference"))
    exact = trained(tmp_path / "exact")
    drift = {
        psa: max((trained(tmp_path / f"{psa}{layout}") - exact).norm() for layout in (False, True))
        for psa in ("fused", "reference")
    }
    assert 0 < drift["fused"] <= 4 * drift["reference"], drift


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_it_learns_in_every_precision(tmp_path, amp):
    result = train(settings(tmp_path, amp=amp, channels_last=amp != "none"))
    losses = losses_of(tmp_path)
    assert losses[0] - losses[-1] > 0.2
    assert result.accuracy.top5 == 1  # of three classes
    assert bool(saved(tmp_path)["scaler"]) == (amp == "fp16")


def test_the_logs_and_the_weights_of_a_run(tmp_path, capsys):
    optional("tensorboard")
    config = settings(tmp_path, ema=0.5, tensorboard=True, log_every=4)
    result = train(config)
    steps, epochs = rows(tmp_path), rows(tmp_path, "epochs.csv")
    assert [int(row["step"]) for row in steps] == [4, 6, 8, 12]
    assert [(int(row["step"]), int(row["epoch"])) for row in epochs] == [(6, 1), (12, 2)]
    assert all(float(row["loader_images_per_s"]) > 0 for row in steps)
    assert float(epochs[-1]["top1"]) == result.accuracy.top1
    assert 0 < result.accuracy.top1 <= result.accuracy.top5 <= 1
    assert list(tmp_path.glob("events.out.tfevents.*"))
    out = capsys.readouterr().out
    assert "images/s (loader " in out and "top-1" in out

    # the weights that were evaluated are those of best.pt
    best = saved(tmp_path, "best.pt")
    assert evaluated(best)[1] == best["top1"]


def test_a_terminal_shows_progress(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(settings(tmp_path))
    shown = capsys.readouterr().err
    assert "epoch 2/2:" in shown and "held out:" in shown
    assert re.search(
        r"[1-6]/6 .*loss [\d.]+, [\d,]+ images/s \(loader [\d,]+, waited for \d+%\)", shown
    )


def test_the_average_is_of_the_weights(tmp_path):
    """After the first step it is a copy, after the second the mean of both."""
    train(settings(tmp_path / "one", ema=0.5, batch=96, epochs=1))
    train(settings(tmp_path / "two", ema=0.5, batch=96, epochs=2))
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    for name, weight in one["state_dict"].items():
        assert torch.equal(weight, one["ema"][f"module.{name}"])
        if weight.is_floating_point():
            expected = (weight + two["state_dict"][name]) / 2
            torch.testing.assert_close(two["ema"][f"module.{name}"], expected)


def test_the_paper_s_schedule(tmp_path):
    train(settings(tmp_path, schedule="step", decay_every=2, epochs=5, batch=96, lr=0.01))
    rates = [float(row["lr"]) for row in rows(tmp_path, "epochs.csv")]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])


def test_tensorboard_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(
        InputError, match=r"--tensorboard needs the package tensorboard, .*pip inst"
    ):
        train(settings(tmp_path, tensorboard=True))


@pytest.mark.parametrize("code", ["import epsa_fused.train", "from epsa_fused.train import train"])
def test_numpy_that_is_missing(code):
    """The package imports without numpy; training asks for it."""
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.modules['numpy'] = None; import epsa_fused; {code}",
        ],
        env=environment(),
        capture_output=True,
        text=True,
    )
    last = result.stderr.splitlines()[-1]
    assert last.endswith(
        "InputError: training needs the package numpy, which is not installed: pip install numpy"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 63, "accumulate": 2}, r"multiple of 2 \(1 processes x 2 micro-.* got 63"),
        ({"batch": 97}, "--batch: expected at most the 96 training images, got 97"),
    ],
)
def test_batches_that_do_not_fit(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        train(settings(tmp_path, **given))


@pytest.fixture
def two_images_a_class(tmp_path):
    """6 images to train on and 3 held out. small_epsanet halves H and W of an image once."""
    return str(image_folder(tmp_path / "data", train=2, held_out=1))


@pytest.mark.parametrize(
    ("given", "would_do"),
    [
        ({"batch": 1}, [{"batch": 2}, {"image_size": 4}]),
        (
            {"batch": 2, "accumulate": 2},
            [{"batch": 4}, {"accumulate": 1}, {"image_size": 4}],
        ),
    ],
)
def test_a_micro_batch_of_one_value(tmp_path, two_images_a_class, given, would_do):
    """Refused before anything is written. What the message offers trains."""
    given = {"data": two_images_a_class, "image_size": 2, "epochs": 1} | given
    offered = " or ".join(
        f"--{name.replace('_', '-')} {value}" for each in would_do for name, value in each.items()
    )
    with pytest.raises(
        InputError,
        match=r"^--batch: expected at least 2 images in a micro-batch, got .* images of 2 x 2 give "
        rf"maps of 1 x 1 in small_epsanet, .*; {offered} would do$",
    ):
        train(settings(tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()
    for i, other in enumerate(would_do):
        config = settings(tmp_path / f"{i}", **given | other)
        assert train(config).steps == 6 // config.batch


def test_a_micro_batch_of_one_value_of_the_digits(tmp_path):
    """--image-size would not help: it is a folder's."""
    config = Config.of("digits", out=str(tmp_path), model="epsanet50", batch=1)
    with pytest.raises(InputError, match=r"images of 8 x 8 .*; --batch 2 would do$"):
        train(config)


def test_one_readable_image_of_a_micro_batch(tmp_path, two_images_a_class, capsys):
    folder = Path(two_images_a_class)
    for name in CLASSES:
        BROKEN["empty"](folder / "train" / name / "0.JPEG")
    given = {"data": str(folder), "batch": 3, "epochs": 1, "corrupt": "skip"}
    given["seed"] = 1  # one of the two steps gets two readable images, the other one
    with pytest.raises(
        InputError,
        match=r"^step [12]: expected at least 2 readable images in a micro-batch of 3, got 1; "
        r"images of 2 x 2 give maps of 1 x 1 in small_epsanet, .* a larger --batch$",
    ):
        train(settings(tmp_path / "small", **given, image_size=2))
    assert "left out" in capsys.readouterr().err
    assert train(settings(tmp_path / "large", **given, image_size=4)).steps == 2


def test_looking_at_the_maps_changes_nothing(tmp_path, two_images_a_class):
    config = settings(tmp_path / "out", data=two_images_a_class, batch=2, dropout=0.5)
    with Processes("cpu") as processes:
        training = Training(config, processes)
        before = {name: value.clone() for name, value in training.model.state_dict().items()}
        random = torch.get_rng_state()
        assert [training._fewest_values(size, size) for size in (2, 3, 8)] == [1, 4, 16]
        assert torch.equal(torch.get_rng_state(), random)
        assert training.model.training
        for name, value in training.model.state_dict().items():
            assert torch.equal(value, before[name]), name
        training.close()


@pytest.mark.parametrize("given", [{}, {"log_every": 100, "checkpoint_every": 3}])
def test_a_loss_that_is_not_finite(tmp_path, given):
    """It is noticed in the log, or before a checkpoint."""
    with pytest.raises(
        InputError, match=r"expected a finite loss, got nan \(--lr is 1e\+30\); .*checkpoint.pt is"
    ):
        train(settings(tmp_path, lr=1e30, **given))
    assert saved(tmp_path)["steps_done"] == 0


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out: cannot write to .*file/out"):
        train(settings(tmp_path / "file" / "out"))


def test_short_is_what_the_command_line_gives(tmp_path):
    """The subprocesses of the other tests train as those in this process do."""
    config = Config.of_command_line(command_line(tmp_path, ema=0.5, channels_last=True))
    assert config == settings(tmp_path, ema=0.5, channels_last=True)


@pytest.mark.slow
def test_the_digits_are_learned(tmp_path):
    result = train(Config.of("digits", out=str(tmp_path)))
    assert result.accuracy.top1 >= 0.985  # about 99%; 0.2% are one image
