"""Images and their labels: folders, scikit-learn's digits, CIFAR-10; and how they are cut.

Every source gives an image as uint8 [H, W, C] of one size, ready to be stacked. What is drawn at
random comes from the generator that the caller passes, so that an image's crop depends on nothing
but the seed, the epoch and the image.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import InputError, required

# The endings that torchvision's ImageFolder takes.
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
CIFAR_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))


class CorruptImageError(Exception):
    """An image that cannot be read; the message names it and says why."""


class Source(Protocol):
    """Labelled images of one size."""

    labels: np.ndarray  # int64 [images]

    def image(self, index: int, generator: np.random.Generator | None) -> np.ndarray:
        """Image `index`, uint8 [H, W, C]; cut at random by `generator`, or for evaluation by None.

        Raises:
            CorruptImageError: where it cannot be read.
            InputError: where reading failed for a reason that is not this image's.
        """

    def digest(self) -> str:
        """Equal for equal data, so far as telling takes no reading of files."""


@dataclass
class Data:
    """A training and a held-out source.

    `mean` and `std` are those of each channel, in units of a pixel's value.
    """

    train: Source
    held_out: Source
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def description(self) -> dict[str, Any]:
        """What must be the same data when a run goes on."""
        return {
            "classes": self.classes,
            "training images": len(self.train.labels),
            "held-out images": len(self.held_out.labels),
            "training digest": self.train.digest(),
            "held-out digest": self.held_out.digest(),
        }


def _digest(*arrays: np.ndarray) -> str:
    """SHA-256 of their types, shapes and values."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).view(np.uint8))
    return sha.hexdigest()[:16]


def kind_of_data(data: str) -> str:
    """ "digits", "cifar10" or "folder"; InputError where there is no such folder."""
    if data == "digits":
        return "digits"
    folder = Path(data)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise InputError(f"--data: expected 'digits' or a folder, got {data!r}, which is {found}")
    return "cifar10" if (folder / CIFAR_BATCHES[0]).exists() else "folder"


def open_data(data: str, image_size: int) -> Data:
    """What `--data` names; InputError, saying what was expected, where it is not there."""
    if (kind := kind_of_data(data)) == "digits":
        return _digits()
    return _cifar10(Path(data)) if kind == "cifar10" else _folder(Path(data), image_size)


# ---- in memory ----


@dataclass
class ArraySource:
    """Images that are in memory; at random they are shifted, by up to `shift` pixels with zeros
    in their place, and where `flip` is set mirrored."""

    images: np.ndarray  # uint8 [images, H, W, C]
    labels: np.ndarray
    shift: int
    flip: bool

    def __post_init__(self) -> None:
        around = (self.shift, self.shift)
        self._padded = np.pad(self.images, ((0, 0), around, around, (0, 0)))

    def image(self, index: int, generator: np.random.Generator | None) -> np.ndarray:
        if generator is None:
            return self.images[index]
        height, width = self.images.shape[1:3]
        top, left = generator.integers(2 * self.shift + 1, size=2)
        image = self._padded[index, top : top + height, left : left + width]
        return image[:, ::-1] if self.flip and generator.random() < 0.5 else image

    def digest(self) -> str:
        return _digest(self.images, self.labels)


def _digits() -> Data:
    """scikit-learn's 1797 handwritten digits, 8x8 with values 0 to 16; a quarter, the same for
    every seed and with every digit's share, is held out."""
    why, install = "--data digits", "scikit-learn"
    datasets = required("sklearn.datasets", why, install)
    selection = required("sklearn.model_selection", why, install)
    bunch = datasets.load_digits()
    images = bunch.images.astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    train, held_out = selection.train_test_split(
        np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0
    )
    pixels = images[train].astype(np.float64)
    return Data(
        # not mirrored: a digit's mirror image is another sign
        ArraySource(images[train], labels[train], shift=1, flip=False),
        ArraySource(images[held_out], labels[held_out], shift=0, flip=False),
        [str(name) for name in bunch.target_names],
        (float(pixels.mean()),),
        (float(pixels.std()),),
    )


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays, and nothing that could run code."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype"})

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, expected arrays only")


def _cifar10(folder: Path) -> Data:
    """CIFAR-10 as its page offers it for Python: pickled dicts of b"data", uint8 [N, 3072] with
    red, green and blue planes of 32x32, and b"labels"."""

    def read(name: str) -> dict:
        path = folder / name
        try:
            with path.open("rb") as file:
                content = _ArraysOnly(file, encoding="bytes").load()
        except Exception as error:  # a broken pickle may call for anything
            raise InputError(
                f"{path}: expected a pickle of CIFAR-10; {type(error).__name__}: {error}"
            ) from None
        data = content.get(b"data") if isinstance(content, dict) else None
        if (
            not isinstance(data, np.ndarray)
            or data.dtype != np.uint8
            or data.shape[1:] != (3072,)
            or not len(data)
        ):
            got = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else repr(data)[:60]
            raise InputError(
                f"{path}: expected a pickled dict with b'data', uint8 [N, 3072], "
                f"got {type(content).__name__} with b'data' {got}"
            )
        labels = content.get(b"labels")
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise InputError(f"{path}: expected b'labels', a list of int, got {labels!r:.60}")
        if len(labels) != len(data):
            raise InputError(f"{path}: expected {len(data)} b'labels', got {len(labels)}")
        return content

    def source(names: tuple[str, ...], shift: int, flip: bool) -> ArraySource:
        parts = [read(name) for name in names]
        planes = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([np.asarray(part[b"labels"], np.int64) for part in parts])
        if labels.min() < 0 or labels.max() > 9:
            raise InputError(
                f"{folder}: expected labels from 0 to 9, got {labels.min()} to {labels.max()}"
            )
        images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1), dtype=np.uint8)
        return ArraySource(images, labels, shift, flip)

    train = source(CIFAR_BATCHES, shift=4, flip=True)
    pixels = train.images.reshape(-1, 3)
    return Data(
        train,
        source(("test_batch",), shift=0, flip=False),
        [str(i) for i in range(10)],
        tuple(pixels.mean(0, dtype=np.float64).tolist()),
        tuple(pixels.std(0, dtype=np.float64).tolist()),
    )


# ---- files ----


# What is wrong with one file when the system refuses it; a decoder's own errors have no number, or
# that of a place to seek to which a broken file names. Others (EIO, EMFILE) are not the file's.
_OF_ONE_FILE = (
    None,
    errno.EINVAL,
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ELOOP,
)


class FolderSource:
    """Image files, folder/CLASS/..., cut to [size, size, 3].

    At random: a crop of 8% to 100% of the area and of aspect ratio 3/4 to 4/3, resized, and
    mirrored half of the time (Inception's crop, arXiv 1409.4842). For evaluation: the centre
    square whose side is 7/8 of the shorter one, which at 224 is the usual resizing to 256 and
    centre crop.
    """

    SCALE, RATIO, CENTRE, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 224 / 256, 10

    def __init__(self, folder: Path, classes: list[str], size: int) -> None:
        required("PIL.Image", "reading images", "pillow")
        self.folder = folder
        self.size = size
        files: list[bytes] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = _images_below(folder / name)
            if not found:
                raise InputError(
                    f"{folder / name}: expected images ({', '.join(ENDINGS)}), found none"
                )
            files += [os.fsencode(path.relative_to(folder)) for path in found]
            labels += [label] * len(found)
        # One array, not a list: reading a list's items writes their reference counts, which makes
        # every loading process copy it.
        self.files = np.array(files)
        self.labels = np.array(labels, dtype=np.int64)

    def image(self, index: int, generator: np.random.Generator | None) -> np.ndarray:
        from PIL import Image

        path = self.folder / os.fsdecode(bytes(self.files[index]))
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # a decoder may raise anything for a broken file
            if isinstance(error, OSError) and error.errno not in _OF_ONE_FILE:
                # to leave it out would be to train on what a failing disk still gives
                raise InputError(f"{path}: cannot be read: {error.strerror}") from error
            raise CorruptImageError(f"{path}: {type(error).__name__}: {error}") from error
        box = self._centre(*image.size)
        if generator is not None:
            box = self._random_box(*image.size, generator)
        pixels = np.asarray(image.resize((self.size,) * 2, Image.Resampling.BILINEAR, box=box))
        return pixels[:, ::-1] if generator is not None and generator.random() < 0.5 else pixels

    def digest(self) -> str:
        """Of the names and labels: the contents of ImageNet's files would take minutes to read."""
        return _digest(self.files, self.labels)

    def _centre(self, width: int, height: int) -> tuple[float, float, float, float]:
        side = min(width, height) * self.CENTRE
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def _random_box(
        self, width: int, height: int, generator: np.random.Generator
    ) -> tuple[float, float, float, float]:
        for _ in range(self.TRIES):
            area = width * height * generator.uniform(*self.SCALE)
            # as likely r times wider than high as r times higher than wide
            ratio = np.exp(generator.uniform(*np.log(self.RATIO)))
            box_width, box_height = np.sqrt(area * ratio), np.sqrt(area / ratio)
            if box_width <= width and box_height <= height:
                left = generator.uniform(0, width - box_width)
                top = generator.uniform(0, height - box_height)
                return left, top, left + box_width, top + box_height
        return self._centre(width, height)  # of a long, thin image


def _images_below(folder: Path) -> list[Path]:
    """Sorted, so that the order of the images does not depend on the file system."""
    return sorted(
        Path(where) / name
        for where, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(ENDINGS)
    )


def _folder(folder: Path, size: int) -> Data:
    classes = {}
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            inside = sorted(path.name for path in folder.iterdir())[:5]
            raise InputError(
                f"{folder}: expected the folders train and val, each with a folder per class; "
                f"there is no {part} in it, only {', '.join(inside) or 'nothing'}"
            )
        classes[part] = sorted(path.name for path in (folder / part).iterdir() if path.is_dir())
    if len(classes["train"]) < 2:
        raise InputError(
            f"{folder / 'train'}: expected a folder per class, at least 2, "
            f"found {len(classes['train'])}"
        )
    if differing := sorted(set(classes["train"]) ^ set(classes["val"])):
        raise InputError(
            f"{folder}: expected the same classes in train and val, got "
            f"{len(classes['train'])} and {len(classes['val'])}; only in one: "
            f"{', '.join(differing[:5])}"
        )
    return Data(
        FolderSource(folder / "train", classes["train"], size),
        FolderSource(folder / "val", classes["val"], size),
        classes["train"],
        # ImageNet's, which published weights expect
        tuple(255 * value for value in (0.485, 0.456, 0.406)),
        tuple(255 * value for value in (0.229, 0.224, 0.225)),
    )
