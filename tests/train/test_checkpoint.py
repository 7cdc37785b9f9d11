"""Checkpoints and logs on the disk: kills while saving, full disks, cut files."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import stat

import numpy as np
import pytest
import torch
from support.training import (
    LIMIT,
    STEPS,
    saved,
    settings,
)

from epsa_fused.train import InputError, checkpoint, train
from epsa_fused.train.log import CsvLog


def save_and_die(path, previous, state, moment) -> None:
    """Saves, and is killed before or after one of the calls, or after so many bytes."""
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
    """It is the old one until the renaming, then the new one, and the next save works. The previous
    checkpoint, if there is one, is whole and not newer."""
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

    # a disk that is full by then leaves the last checkpoint, and no half copy
    def full(source, target):
        target.write_bytes(source.read_bytes()[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(InputError, match=r"No space left on device; the last one .* is untouched"):
        checkpoint.write(path, {"format": checkpoint.FORMAT, "i": 3}, previous)
    assert checkpoint.read(path)["i"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_folder_that_cannot_be_forced_to_the_disk(tmp_path, monkeypatch):
    """The new checkpoint is in place by then, and the message says so."""
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
    """The limit of a file's size is between the first checkpoint's and the next one's, which also
    holds the momentum."""
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
    """Only the checkpoint is forced to the disk. A power cut may spoil the log's end."""
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
