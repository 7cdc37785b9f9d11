"""Batches of images: their order, their distribution over processes, and their speed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .data import Source
from .errors import CorruptImageError, InputError
from .interrupts import SIGNALS

# The first element of each generator's seed. NumPy treats (1, 2) and (1, 2, 0) as equal seeds.
_ORDER, _CROP = 1, 2

Key = tuple[int, int, int]  # (seed, epoch, image); (-1, -1, image) for evaluation


class Batch(NamedTuple):
    """Images and labels without the images that could not be read; `corrupt` names those.

    `failed` is the message of an InputError, or "". A loading process passes it on like this
    because a raised error would arrive with a traceback.
    """

    images: Tensor  # uint8 [N, C, H, W], in channels_last as they were stacked
    labels: Tensor  # int64 [N]
    corrupt: list[str]
    failed: str
    seconds: float  # of reading and cropping, in one process


class Images(Dataset[Batch]):
    """The images of a source by :data:`Key`; DataLoader asks for a whole batch at once."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitems__(self, keys: list[Key]) -> Batch:
        start = time.perf_counter()
        images, labels, corrupt, failed = [], [], [], ""
        for seed, epoch, index in keys:
            random = None if epoch < 0 else np.random.default_rng((_CROP, seed, epoch, index))
            try:
                images.append(self.source.image(index, random))
            except CorruptImageError as error:
                corrupt.append(str(error))
            except InputError as error:
                failed = str(error)
                break
            else:
                labels.append(self.source.labels[index])
        pixels = np.stack(images) if images else np.empty((0, 1, 1, 1), np.uint8)
        return Batch(
            torch.from_numpy(pixels).permute(0, 3, 1, 2),
            torch.tensor(np.array(labels, dtype=np.int64)),
            corrupt,
            failed,
            time.perf_counter() - start,
        )


class TrainingBatches(Sampler[list[Key]]):
    """This process's micro-batches of an epoch, from any step on.

    A step takes the next `batch` images of the epoch's random order and cuts them into `parts`
    micro-batches. Process `rank` takes the micro-batches rank, rank + processes, ... So a step has
    the same micro-batches for any number of processes. Images that do not fill the last step are
    left out of that epoch.

    torch's DistributedSampler cannot start inside an epoch. It also deals single images to the
    processes, so its micro-batches depend on their number.
    """

    def __init__(
        self, images: int, batch: int, parts: int, *, rank: int, processes: int, seed: int
    ) -> None:
        self.images, self.batch, self.parts = images, batch, parts
        self.rank, self.processes, self.seed = rank, processes, seed
        self.steps = images // batch
        self.epoch = self.step = 0

    def start_at(self, epoch: int, step: int) -> None:
        """Let the next iteration begin at this step of this epoch."""
        self.epoch, self.step = epoch, step

    def __iter__(self) -> Iterator[list[Key]]:
        random = np.random.default_rng((_ORDER, self.seed, self.epoch))
        order = random.permutation(self.images).tolist()
        size = self.batch // self.parts
        for step in range(self.step, self.steps):
            for part in range(self.rank, self.parts, self.processes):
                first = step * self.batch + part * size
                yield [(self.seed, self.epoch, i) for i in order[first : first + size]]

    def __len__(self) -> int:
        return (self.steps - self.step) * (self.parts // self.processes)


class EvaluationBatches(Sampler[list[Key]]):
    """The images rank, rank + processes, ... in batches of at most `size`."""

    def __init__(self, images: int, size: int, *, rank: int, processes: int) -> None:
        self.own = range(rank, images, processes)
        self.size = size
        # The largest number of batches that a process has.
        self.longest = -(-len(range(0, images, processes)) // size)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, len(self.own), self.size):
            yield [(-1, -1, i) for i in self.own[first : first + self.size]]

    def __len__(self) -> int:
        return -(-len(self.own) // self.size)


class Passes(Protocol):
    """The training images, epoch by epoch."""

    steps: int  # of an epoch, each of as many batches as `--accumulate` says

    def epoch(self, epoch: int, step: int) -> Iterator[Batch]:
        """This process's micro-batches of an epoch, from a step on."""

    def close(self) -> None:
        """End the loading processes."""


class HeldOut(Protocol):
    """The held-out images that this process evaluates."""

    longest: int  # the largest number of batches that a process has

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None:
        """End the loading processes."""


class DatasetPasses:
    """:class:`Passes` over images that are asked for by :data:`Key`."""

    def __init__(
        self, images: Dataset[Batch], batches: TrainingBatches, workers: int, pin: bool
    ) -> None:
        self.batches, self.steps = batches, batches.steps
        self.loader = loader(images, batches, workers, pin)

    def epoch(self, epoch: int, step: int) -> Iterator[Batch]:
        self.batches.start_at(epoch, step)
        return iter(self.loader)

    def close(self) -> None:
        end_workers(self.loader._iterator)


class DatasetHeldOut:
    """:class:`HeldOut` of images that are asked for by :data:`Key`."""

    def __init__(
        self, images: Dataset[Batch], batches: EvaluationBatches, workers: int, pin: bool
    ) -> None:
        self.longest = batches.longest
        self.loader = loader(images, batches, workers, pin)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)

    def close(self) -> None:
        end_workers(self.loader._iterator)


def loader(
    images: Dataset[Batch], batches: Sampler[list[Key]], workers: int, pin: bool
) -> DataLoader[Batch]:
    """A DataLoader of :class:`Batch`; its processes stay from epoch to epoch."""
    return DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=pin,
        # By default each epoch's start would draw from torch's global generator, also when a run
        # resumes in the middle of an epoch.
        generator=torch.Generator(),
    )


def end_workers(iterator: Any) -> None:
    """End the loading processes of a DataLoader's iterator, if it has any.

    After an error its traceback keeps them alive. At exit Python would send SIGTERM, which they
    ignore, and wait for ever.
    """
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore the signals that terminals and schedulers send to every process.

    The parent still needs batches to end well, and ends its workers without a signal.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Speed:
    """Images per second of the steps, and of the loader alone."""

    def __init__(self, workers: int) -> None:
        self.loading_processes = max(1, workers)
        self.reset()

    def reset(self) -> None:
        self.start = time.perf_counter()
        self.images = 0
        self.loading = self.waiting = 0.0  # seconds

    def count(self, batch: Batch, waited: float) -> None:
        self.images += len(batch.labels)
        self.loading += batch.seconds
        self.waiting += waited

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def of_steps(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    @property
    def of_loader(self) -> float:
        """Images that the loading processes read and crop in a second."""
        return self.images * self.loading_processes / max(self.loading, 1e-9)

    @property
    def share_waiting(self) -> float:
        """The share of the steps' time that they waited for the loader, 0 to 1."""
        return self.waiting / max(self.seconds, 1e-9)
