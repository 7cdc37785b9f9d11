"""DataLoaders of the user's own: what can be kept with them, and what is refused."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from . import generators
from .config import Config
from .data import Data
from .errors import InputError
from .interrupts import SIGNALS
from .loading import Batch, end_workers
from .own_data import OwnData, checked_batch
from .processes import Processes

# The first of the numbers that generators are seeded by; own_data.py has another.
_EPOCH, _EVALUATION = 4, 5


class LoaderPasses:
    """:class:`.loading.Passes` of a DataLoader.

    The CPU's global generators, and those of the loader and its sampler, are seeded at the start of
    each epoch. A run that resumes inside an epoch loads the batches before and leaves them out. So
    it has the batches of the uncut run.

    Raises:
        InputError: something that the training promises could not be kept with this DataLoader.
    """

    def __init__(
        self, loader: DataLoader[Any], data: Data | OwnData, config: Config, processes: Processes
    ) -> None:
        _check(loader, "training", processes)
        wanted = config.batch // config.accumulate // processes.count
        if loader.batch_size != wanted:
            raise InputError(
                f"training: expected a DataLoader with batch_size={wanted}, which is --batch "
                f"{config.batch} / {config.accumulate} micro-batches / {processes.count} "
                f"processes, got batch_size={loader.batch_size}"
            )
        if loader.persistent_workers:
            raise InputError(
                "training: expected a DataLoader without persistent_workers, whose random numbers "
                "a resumed run could not repeat"
            )
        self.loader, self.data, self.processes = loader, data, processes
        self.accumulate, self.seed = config.accumulate, config.seed
        # Without a smaller last batch, which would count as much as the others.
        images = len(_sampler(loader))
        self.steps = images // wanted // config.accumulate
        if not self.steps:
            raise InputError(
                f"training: expected a DataLoader of at least {wanted * config.accumulate} images "
                f"for a step, got {images}"
            )
        self._iterator: Any = None

    def epoch(self, epoch: int, step: int) -> Iterator[Batch]:
        device, sampler = self.processes.device, _sampler(self.loader)
        state = generators.random_state(device)
        seed = generators.seed_host(_EPOCH, self.seed, epoch, self.processes.rank)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        self._iterator = _iterator(self.loader, seed)
        batches = self._promised()
        if step:
            for _ in range(step * self.accumulate):
                next(batches)
            generators.set_random_state(state, device)
        return (_batch("training", batch, self.data) for batch in batches)

    def _promised(self) -> Iterator[Any]:
        """As many batches as the sampler's length says."""
        count = self.steps * self.accumulate
        for i in range(count):
            batch = next(self._iterator, None)
            if batch is None:
                raise InputError(
                    f"training: expected {count} batches in an epoch, as the length of its "
                    f"sampler says, got {i}"
                )
            yield batch

    def close(self) -> None:
        _close(self.loader, self._iterator)


class LoaderHeldOut:
    """:class:`.loading.HeldOut` of a DataLoader.

    Raises:
        InputError: it would leave images out, or evaluate some of them twice.
    """

    def __init__(self, loader: DataLoader[Any], data: Data | OwnData, processes: Processes) -> None:
        _check(loader, "validation", processes)
        images = len(loader.dataset)  # type: ignore[arg-type]
        found = "drop_last" if loader.drop_last else _share(_sampler(loader), images)
        if found:
            raise InputError(
                f"validation: expected a DataLoader that has every image once, got one with {found}"
                "; a Dataset in its place would do"
            )
        self.loader, self.data, self.longest = loader, data, len(loader)
        self._iterator: Any = None

    def __iter__(self) -> Iterator[Batch]:
        """Every evaluation has the same random numbers; those of the training go on behind it."""
        with generators.kept_on_host():
            generators.seed_host(_EVALUATION)
            self._iterator = _iterator(self.loader, 0)
            for batch in self._iterator:
                yield _batch("validation", batch, self.data)

    def close(self) -> None:
        _close(self.loader, self._iterator)


def _batch(name: str, batch: Any, data: Data | OwnData) -> Batch:
    return checked_batch(f"a batch of {name}", batch, len(data.classes), data.shape)


def _sampler(loader: DataLoader[Any]) -> Any:
    return loader.sampler


def _check(loader: DataLoader[Any], name: str, processes: Processes) -> None:
    """Raise InputError for a DataLoader whose batches or whose share are not known."""
    if loader.batch_size is None:
        raise InputError(f"{name}: expected a DataLoader with a batch_size, got one without")
    sampler = _sampler(loader)
    if not hasattr(sampler, "__len__"):
        raise InputError(
            f"{name}: expected a DataLoader whose sampler has a length, "
            f"got {type(sampler).__name__}"
        )
    distributed = isinstance(sampler, DistributedSampler)
    if not processes.launched and not distributed:
        return
    wanted = f"DistributedSampler(num_replicas={processes.count}, rank={processes.rank})"
    if not distributed:
        raise InputError(
            f"{name}: expected a DataLoader with sampler={wanted} under torchrun, got "
            f"{type(sampler).__name__}: every process would have the same images"
        )
    if (sampler.num_replicas, sampler.rank) != (processes.count, processes.rank):
        raise InputError(
            f"{name}: expected a DataLoader with sampler={wanted}, got "
            f"num_replicas={sampler.num_replicas}, rank={sampler.rank}"
        )


def _share(sampler: Any, images: int) -> str:
    """What the samplers of all processes leave out or repeat of so many images; "" if nothing."""
    if isinstance(sampler, DistributedSampler):
        count = sampler.total_size
        return "" if count == images else f"{count} for {images}"
    with generators.kept_on_host():
        drawn = list(sampler)
    if sorted(drawn) == list(range(images)):
        return ""
    return f"a sampler that draws {len(drawn)}, {len(set(drawn))} of them different, of {images}"


def _close(loader: DataLoader[Any], iterator: Any) -> None:
    """End the loading processes. A loader that keeps its iterator would go on with a dead one."""
    end_workers(iterator)
    if loader._iterator is iterator:
        loader._iterator = None


def _iterator(loader: DataLoader[Any], seed: int) -> Iterator[Any]:
    """Start a pass, its own generators seeded.

    Its loading processes leave signals to this one, which ends them.
    """
    for generator in (loader.generator, getattr(_sampler(loader), "generator", None)):
        if generator is not None:
            generator.manual_seed(seed)
    with _signals_held():
        return iter(loader)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold signals back; processes that start meanwhile never see them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
