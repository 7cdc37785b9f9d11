"""Training by several processes gives the result of one process.

torchrun starts them where it matters how it ends them. Its own import and that of each process take
seconds, so elsewhere one process imports everything and becomes two.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys

import pytest
import torch
from support.tolerance import assert_no_worse
from support.training import (
    LIMIT,
    command_line,
    differences,
    environment,
    evaluated,
    image_folder,
    losses,
    losses_of,
    rows,
    saved,
    settings,
    trained,
    wait_for_steps,
)

from epsa_fused.train import InputError, train
from epsa_fused.train.processes import Processes
from epsa_fused.train.training import Training

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TORCHRUN += ["-m", "epsa_fused.train"]
GIVEN = {"epochs": 4}  # 24 steps
TERMS = 9 * 128  # products in the longest sum of the network's layers
ENDLESS = 10_000  # epochs, until a signal ends them, however late that comes


FORKS = """
import multiprocessing, os, socket, sys
from epsa_fused.train import training
from epsa_fused.train.__main__ import main

def trained(rank):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.exit(main())

with socket.socket() as any_port:
    any_port.bind(("localhost", 0))
    port = str(any_port.getsockname()[1])
os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
fork = multiprocessing.get_context("fork")
processes = [fork.Process(target=trained, args=(rank,)) for rank in (0, 1)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(any(process.exitcode for process in processes))
"""


def start(out, launcher=TORCHRUN, **given) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher, *command_line(out, **GIVEN | given)],
        # by default torchrun kills after 30 s, and a shared machine may stop for as long
        env=environment(TORCH_ELASTIC_SHUTDOWN_TIMEOUT=str(LIMIT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(out, **given) -> tuple[str, int]:
    """What two forks print, and their exit code."""
    return ended(start(out, [sys.executable, "-c", FORKS], **given))


def ended(process: subprocess.Popen) -> tuple[str, int]:
    """What it printed, and its exit code."""
    output, _ = process.communicate(timeout=LIMIT)
    return output, process.returncode


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The run of two processes."""
    out = tmp_path_factory.mktemp("pair")
    output, code = run(out)
    assert code == 0, output
    return out


def train_alone_and_compare(folder, two, given) -> None:
    """One process's training of so many micro-batches ends as that of `two`.

    The order of additions differs. Another layout, the yardstick, changes that of every sum.
    """
    torch.set_num_threads(1)
    train(settings(folder / "one", **given))
    train(settings(folder / "yardstick", **given, channels_last=True))
    for value in (trained, lambda out: torch.tensor(losses_of(out))):
        one, yardstick = value(folder / "one"), value(folder / "yardstick")
        assert (value(two) - one).norm() <= 4 * (yardstick - one).norm()
    first, *_, last = losses_of(folder / "one")
    assert first - last > 0.1  # they went somewhere


def test_two_processes_train_as_one_that_accumulates(tmp_path, pair):
    train_alone_and_compare(tmp_path, pair, GIVEN | {"accumulate": 2})
    # a batch without micro-batches is another training
    other = tmp_path / "other"
    train(settings(other, **GIVEN))
    apart, drift = ((trained(out) - trained(pair)).norm() for out in (other, tmp_path / "one"))
    assert apart > 100 * drift


def test_two_processes_evaluate_every_image_once(pair):
    """The first process's BatchNorm statistics count; they are saved."""
    best = saved(pair, "best.pt")
    loss, top1 = evaluated(best)
    exact, _ = evaluated(best, torch.float64)
    row = rows(pair, "epochs.csv")[best["epoch"] - 1]
    assert float(row["top1"]) == best["top1"] == top1
    held_out = torch.tensor(float(row["held_out_loss"]))
    assert_no_worse(held_out, torch.tensor(loss), torch.tensor(exact).double(), terms=TERMS)


def test_two_processes_evaluate_without_training(pair):
    output, code = run(pair, evaluate=True)
    row = rows(pair, "epochs.csv")[saved(pair, "best.pt")["epoch"] - 1]
    assert code == 0, output
    held_out = f"loss {float(row['held_out_loss']):.4f}, top-1 {float(row['top1']):.2%}"
    assert output.count(f"{pair}/best.pt, held out: {held_out}") == output.count("top-1") == 1


def test_two_processes_are_interrupted_and_go_on_bitwise(tmp_path, pair):
    cut, uncut = tmp_path / "cut", tmp_path / "uncut"
    process = start(cut, epochs=ENDLESS)
    wait_for_steps(process, cut, 4)
    process.send_signal(signal.SIGINT)  # torchrun passes it on
    output, _ = ended(process)
    assert "interrupted and saved after" in output, output
    assert 4 <= saved(cut)["steps_done"] == len(losses(cut))
    epochs = max(GIVEN["epochs"], saved(cut)["epoch"] + 1)
    output, code = run(cut, epochs=epochs, resume="yes")
    assert code == 0, output
    shutil.copytree(pair, uncut)
    if epochs > GIVEN["epochs"]:  # the signal came late
        output, code = run(uncut, epochs=epochs, resume="yes")
        assert code == 0, output
    assert differences(saved(cut), saved(uncut)) == []
    assert losses(cut) == losses(uncut)
    with pytest.raises(InputError, match=r"processes: 2 in the checkpoint, now 1"):
        train(settings(pair, **GIVEN, resume="yes"))


def test_micro_batches_of_several_processes_give_what_one_accumulates(tmp_path):
    """Gradients of all micro-batches are exchanged together, after the last one."""
    given = GIVEN | {"batch": 96}
    output, code = run(tmp_path / "two", **given, accumulate=2)
    assert code == 0, output
    train_alone_and_compare(tmp_path, tmp_path / "two", given | {"accumulate": 4})


def test_everything_at_once_is_ended_by_sigterm_and_goes_on_bitwise(tmp_path):
    """Average, dropout, bfloat16, crops by loading processes, and 9 held-out images: one process
    has a batch more. torchrun passes SIGTERM on and exits with 1."""
    given = {
        "data": str(image_folder(tmp_path / "data", train=16, held_out=3)),
        "batch": 8,
        "ema": 0.9,
        "dropout": 0.3,
        "amp": "bf16",
        "workers": 1,
        "checkpoint_every": 1000,
    }
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    process = start(cut, **given, epochs=ENDLESS)
    wait_for_steps(process, cut, 8)
    process.terminate()
    output, code = ended(process)
    assert code == 1 and "SIGKILL" not in output, output
    assert "interrupted and saved after" in output
    steps = saved(cut)["steps_done"]
    assert 8 <= steps == len(losses(cut))
    given["epochs"] = max(GIVEN["epochs"], saved(cut)["epoch"] + 1)
    output, code = run(cut, **given, resume="auto")
    assert code == 0 and f"resumed after {steps:,} steps" in output, output
    output, code = run(uncut, **given)
    assert code == 0, output
    assert differences(saved(cut), saved(uncut)) == []
    assert differences(saved(cut, "best.pt"), saved(uncut, "best.pt")) == []
    assert losses(cut) == losses(uncut)


def test_a_number_of_processes_that_does_not_divide_the_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = settings(tmp_path, accumulate=2, batch=64)
    with pytest.raises(InputError, match=r"multiple of 6 \(3 processes x 2 micro-.*, got 64"):
        Training(config, Processes("cpu"))


def test_an_error_of_all_processes_is_said(tmp_path):
    """There is no traceback, and no process waits for ever."""
    output, code = run(tmp_path, batch=63)
    assert code != 0
    assert "error: --batch: expected a multiple of 2 (2 processes x 1 micro-batches" in output


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_error_of_one_process_is_said(tmp_path, part):
    """An image fails in a step or in the evaluation; each image belongs to one process."""
    folder = image_folder(tmp_path / "data")
    (folder / part / "ant" / "1.png").write_bytes(b"")
    output, code = ended(start(tmp_path, data=str(folder), batch=8))
    assert code != 0
    assert output.count("error: an image cannot be read: ") == 1
    assert f"{part}/ant/1.png" in output
    assert "SIGKILL" not in output  # the other process ended by itself
    assert saved(tmp_path)["steps_done"] == (3 if part == "val" else 0)
