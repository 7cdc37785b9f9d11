"""Training that is cut off goes on bitwise, or says why it cannot."""

from __future__ import annotations

import argparse
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from support.training import (
    STEPS,
    assert_same_run,
    differences,
    image_folder,
    images,
    losses,
    rows,
    saved,
    settings,
)
from torch import nn

from epsa_fused.models import MODELS
from epsa_fused.train import InputError, checkpoint, train
from epsa_fused.train.data import open_data
from epsa_fused.train.inputs import Inputs
from epsa_fused.train.training import Training


class CutOff(BaseException):
    """A crash that nothing catches."""


def cut_off_after(monkeypatch, steps: int, config) -> None:
    """Trains so many steps; the next one does not end."""
    one_step = Training._one_step

    def until(self, *args):
        if self.steps_done == steps:
            raise CutOff
        return one_step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(Training, "_one_step", until)
        train(config)


def linear(classes: int, **_) -> nn.Module:
    """Replaces a network whose float16 convolutions are slow on the CPU."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"dropout": 0.3, "ema": 0.9}, id="dropout and average"),
        pytest.param({"warmup": 1, "schedule": "cosine"}, id="warm-up"),
        pytest.param({"amp": "bf16", "accumulate": 2, "channels_last": True}, id="bf16"),
        pytest.param({"amp": "fp16", "model": "epsanet50"}, id="fp16"),
    ],
)
def test_a_run_that_is_cut_off_goes_on_bitwise(tmp_path, monkeypatch, given):
    """It is cut off twice: past the checkpoint of step 4, and at the start of an epoch."""
    monkeypatch.setitem(MODELS, "epsanet50", linear)
    torch.set_num_threads(1)
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    train(settings(uncut, **given))
    cut_off_after(monkeypatch, 5, settings(cut, **given))
    assert (saved(cut)["steps_done"], len(losses(cut))) == (4, 5)
    torch.rand(7)  # a new process has another random state
    cut_off_after(monkeypatch, STEPS, settings(cut, **given, resume="yes"))
    assert (saved(cut)["epoch"], saved(cut)["step"]) == (1, 0)
    result = train(settings(cut, **given, resume="yes"))
    assert result.steps == 2 * STEPS and not result.interrupted
    assert_same_run(uncut, cut)
    # a run that is done does nothing more
    again = train(settings(cut, **given, resume="yes"))
    assert (again.steps, again.accuracy) == (2 * STEPS, result.accuracy)
    assert_same_run(uncut, cut)


def test_crops_go_on_bitwise_with_another_number_of_workers(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    given = {"data": str(image_folder(tmp_path / "data")), "image_size": 12, "batch": 4}
    train(settings(tmp_path / "uncut", **given, workers=0))
    cut_off_after(monkeypatch, 8, settings(tmp_path / "cut", **given, workers=2))
    # the data may have moved
    (tmp_path / "data").rename(tmp_path / "moved")
    given["data"] = str(tmp_path / "moved")
    train(settings(tmp_path / "cut", **given, workers=1, resume="yes"))
    assert_same_run(tmp_path / "uncut", tmp_path / "cut")


def cut_off_in_the_evaluation(monkeypatch, config) -> None:
    """Cuts off after the evaluation's first images."""

    check = Inputs.check

    def evaluated_never(self, batch):
        if not torch.is_grad_enabled():
            raise CutOff
        check(self, batch)

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(Inputs, "check", evaluated_never)
        train(config)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("given", [{}, {"ema": 0.9, "dropout": 0.3, "workers": 1}], ids=str)
def test_a_run_that_is_cut_off_in_an_evaluation_goes_on_bitwise(tmp_path, monkeypatch, given):
    """The epoch's steps were saved, so it goes on with the evaluation."""
    torch.set_num_threads(1)
    given = given | {"checkpoint_every": 1000}
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    train(settings(uncut, **given))
    cut_off_in_the_evaluation(monkeypatch, settings(cut, **given))
    assert (saved(cut)["epoch"], saved(cut)["step"], len(losses(cut))) == (0, STEPS, STEPS)
    torch.rand(7)
    # cut off again in it, and then after its row but before its checkpoint
    cut_off_in_the_evaluation(monkeypatch, settings(cut, **given, resume="yes"))
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(Training, "_save", lambda self: (_ for _ in ()).throw(CutOff))
        train(settings(cut, **given, resume="yes"))
    assert len(rows(cut, "epochs.csv")) == 1
    train(settings(cut, **given, resume="yes"))
    assert_same_run(uncut, cut)


def test_a_signal_in_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, monkeypatch, capsys):
    """An evaluation may take minutes, for which schedulers do not wait."""
    torch.set_num_threads(1)
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    given = {"batch": 8}  # three batches of held-out images
    train(settings(uncut, **given))
    batches = []
    prepared = Inputs.prepared

    def note(self, batch):
        if not torch.is_grad_enabled():
            batches.append(len(batch.labels))
            os.kill(os.getpid(), signal.SIGTERM)
        return prepared(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Inputs, "prepared", note)
        result = train(settings(cut, **given))
    assert batches == [8]
    assert result.interrupted and result.steps == saved(cut)["step"] == 12
    assert "interrupted and saved after 12 steps (epoch 1 of 2)" in capsys.readouterr().out
    train(settings(cut, **given, resume="yes"))
    assert_same_run(uncut, cut)


def test_the_checkpoint_of_an_earlier_step_is_kept(tmp_path):
    """The checkpoint before the evaluation does not count: it has the last one's weights."""
    train(settings(tmp_path, epochs=1))
    assert (saved(tmp_path)["epoch"], saved(tmp_path)["steps_done"]) == (1, 6)
    assert saved(tmp_path, "checkpoint.previous.pt")["steps_done"] == 4


def test_a_run_goes_on_from_the_previous_checkpoint(tmp_path, monkeypatch):
    """The last checkpoint has finite weights, but they are far off."""
    torch.set_num_threads(1)
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    train(settings(uncut))
    one_step = Training._one_step

    def blows_up(self, *args):
        loss = one_step(self, *args)
        if self.steps_done == 9:  # in the tenth step
            with torch.no_grad():
                next(self.model.parameters()).fill_(1e30)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_one_step", blows_up)
        given = {"log_every": 1000, "checkpoint_every": 5}
        with pytest.raises(InputError, match=r"checkpoint.pt is the last .*, .*previous.pt one of"):
            train(settings(cut, **given))
    assert saved(cut)["state_dict"]["conv1.weight"].max() > 1e29
    shutil.copy(cut / "checkpoint.previous.pt", cut / "checkpoint.pt")
    train(settings(cut, resume="yes"))
    assert differences(saved(uncut), saved(cut)) == []


@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, name):
    """The loss shows them only in the next step."""
    one_step = Training._one_step

    def then_nan(self, *args):
        loss = one_step(self, *args)
        if self.steps_done == 3:
            next(v for k, v in self.model.state_dict().items() if k.endswith(name)).fill_(torch.nan)
        return loss

    monkeypatch.setattr(Training, "_one_step", then_nan)
    with pytest.raises(InputError, match=r"step 4: expected finite weights and statistics"):
        train(settings(tmp_path))
    assert saved(tmp_path)["steps_done"] == 0
    assert len(losses(tmp_path)) == 4  # all finite


def test_files_that_are_no_checkpoint_to_resume_from(tmp_path):
    train(settings(tmp_path, epochs=1))
    path = tmp_path / "checkpoint.pt"
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    torch.save(best | {"format": saved(tmp_path)["format"]}, path)
    with pytest.raises(InputError, match="expected a checkpoint to resume from, got weights alone"):
        train(settings(tmp_path, epochs=1, resume="yes"))
    torch.save({"format": checkpoint.FORMAT, "args": argparse.Namespace()}, path)
    with pytest.raises(InputError, match="holds more than tensors and plain values"):
        train(settings(tmp_path, epochs=1, resume="yes"))


# ---- what cannot be resumed ----


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("done")
    train(settings(out, epochs=1, batch=96))
    return out


def test_a_checkpoint_of_other_arguments_says_which(done):
    before = (done / "checkpoint.pt").read_bytes()
    other = settings(done, epochs=1, batch=48, lr=0.2, psa="reference", log_every=3, resume="yes")
    with pytest.raises(InputError) as error:
        train(other)
    assert str(error.value).endswith(
        "is of another training: batch: 96 in the checkpoint, now 48; "
        "lr: 0.02 in the checkpoint, now 0.2; psa: fused in the checkpoint, now reference"
    )
    assert (done / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_other_data_says_so(done, monkeypatch):
    from epsa_fused.train import training

    data = training.open_data(images(), 8)
    data.train.labels = np.append(data.train.labels, 0)
    with monkeypatch.context() as patch:
        patch.setattr(training, "open_data", lambda *_: data)
        with pytest.raises(InputError, match=r"training images: 96 in the checkpoint, now 97"):
            train(settings(done, epochs=1, batch=96, resume="yes"))


def test_a_checkpoint_of_as_many_other_files_says_so(tmp_path):
    """The digest covers names, not contents."""
    folder = image_folder(tmp_path / "data")
    given = {"data": str(folder), "batch": 24, "epochs": 1}
    train(settings(tmp_path, **given))
    (folder / "train" / "ant" / "0.JPEG").write_bytes((folder / "val/ant/0.JPEG").read_bytes())
    train(settings(tmp_path, **given, resume="yes"))
    (folder / "train" / "ant" / "0.JPEG").rename(folder / "train" / "ant" / "00.JPEG")
    with pytest.raises(InputError, match=r"training: training digest: \w{16} in .*, now \w{16}$"):
        train(settings(tmp_path, **given, resume="yes"))


def test_the_digest_is_of_images_and_labels(tmp_path):
    data = open_data("digits", 0).train
    digests = [data.digest(), open_data("digits", 0).train.digest()]
    assert digests[0] == digests[1]
    data.images[5, 3, 3] += 1
    digests.append(data.digest())
    data.labels[5] += 1
    digests.append(data.digest())
    assert len(set(digests)) == 3


def test_a_run_is_not_overwritten(done):
    before = (done / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match=r"holds a run already .* expected --resume"):
        train(settings(done, epochs=1, batch=96))
    assert (done / "checkpoint.pt").read_bytes() == before


def test_auto_resumes_where_there_is_a_run_and_else_starts(tmp_path, monkeypatch):
    """A scheduler can repeat one command."""
    torch.set_num_threads(1)
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    train(settings(uncut))
    config = settings(cut, resume="auto")
    cut_off_after(monkeypatch, 5, config)
    assert train(config).steps == train(config).steps == 2 * STEPS
    assert_same_run(uncut, cut)
    # it does not start anew beside remains of a run
    (cut / "checkpoint.pt").unlink()
    for resume in ("auto", "no"):
        with pytest.raises(InputError, match=r"previous.pt and no checkpoint.pt; expected a copy"):
            train(settings(cut, resume=resume))
    (cut / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(InputError, match="a file of 0 bytes that is cut short"):
        train(config)


def test_a_run_goes_on_to_more_epochs_as_one_that_began_with_them(tmp_path):
    torch.set_num_threads(1)
    two, more = tmp_path / "two", tmp_path / "more"
    given = {"decay_every": 1}
    train(settings(two, **given, epochs=2))
    train(settings(more, **given, epochs=1))
    result = train(settings(more, **given, epochs=2, resume="yes"))
    assert result.steps == 2 * STEPS
    assert_same_run(two, more)
    with pytest.raises(InputError, match=r"--epochs: expected at least the 2 .* has begun, got 1"):
        train(settings(more, **given, epochs=1, resume="yes"))


def test_a_run_does_not_end_before_the_epoch_that_it_is_in(tmp_path, monkeypatch):
    """Its weights are behind those of the epoch before."""
    cut_off_after(monkeypatch, STEPS + 5, settings(tmp_path))
    assert (saved(tmp_path)["epoch"], saved(tmp_path)["step"]) == (1, 2)
    with pytest.raises(InputError, match=r"--epochs: expected at least the 2 .* has begun, got 1"):
        train(settings(tmp_path, epochs=1, resume="yes"))


def test_the_cosine_belongs_to_its_number_of_epochs(tmp_path):
    train(settings(tmp_path, schedule="cosine", epochs=1, batch=96))
    with pytest.raises(InputError, match=r"epochs: 1 in the checkpoint, now 2"):
        train(settings(tmp_path, schedule="cosine", epochs=2, batch=96, resume="yes"))


def test_nothing_to_resume(tmp_path):
    with pytest.raises(InputError, match=r"expected a checkpoint to resume from, there is no such"):
        train(settings(tmp_path, resume="yes"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda data: data[: len(data) // 2], "cut short or damaged", id="half"),
        pytest.param(lambda data: b"", "a file of 0 bytes that is cut short", id="empty"),
        pytest.param(
            lambda data: data[:700_000] + bytes([data[700_000] ^ 1]) + data[700_001:],
            "the checksum of .* differs",
            id="one bit",
        ),
    ],
)
def test_a_damaged_checkpoint(tmp_path, done, damage, message):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damage((done / "checkpoint.pt").read_bytes()))
    with pytest.raises(InputError, match=message):
        train(settings(tmp_path, epochs=1, batch=96, resume="yes"))


def test_a_file_of_another_kind(tmp_path):
    torch.save({"weights": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=r"expected a checkpoint of format 2, got None"):
        train(settings(tmp_path, resume="yes"))
