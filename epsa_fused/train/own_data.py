"""Datasets and DataLoaders of the user's own, in place of the data that `--data` names.

A sample is (image, label): the image as the network takes it, a float Tensor [C, H, W], and the
number of its class. A batch of a DataLoader is (images [N, C, H, W], labels [N]).
"""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from . import generators
from .errors import InputError
from .loading import Batch, Key

# The first of the numbers that a sample's generators are seeded by; loading.py has others.
_SAMPLE = 3

# what train() takes
Given: TypeAlias = Dataset[Any] | DataLoader[Any]


class OwnImages(Dataset[Batch]):
    """The samples of a Dataset by :data:`.loading.Key`.

    The global generators are seeded for each sample by the key. So random crops depend on the
    seed, the epoch and the image alone, as those of the built-in data do.
    """

    def __init__(self, name: str, dataset: Any, classes: int, shape: Sequence[int]) -> None:
        self.name, self.dataset, self.classes = name, dataset, classes
        self.shape = _channels_first(shape)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Key]) -> Batch:
        start = time.perf_counter()
        images, labels, failed = [], [], ""
        with generators.kept_on_host():
            for seed, epoch, index in keys:
                generators.seed_host(_SAMPLE, max(seed, 0), epoch + 1, index)
                try:
                    image, label = _sample(self.name, self.dataset, index)
                    _check_shape(f"{self.name}[{index}]", image.shape, self.shape)
                    _check_label(f"{self.name}[{index}]", label, label, self.classes)
                except InputError as error:
                    failed = str(error)
                    break
                images.append(image)
                labels.append(label)
        pixels = torch.stack(images) if images else torch.empty(0, *self.shape)
        return Batch(pixels, torch.tensor(labels), [], failed, time.perf_counter() - start)


@dataclass
class OwnData:
    """Training and held-out images of the user's own; :class:`.data.Data` has the other ones."""

    train: OwnImages | DataLoader[Any] | None  # None where the network is only evaluated
    held_out: OwnImages | DataLoader[Any]
    classes: list[str]
    shape: tuple[int, int, int]  # H, W and C of every image
    # They come prepared, by means that are not known here.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    white: int = 255
    centre: float = 1.0

    def description(self) -> dict[str, Any]:
        """What a resumed run is compared by; the images themselves are not looked at."""
        return {
            "classes": self.classes,
            "training": _described(self.train),
            "held out": _described(self.held_out),
            "shape": self.shape,
        }


def own_data(
    training: Given | None, validation: Given | None, classes: Sequence[str] | None
) -> OwnData:
    """The data that :func:`.train` was given.

    Raises:
        InputError: validation is missing, a dataset has no length, the classes are not known, or
            the first sample is of another kind.
    """
    if validation is None:
        raise InputError("validation: expected a Dataset or DataLoader, as training is, got None")
    datasets = {
        name: _dataset(name, images)
        for name, images in (("training", training), ("validation", validation))
        if images is not None
    }
    names = _classes(datasets, classes)
    with generators.kept_on_host():
        image = _first_image(validation, datasets["validation"])
    channels, height, width = image.shape
    shape = (height, width, channels)

    def by_key(name: str, images: Given | None) -> Any:
        if images is None or isinstance(images, DataLoader):
            return images
        return OwnImages(name, images, len(names), shape)

    return OwnData(by_key("training", training), by_key("validation", validation), names, shape)


def _classes(datasets: dict[str, Any], given: Sequence[str] | None) -> list[str]:
    """The names of the classes, from the caller or the datasets, which must not contradict.

    The caller may rename classes, and not reorder them.
    """
    attributes = {name: getattr(dataset, "classes", None) for name, dataset in datasets.items()}
    found = {name: list(classes) for name, classes in attributes.items() if _are_names(classes)}
    if given is None and found:  # torchvision's datasets have this attribute
        given = next(iter(found.values()))
    if not _are_names(given):
        raise InputError(
            "classes: expected at least 2 names in the order of the labels, where the Dataset has "
            f"no attribute classes, got {given!r:.60}"
        )
    names = [str(name) for name in given]  # NumPy's strings become Python's
    first = next(iter(found.values()), None)
    for name, classes in found.items():
        renamed = len(names) == len(classes) and set(names).isdisjoint(classes)
        if classes != first or not (classes == names or renamed):
            raise InputError(
                f"classes: expected the same names in one order, got {names!r:.60}, and "
                f"{classes!r:.60} of {name}"
            )
    return names


def _are_names(classes: object) -> TypeGuard[Sequence[str]]:
    return (
        isinstance(classes, Sequence)
        and not isinstance(classes, str)
        and len(classes) >= 2
        and all(isinstance(name, str) for name in classes)
    )


def _first_image(images: Given, dataset: Any) -> Tensor:
    """The first image as the network takes it; a DataLoader may prepare images in its batches."""
    if not isinstance(images, DataLoader):
        return _sample("validation", dataset, 0)[0]
    batch, _ = _pair("a batch of validation", images.collate_fn([dataset[0]]))
    _check_image("a batch of validation: images", batch, 4)
    return cast(Tensor, batch[0])


def checked_batch(name: str, batch: Any, classes: int, shape: Sequence[int]) -> Batch:
    """A batch of a DataLoader as a :class:`Batch`; its `failed` says what is wrong with it."""
    try:
        images, labels = _pair(name, batch)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
            raise InputError(f"{name}: expected labels, integers [N], got {_shown(labels)}")
        _check_image(f"{name}: images", images, 4)
        _check_shape(name, images.shape[1:], _channels_first(shape))
        if len(images) != len(labels):
            raise InputError(
                f"{name}: expected as many labels as images, got {len(labels)} and {len(images)}"
            )
        if not len(labels):
            raise InputError(f"{name}: expected at least one image, got none")
        labels = labels.long()
        _check_label(name, int(labels.min()), int(labels.max()), classes)
    except InputError as error:
        return Batch(torch.empty(0), torch.empty(0), [], str(error), float("nan"))
    # The DataLoader does not tell how long its processes took.
    return Batch(images, labels, [], "", float("nan"))


def _described(images: OwnImages | DataLoader[Any] | None) -> str:
    if images is None:
        return "none"
    count = f"{len(images.dataset):,} images"  # type: ignore[arg-type]
    if not isinstance(images, DataLoader):
        return f"a Dataset of {count}"
    sampler = type(images.sampler).__name__
    return f"a DataLoader of {count}, {sampler}, num_workers={images.num_workers}"


def _dataset(name: str, images: Given) -> Any:
    """The Dataset itself, which has a length and samples by their number."""
    dataset = images.dataset if isinstance(images, DataLoader) else images
    fits = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not fits or isinstance(dataset, IterableDataset) or not len(dataset):  # type: ignore
        raise InputError(
            f"{name}: expected a Dataset with a length and samples by their number, got "
            f"{type(dataset).__name__}"
        )
    return dataset


def _sample(name: str, dataset: Any, index: int) -> tuple[Tensor, int]:
    where = f"{name}[{index}]"
    try:
        sample = dataset[index]
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error}") from error
    image, label = _pair(where, sample)
    _check_image(f"{where}: image", image, 3)
    try:
        return image, operator.index(label)
    except TypeError:
        raise InputError(f"{where}: expected an integer label, got {_shown(label)}") from None


def _pair(name: str, sample: Any) -> tuple[Any, Any]:
    if not isinstance(sample, Sequence) or len(sample) != 2:
        raise InputError(f"{name}: expected (image, label), got {_shown(sample)}")
    return sample[0], sample[1]


def _check_image(name: str, image: Any, dimensions: int) -> None:
    wanted = "[C, H, W]" if dimensions == 3 else "[N, C, H, W]"
    if not isinstance(image, Tensor) or image.ndim != dimensions or not image.is_floating_point():
        raise InputError(
            f"{name}: expected a Tensor {wanted} of normalised floats, got {_shown(image)}"
        )


def _check_shape(name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(shape) != tuple(wanted):
        raise InputError(
            f"{name}: expected an image {list(wanted)} as validation[0] is, got {list(shape)}"
        )


def _check_label(name: str, least: int, largest: int, classes: int) -> None:
    if least < 0 or largest >= classes:
        got = least if least < 0 else largest
        raise InputError(f"{name}: expected a label from 0 to {classes - 1}, got {got}")


def _channels_first(shape: Sequence[int]) -> tuple[int, int, int]:
    height, width, channels = shape
    return channels, height, width


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    length = f" of {len(value)}" if isinstance(value, Sequence) else ""
    return f"{type(value).__name__}{length}"
