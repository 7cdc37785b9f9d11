"""The batches of a training and of its evaluation, whatever the data come as."""

from __future__ import annotations

from torch.utils.data import DataLoader

from .config import Config
from .data import Data, Source
from .errors import InputError
from .loading import (
    DatasetHeldOut,
    DatasetPasses,
    EvaluationBatches,
    HeldOut,
    Images,
    Passes,
    TrainingBatches,
)
from .own_data import OwnData, OwnImages
from .own_loader import LoaderHeldOut, LoaderPasses
from .processes import Processes


def micro_batch(config: Config, processes: Processes) -> int:
    """How many images a micro-batch has; InputError if that is no whole number."""
    parts = config.accumulate * processes.count
    if config.batch % parts:
        raise InputError(
            f"--batch: expected a multiple of {parts} ({processes.count} processes x "
            f"{config.accumulate} micro-batches each), got {config.batch}"
        )
    return config.batch // parts


def passes_of(data: Data | OwnData, config: Config, processes: Processes) -> Passes:
    """This process's training images; InputError if they do not fill a step."""
    train = data.train
    assert train is not None
    if isinstance(train, DataLoader):
        return LoaderPasses(train, data, config, processes)
    images = _by_key(train)
    if len(images) < config.batch:
        raise InputError(
            f"--batch: expected at most the {len(images)} training images, got {config.batch}"
        )
    batches = TrainingBatches(
        len(images),
        config.batch,
        config.accumulate * processes.count,
        rank=processes.rank,
        processes=processes.count,
        seed=config.seed,
    )
    return DatasetPasses(images, batches, config.workers, processes.device.type == "cuda")


def held_out_of(data: Data | OwnData, config: Config, processes: Processes) -> HeldOut:
    """The held-out images that this process evaluates."""
    if isinstance(data.held_out, DataLoader):
        return LoaderHeldOut(data.held_out, data, processes)
    images = _by_key(data.held_out)
    place = {"rank": processes.rank, "processes": processes.count}
    batches = EvaluationBatches(len(images), micro_batch(config, processes), **place)
    return DatasetHeldOut(images, batches, config.workers, processes.device.type == "cuda")


def _by_key(images: Source | OwnImages) -> Images | OwnImages:
    return images if isinstance(images, OwnImages) else Images(images)
