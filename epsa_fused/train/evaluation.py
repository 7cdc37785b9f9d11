"""Loss and accuracy on the held-out images, in a training and without one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import checkpoint, weights
from .config import Config
from .data import Data
from .errors import InputError
from .inputs import Inputs
from .interrupts import Interrupts
from .loading import HeldOut
from .messages import Messages
from .own_data import OwnData
from .passes import held_out_of
from .processes import Processes


@dataclass(frozen=True)
class Accuracy:
    """Loss and accuracy on the held-out images."""

    loss: float
    top1: float  # share, 0 to 1
    top5: float  # share with the label among the five likeliest

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, top-1 {self.top1:.2%}, top-5 {self.top5:.2%}"


@torch.no_grad()
def accuracy_of(
    model: nn.Module,
    held_out: HeldOut,
    inputs: Inputs,
    processes: Processes,
    messages: Messages,
    interrupts: Interrupts,
) -> Accuracy | None:
    """Evaluate a network, which is left in eval mode; None at an interrupt."""
    processes.share_buffers(model)
    model.eval()
    device = processes.device
    # loss, top 1, top 5, images
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    batches = iter(held_out)
    for _ in messages.bar(range(held_out.longest), "held out"):
        if processes.any(interrupts.pending):
            return None
        batch = next(batches, None)  # some processes have one batch less
        if batch is None:
            continue
        inputs.check(batch)
        if not len(batch.labels):
            continue
        with inputs.autocast():
            logits = model(inputs.prepared(batch))
        labels = batch.labels.to(device)
        ranks = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        sums += torch.stack(
            [
                F.cross_entropy(logits.double(), labels, reduction="sum"),
                ranks[:, 0].sum(),
                ranks.sum(),
                torch.tensor(len(labels), device=device),
            ]
        )
    loss, top1, top5, images = processes.total(sums).tolist()
    if not images:
        raise InputError("evaluation: expected at least one readable held-out image, got none")
    return Accuracy(loss / images, top1 / images, top5 / images)


def evaluate(
    config: Config, data: Data | OwnData, processes: Processes, interrupts: Interrupts
) -> Accuracy | None:
    """Evaluate best.pt of `config.out`, or `config.weights`; it writes no file.

    Returns:
        The accuracy, which the first process prints; None at an interrupt.

    Raises:
        InputError: there are no such weights, they do not fit the network, or they are of a
            training with other images.
    """
    messages = Messages(processes)
    path = Path(config.weights) if config.weights else weights.best_of(config.folder)
    found = weights.read_given(path) if config.weights else weights.read_best(path)
    mean, std = data.mean, data.std
    if found.facts:
        weights.check_facts(path, found.facts)
        _check_same(path, found.facts, config, data)
        mean, std = found.facts["mean"], found.facts["std"]
    model = config.network(len(data.classes), data.shape[2])
    weights.load_whole(model, found.tensors, path, config.model)
    inputs = Inputs(config, processes.device, mean, std, messages)
    model.to(processes.device, memory_format=inputs.layout)
    held_out = held_out_of(data, config, processes)
    try:
        accuracy = accuracy_of(model, held_out, inputs, processes, messages, interrupts)
    finally:
        held_out.close()
    said = f"{found.named(path)}, held out: {accuracy}"
    messages.say("interrupted" if accuracy is None else said)
    return accuracy


def _check_same(path: Path, facts: dict[str, Any], config: Config, data: Data | OwnData) -> None:
    """Raise InputError if weights are of a training of another network or with other images."""
    kinds = ("as the user prepared them", "normalised here")
    checkpoint.check_same(
        path,
        {
            "model": facts["run"]["model"],
            "classes": facts["run"]["classes"],
            "images": (list(facts["shape"]), kinds[bool(facts["mean"])]),
        },
        {
            "model": config.model,
            "classes": data.classes,
            "images": (list(data.shape), kinds[bool(data.mean)]),
        },
    )
