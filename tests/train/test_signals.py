"""Training that is killed or ended by a signal."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading

import pytest
import torch
from support.training import (
    LIMIT,
    STEPS,
    TRAIN,
    assert_same_run,
    command_line,
    environment,
    losses,
    saved,
    settings,
    wait_for_steps,
)

from epsa_fused.train import checkpoint, train
from epsa_fused.train.interrupts import SIGNALS, Interrupts


def start(out, **given) -> subprocess.Popen:
    return subprocess.Popen(
        [*TRAIN, *command_line(out, **given)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,  # of its own
    )


LONG = {"epochs": 5, "ema": 0.9, "dropout": 0.1}  # 30 steps
# A signal ends this run, however late it comes.
ENDLESS = LONG | {"epochs": 10_000, "checkpoint_every": 1000, "workers": 1}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """The uninterrupted run that the others are compared with."""
    out = tmp_path_factory.mktemp("uncut")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(settings(out, **LONG))
    torch.set_num_threads(threads)
    return out


def go_on_as_uncut(uncut, out) -> int:
    """The number of epochs for both runs. It grows where a signal came late."""
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
    for resume, more in (("no", 5), ("yes", 10)):
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
    """A scheduler and torchrun send it twice, and to the loading process too."""
    process = start(tmp_path, **ENDLESS)
    wait_for_steps(process, tmp_path, 5)
    os.killpg(process.pid, signal.SIGTERM)
    process.terminate()
    assert_saved_and_ended(process, tmp_path)


def test_a_terminal_that_is_closed_does_too(tmp_path):
    """SIGHUP reaches every process of the terminal, and their output fails."""
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
    reader.start()  # a terminal that nobody reads blocks its writers
    reader.join(LIMIT)
    os.close(terminal)
    assert process.wait(LIMIT) == 130
    steps = saved(tmp_path)["steps_done"]
    assert 6 <= steps == len(losses(tmp_path))


def test_a_pipe_whose_reader_ended_does_not_matter(tmp_path):
    """Ctrl-C also ends `tee` of `| tee log`."""
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
    """Loading processes ignore the signal by which Python would end them after such an error."""
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
    """nohup ignores SIGHUP."""
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
    """Only the main thread may set handlers, so they stay as they are."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def run():
        result = train(settings(tmp_path, batch=96, epochs=1))
        seen.append((result.steps, [signal.getsignal(number) for number in SIGNALS]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(1, handlers)]
