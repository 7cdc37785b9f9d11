"""--warmup: the learning rate rises from step to step, and then the schedule begins."""

import pytest
import torch
from support.training import STEPS, rows, saved, settings

from epsa_fused.train import Config, InputError, train
from epsa_fused.train.schedule import Schedule


def rates(config: Config, steps: int, epochs: int | None = None) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], config.lr)
    schedule, done, found = Schedule(optimizer, config, steps), 0, []
    for epoch in range(epochs or config.epochs):
        for _ in range(steps):
            schedule.begin_step(done)
            found.append(schedule.lr)
            done += 1
        schedule.end_epoch(epoch + 1)
    return found


def test_it_rises_by_steps_to_the_learning_rate():
    config = Config(lr=0.8, warmup=2, epochs=4, decay_every=1)
    found = rates(config, steps=4)
    assert found[:8] == pytest.approx([0.1 * (i + 1) for i in range(8)])
    assert found[7] == 0.8  # to the bit
    # the first epoch after it has the whole rate, as the first epoch without it has
    assert found[8:] == pytest.approx([0.8] * 4 + [0.08] * 4)


@pytest.mark.parametrize("schedule", ("step", "cosine"))
def test_the_schedule_is_that_of_the_epochs_that_are_left(schedule):
    given = {"schedule": schedule, "decay_every": 2}
    warm = rates(Config(epochs=9, warmup=3, **given), steps=2)
    assert warm[6:] == rates(Config(epochs=6, **given), steps=2)
    assert len(set(warm)) > 6


def test_a_run_logs_it(tmp_path):
    """test_resume.py cuts one off in it, and at its end."""
    train(settings(tmp_path, warmup=1))
    rising = [0.02 * (i + 1) / STEPS for i in range(STEPS)]
    assert [float(row["lr"]) for row in rows(tmp_path)] == pytest.approx(rising + [0.02] * STEPS)
    assert [float(row["lr"]) for row in rows(tmp_path, "epochs.csv")] == [0.02, 0.02]


def test_it_is_one_of_the_settings_that_a_run_keeps(tmp_path):
    train(settings(tmp_path, epochs=2))
    with pytest.raises(InputError, match="warmup: 0 in the checkpoint, now 1"):
        train(settings(tmp_path, epochs=2, warmup=1, resume="yes"))
    # a run from before there was the option had none
    state = saved(tmp_path)
    del state["run"]["warmup"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert train(settings(tmp_path, epochs=3, resume="yes")).steps == 3 * STEPS


def test_it_ends_before_the_training():
    with pytest.raises(InputError, match="--warmup: expected less than the 3 --epochs, got 3"):
        Config(warmup=3, epochs=3)
