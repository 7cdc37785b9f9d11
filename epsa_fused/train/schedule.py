"""The learning rate: a linear warm-up, then the step or cosine schedule."""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from .config import Config


class Schedule:
    """Sets the optimizer's learning rate.

    It rises linearly to `lr` from step to step over the first `warmup` epochs, as in arXiv
    1706.02677, section 2.2. The schedule by epochs begins after them.

    Args:
        optimizer: with the learning rate `lr`.
        config: the training's.
        steps: of an epoch.
    """

    def __init__(self, optimizer: Optimizer, config: Config, steps: int) -> None:
        self.optimizer, self.full = optimizer, config.lr
        self.warmup, self.steps = config.warmup, steps
        self.by_epochs = (
            StepLR(optimizer, config.decay_every, config.decay)
            if config.schedule == "step"
            else CosineAnnealingLR(optimizer, config.epochs - config.warmup)
        )

    @property
    def lr(self) -> float:
        """The learning rate of the step that was begun last."""
        return float(self.optimizer.param_groups[0]["lr"])

    def begin_step(self, done: int) -> None:
        """Call before each step, with the number of steps done."""
        rising = self.warmup * self.steps
        if done < rising:
            for group in self.optimizer.param_groups:
                group["lr"] = self.full * ((done + 1) / rising)

    def end_epoch(self, epochs: int) -> None:
        """Call after each epoch, with the number of epochs done."""
        if epochs <= self.warmup:
            return
        with warnings.catch_warnings():  # after resuming, it warns of the order of the calls
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.by_epochs.step()

    def state_dict(self) -> dict[str, Any]:
        return self.by_epochs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.by_epochs.load_state_dict(state)
