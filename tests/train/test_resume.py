"""Training that is cut off, by a crash, a kill, a signal or a full disk, goes on bitwise."""

from __future__ import annotations

import argparse
import errno
import fcntl
import multiprocessing
import os
import pty
import resource
import shutil
import signal
import stat
import subprocess
import sys
import termios
import threading

import numpy as np
import pytest
import torch
from support.training import (
    LIMIT,
    STEPS,
    TRAIN,
    command_line,
    differences,
    environment,
    image_folder,
    images,
    losses,
    rows,
    saved,
    settings,
    wait_for_steps,
)
from torch import nn

from epsa_fused.models import MODELS
from epsa_fused.train import InputError, checkpoint, train
from epsa_fused.train.data import open_data
from epsa_fused.train.interrupts import SIGNALS, Interrupts
from epsa_fused.train.log import CsvLog
from epsa_fused.train.training import Training


class CutOff(BaseException):
    """A crash: nothing may catch it."""


def cut_off_after(monkeypatch, steps: int, config) -> None:
    """Train until so many steps are done; the next one does not end."""
    one_step = Training._one_step

    def until(self, *args):
        if self.steps_done == steps:
            raise CutOff
        return one_step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(Training, "_one_step", until)
        train(config)


def assert_same_run(a, b) -> None:
    assert differences(saved(a), saved(b)) == []
    assert losses(a) == losses(b)
    assert differences(rows(a, "epochs.csv"), rows(b, "epochs.csv")) == []
    assert differences(saved(a, "best.pt"), saved(b, "best.pt")) == []


def linear(classes: int, **_) -> nn.Module:
    """In the place of a network whose float16 convolutions are slow on the CPU."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"dropout": 0.3, "ema": 0.9}, id="dropout and average"),
        pytest.param({"amp": "bf16", "accumulate": 2, "channels_last": True}, id="bf16"),
        pytest.param({"amp": "fp16", "model": "epsanet50"}, id="fp16"),
    ],
)
def test_a_run_that_is_cut_off_goes_on_bitwise(tmp_path, monkeypatch, given):
    """Twice: inside an epoch, past the checkpoint of step 4, and right at the next one's start."""
    monkeypatch.setitem(MODELS, "epsanet50", linear)
    torch.set_num_threads(1)
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    train(settings(uncut, **given))
    cut_off_after(monkeypatch, 5, settings(cut, **given))
    assert (saved(cut)["steps_done"], len(losses(cut))) == (4, 5)
    torch.rand(7)  # what a new process starts from is another state
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
    """Once its first images are read."""

    def never(self, batch):
        assert self.step == STEPS
        raise CutOff

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        one_step = Training._one_step
        check = Training._check_images

        def step(self, *args):
            with monkeypatch.context() as inside:
                inside.setattr(Training, "_check_images", check)
                return one_step(self, *args)

        patch.setattr(Training, "_one_step", step)
        patch.setattr(Training, "_check_images", never)
        train(config)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("given", [{}, {"ema": 0.9, "dropout": 0.3, "workers": 1}], ids=str)
def test_a_run_that_is_cut_off_in_an_evaluation_goes_on_bitwise(tmp_path, monkeypatch, given):
    """With the evaluation: the epoch's steps were saved."""
    torch.set_num_threads(1)
    given = given | {"checkpoint_every": 1000}
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    train(settings(uncut, **given))
    cut_off_in_the_evaluation(monkeypatch, settings(cut, **given))
    assert (saved(cut)["epoch"], saved(cut)["step"], len(losses(cut))) == (0, STEPS, STEPS)
    torch.rand(7)
    # again in it, and with its row written, but not saved
    cut_off_in_the_evaluation(monkeypatch, settings(cut, **given, resume="yes"))
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(Training, "_save", lambda self: (_ for _ in ()).throw(CutOff))
        train(settings(cut, **given, resume="yes"))
    assert len(rows(cut, "epochs.csv")) == 1
    train(settings(cut, **given, resume="yes"))
    assert_same_run(uncut, cut)


def test_a_signal_in_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, monkeypatch, capsys):
    """Schedulers do not wait for the minutes that it may take."""
    torch.set_num_threads(1)
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    given = {"batch": 8}  # three batches of held-out images
    train(settings(uncut, **given))
    batches = []
    prepared = Training._prepared

    def note(self, batch):
        if not self.model.training:
            batches.append(len(batch.labels))
            os.kill(os.getpid(), signal.SIGTERM)
        return prepared(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_prepared", note)
        result = train(settings(cut, **given))
    assert batches == [8]
    assert result.interrupted and result.steps == saved(cut)["step"] == 12
    assert "interrupted and saved after 12 steps (epoch 1 of 2)" in capsys.readouterr().out
    train(settings(cut, **given, resume="yes"))
    assert_same_run(uncut, cut)


def test_the_checkpoint_of_an_earlier_step_is_kept(tmp_path):
    """Not the one that was saved before the evaluation, whose weights are the last one's."""
    train(settings(tmp_path, epochs=1))
    assert (saved(tmp_path)["epoch"], saved(tmp_path)["steps_done"]) == (1, 6)
    assert saved(tmp_path, "checkpoint.previous.pt")["steps_done"] == 4


def test_a_run_goes_on_from_the_previous_checkpoint(tmp_path, monkeypatch):
    """After one of finite weights that are lost all the same."""
    torch.set_num_threads(1)
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    train(settings(uncut))
    one_step = Training._one_step

    def blows_up(self, *args):
        loss = one_step(self, *args)
        if self.steps_done == 9:  # in the tenth step, which step 12's checkpoint is to hold
            with torch.no_grad():
                next(self.model.parameters()).fill_(1e30)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_one_step", blows_up)
        given = {"log_every": 1000, "checkpoint_every": 5}
        with pytest.raises(InputError, match=r"checkpoint.pt is the last .*, .*previous.pt one of"):
            train(settings(cut, **given))
    assert saved(cut)["state_dict"]["conv1.weight"].max() > 1e29  # and so lost
    shutil.copy(cut / "checkpoint.previous.pt", cut / "checkpoint.pt")
    train(settings(cut, resume="yes"))
    assert differences(saved(uncut), saved(cut)) == []


@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, name):
    """The loss does not show them before the next step."""
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


def start(out, **given) -> subprocess.Popen:
    return subprocess.Popen(
        [*TRAIN, *command_line(out, **given)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,  # of its own
    )


LONG = {"epochs": 12, "ema": 0.9, "dropout": 0.1}  # 72 steps
# Until a signal ends it, however late that comes.
ENDLESS = LONG | {"epochs": 10_000, "checkpoint_every": 1000, "workers": 1}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """The run that those below are to end like."""
    out = tmp_path_factory.mktemp("uncut")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(settings(out, **LONG))
    torch.set_num_threads(threads)
    return out


def go_on_as_uncut(uncut, out) -> int:
    """The epochs to which both are to go: more, where the machine stopped before a signal was
    sent, or did so in a test before."""
    epochs = max(saved(uncut)["epoch"], saved(out)["epoch"] + 1)
    if epochs > saved(uncut)["epoch"]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        train(settings(uncut, **LONG | {"epochs": epochs}, resume="yes"))
        torch.set_num_threads(threads)
    return epochs


def test_a_killed_run_loses_at_most_one_interval(tmp_path, uncut):
    endless = LONG | {"epochs": 10_000}
    killed_at = [0]
    for resume, more in (("no", 5), ("yes", 25)):
        process = start(tmp_path, **endless, resume=resume)
        wait_for_steps(process, tmp_path, killed_at[-1] + more)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        killed_at.append(len(losses(tmp_path)))
        # the row of a step comes before its checkpoint
        assert 0 <= killed_at[-1] - checkpoint.read(tmp_path / "checkpoint.pt")["steps_done"] <= 4
    epochs = go_on_as_uncut(uncut, tmp_path)
    process = start(tmp_path, **LONG | {"epochs": epochs}, resume="yes")
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, output
    assert "resumed after" in output
    assert_same_run(uncut, tmp_path)


def assert_saved_and_ended(process: subprocess.Popen, out) -> None:
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and "Traceback" not in output, output
    steps = saved(out)["steps_done"]
    assert 5 <= steps == len(losses(out))
    assert f"interrupted and saved after {steps:,} steps" in output


def test_ctrl_c_saves_the_step_and_ends_the_run(tmp_path, uncut):
    """A terminal sends it to the loading process too."""
    process = start(tmp_path, **ENDLESS)
    wait_for_steps(process, tmp_path, 5)
    os.killpg(process.pid, signal.SIGINT)
    assert_saved_and_ended(process, tmp_path)
    torch.set_num_threads(1)
    epochs = go_on_as_uncut(uncut, tmp_path)
    train(settings(tmp_path, **LONG | {"epochs": epochs}, resume="yes"))
    assert_same_run(uncut, tmp_path)


def test_sigterm_does_too(tmp_path):
    """Sent to the loading process as well, and twice: by a scheduler and by torchrun."""
    process = start(tmp_path, **ENDLESS)
    wait_for_steps(process, tmp_path, 5)
    os.killpg(process.pid, signal.SIGTERM)
    process.terminate()
    assert_saved_and_ended(process, tmp_path)


def test_a_terminal_that_is_closed_does_too(tmp_path):
    """SIGHUP reaches every process in it, and what they write fails."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [*TRAIN, *command_line(tmp_path, **ENDLESS)],
        env=environment(),
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(end)
    reader = threading.Thread(target=read_until, args=(terminal, b"epoch 2/"))
    reader.start()  # a terminal that nobody reads stops who writes to it
    reader.join(LIMIT)
    os.close(terminal)
    assert process.wait(LIMIT) == 130
    steps = saved(tmp_path)["steps_done"]
    assert 6 <= steps == len(losses(tmp_path))


def test_a_pipe_whose_reader_ended_does_not_matter(tmp_path):
    """As with `| tee log`, where Ctrl-C ends tee too."""
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            [*TRAIN, *command_line(tmp_path, **ENDLESS)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdout.readline().startswith(b"epoch 1/")
    process.stdout.close()
    wait_for_steps(process, tmp_path, 5 * STEPS)  # more such lines
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT) == 130
    assert (tmp_path / "errors").read_text() == ""
    assert 5 * STEPS <= saved(tmp_path)["steps_done"] == len(losses(tmp_path))


def read_until(terminal, text):
    seen = b""
    while text not in seen:
        seen += os.read(terminal, 10_000)


def test_an_error_with_loading_processes_ends_the_program(tmp_path):
    """One that is not foreseen: they ignore the signal by which Python ends its processes."""
    arguments = command_line(tmp_path, **LONG | {"workers": 2})
    code = f"""
from epsa_fused.train.__main__ import main
from epsa_fused.train.training import Training
one_step = Training._one_step
def fails(self, batches, speed):
    if self.steps_done == 3:
        raise RuntimeError("not foreseen")
    return one_step(self, batches, speed)
Training._one_step = fails
main({arguments})
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert result.returncode == 1 and "RuntimeError: not foreseen" in result.stderr


def test_a_signal_that_is_ignored_stays_so():
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupts.pending
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupts.pending
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_outside_the_main_thread(tmp_path):
    """Signals are the main thread's alone, and stay as they are."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def run():
        result = train(settings(tmp_path, batch=96, epochs=1))
        seen.append((result.steps, [signal.getsignal(number) for number in SIGNALS]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(1, handlers)]


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


# ---- files ----


def save_and_die(path, previous, state, moment) -> None:
    """Save, and be killed before or after one of the calls, or once so many bytes are written."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if isinstance(moment, int):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # ends the process as SIGKILL does
        resource.setrlimit(resource.RLIMIT_FSIZE, (moment, moment))
    else:
        when, name, count = moment
        call = getattr(os, name)
        calls = iter(range(1, 100))

        def dies(*args, **kwargs):
            this = next(calls) == count
            if this and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if this:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, dies)
    checkpoint.write(path, state, previous)


@pytest.mark.parametrize(
    ("moment", "second"),
    [
        (0, 0),
        (1, 0),
        (100_000, 0),
        (4_000_000, 0),
        (("before", "fsync", 1), 0),
        (("after", "fsync", 1), 0),
        (("before", "unlink", 1), 0),
        (("after", "unlink", 1), 0),
        (("before", "link", 1), 0),
        (("after", "link", 1), 0),
        (("before", "replace", 1), 0),
        (("after", "replace", 1), 1),
        (("before", "fsync", 2), 1),
    ],
    ids=str,
)
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path, moment, second):
    """The one before or, from the renaming on, the new one; and the next save works. What has the
    previous one's name, if there is something, is whole and not newer."""
    path, previous = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.previous.pt"

    def state(i):
        # by numpy: torch's threads do not survive the fork
        return {
            "format": checkpoint.FORMAT,
            "first": torch.from_numpy(np.full(10**6, i)),
            "second": i,
        }

    def whole(path):
        saved = checkpoint.read(path)
        assert (saved["first"] == saved["second"]).all()
        return saved["second"]

    checkpoint.write(path, state(-1), previous)
    checkpoint.write(path, state(0), previous)
    assert (whole(path), whole(previous)) == (0, -1)
    process = multiprocessing.get_context("fork").Process(
        target=save_and_die, args=(path, previous, state(1), moment)
    )
    process.start()
    process.join(LIMIT)
    expected = signal.SIGXFSZ if isinstance(moment, int) else signal.SIGKILL
    assert process.exitcode == -expected
    assert whole(path) == second
    assert not previous.exists() or whole(previous) <= second
    checkpoint.write(path, state(2), previous)
    assert (whole(path), whole(previous)) == (2, second)
    assert sorted(tmp_path.iterdir()) == [previous, path]


def no_hard_links(*_):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_the_previous_one_is_copied_where_there_are_no_hard_links(tmp_path, monkeypatch):
    path, previous = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.previous.pt"
    monkeypatch.setattr(os, "link", no_hard_links)
    for i in range(3):
        checkpoint.write(path, {"format": checkpoint.FORMAT, "i": i}, previous)
    assert (checkpoint.read(path)["i"], checkpoint.read(previous)["i"]) == (2, 1)

    # and a disk that is full by then loses neither the last one nor its name to half a copy
    def full(source, target):
        target.write_bytes(source.read_bytes()[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(InputError, match=r"No space left on device; the last one .* is untouched"):
        checkpoint.write(path, {"format": checkpoint.FORMAT, "i": 3}, previous)
    assert checkpoint.read(path)["i"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_folder_that_cannot_be_forced_to_the_disk(tmp_path, monkeypatch):
    """By then the new checkpoint is in place; the message may not say otherwise."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, {"format": checkpoint.FORMAT, "i": 0})
    fsync = os.fsync

    def fails_for_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_for_folders)
    with pytest.raises(InputError, match=r"checkpoint.pt: saved, but .*disk: Input/output error"):
        checkpoint.write(path, {"format": checkpoint.FORMAT, "i": 1})
    assert checkpoint.read(path)["i"] == 1


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(tmp_path):
    """A limit on the size of files, between the first checkpoint's and the next one's, which has
    the momentum too."""
    config = settings(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_400_000, before[1]))
    try:
        with pytest.raises(
            InputError, match=r"checkpoint.pt: cannot save [\d,]+ bytes: File too l"
        ):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert saved(tmp_path)["steps_done"] == 0
    assert not list(tmp_path.glob("*.partial"))
    result = train(settings(tmp_path, resume="yes"))
    assert result.steps == 2 * STEPS


def test_a_full_disk_at_the_first_checkpoint(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"none was saved yet"):
            train(settings(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("*.pt*"))


def test_a_log_on_a_full_disk(tmp_path):
    log = CsvLog(tmp_path / "log.csv", ["step", "loss"], 0)
    log.file.close()
    log.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115  closed below
    with pytest.raises(InputError, match=r"log.csv: cannot write a row: No space left"):
        log.write({"step": 1, "loss": 0.5})
    log.close()


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(b"3,0.1", id="in the last column"),
        pytest.param(b"3", id="in the first"),
        pytest.param(200_000 * b"\0", id="zeros"),
        pytest.param(b"\xff,\xfe\r\n", id="bytes"),
        pytest.param(b'",1\r\n', id="a quote"),
    ],
)
def test_a_log_forgets_what_is_no_row(tmp_path, end):
    """The checkpoint is forced to the disk, the log is not: after a power cut its end may be cut or
    anything, and the run goes on all the same."""
    path = tmp_path / "log.csv"
    path.write_bytes(b"step,loss\r\n1,0.5\r\n2,0.25\r\n" + end)
    log = CsvLog(path, ["step", "loss"], 3)
    log.write({"step": 4, "loss": 0.0625})
    log.close()
    assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.25", "4,0.0625"]


def test_a_log_forgets_what_comes_after_the_checkpoint(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\r\n1,0.5\r\n2,0.25\r\n3,0.125\r\n4")  # killed in the middle of a row
    log = CsvLog(path, ["step", "loss"], 2)
    log.write({"step": 3, "loss": 1 / 3})
    log.close()
    assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.25", f"3,{1 / 3!r}"]


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
    """Their contents it does not see."""
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
    """So that a scheduler can repeat one command."""
    torch.set_num_threads(1)
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    train(settings(uncut))
    config = settings(cut, resume="auto")
    cut_off_after(monkeypatch, 5, config)
    assert train(config).steps == train(config).steps == 2 * STEPS
    assert_same_run(uncut, cut)
    # nor does it start anew where something is left of a run
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
