"""Images and labels: folders, scikit-learn's digits and CIFAR-10, and how images are cropped.

Every source returns images as uint8 [H, W, C] of one size. Random crops come from the caller's
generator, so a crop depends only on the seed, the epoch and the image.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import numpy as np

from .errors import InputError, required

# torchvision's ImageFolder takes the same endings.
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
CIFAR_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))


class Source(Protocol):
    """Labelled images of one size."""

    labels: np.ndarray  # int64 [images]

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, W and C of every image."""

    def image(self, index: int, generator: np.random.Generator | None) -> np.ndarray:
        """Image `index`, uint8 [H, W, C], cropped by `generator`; None crops for evaluation.

        Raises:
            CorruptImageError: the image cannot be read.
            InputError: reading failed for another reason than this image.
        """

    def digest(self) -> str:
        """A digest that is equal for equal data; it does not read the contents of files."""


@dataclass
class Data:
    """A training and a held-out source.

    `mean` and `std` are per channel, in units of a pixel's value (0 to `white`). `centre` is the
    share of the shorter side that an image is cut to for evaluation.
    """

    train: Source
    held_out: Source
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: int = 255
    centre: float = 1.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, W and C of every image."""
        return self.train.shape

    def description(self) -> dict[str, Any]:
        """What identifies the data: a resumed run must have the same."""
        return {
            "classes": self.classes,
            "training images": len(self.train.labels),
            "held-out images": len(self.held_out.labels),
            "training digest": self.train.digest(),
            "held-out digest": self.held_out.digest(),
        }


def _digest(*arrays: np.ndarray) -> str:
    """SHA-256 of types, shapes and values, cut to 16 digits."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).view(np.uint8).data)
    return sha.hexdigest()[:16]


def kind_of_data(data: str) -> str:
    """The kind, "digits", "cifar10" or "folder"; InputError if there is no such folder."""
    if data == "digits":
        return "digits"
    folder = Path(data)
    wanted = f"--data: expected 'digits' or a folder, got {data!r}"
    try:
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
        is_cifar10 = (folder / CIFAR_BATCHES[0]).exists()
    except OSError as error:
        raise InputError(f"{wanted}: {error.strerror}") from None
    if not is_folder:
        raise InputError(f"{wanted}, which is a file")
    return "cifar10" if is_cifar10 else "folder"


def open_data(data: str, image_size: int) -> Data:
    """The data that `--data` names; InputError if they are missing or malformed."""
    if (kind := kind_of_data(data)) == "digits":
        return _digits()
    if kind == "cifar10":
        return _cifar10(Path(data))
    try:
        return _folder(Path(data), image_size)
    except OSError as error:
        _unreadable(error)


# ---- in memory ----


@dataclass
class ArraySource:
    """Images in memory; random crops shift them, padded with zeros, and may mirror them."""

    images: np.ndarray  # uint8 [images, H, W, C]
    labels: np.ndarray
    shift: int  # pixels, at most
    flip: bool  # mirrored half of the time

    def __post_init__(self) -> None:
        around = (self.shift, self.shift)
        self._padded = np.pad(self.images, ((0, 0), around, around, (0, 0)))

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def image(self, index: int, generator: np.random.Generator | None) -> np.ndarray:
        if generator is None:
            return cast(np.ndarray, self.images[index])
        height, width = self.images.shape[1:3]
        top, left = generator.integers(2 * self.shift + 1, size=2)
        image = self._padded[index, top : top + height, left : left + width]
        return image[:, ::-1] if self.flip and generator.random() < 0.5 else image

    def digest(self) -> str:
        return _digest(self.images, self.labels)


def _digits() -> Data:
    """scikit-learn's 1797 handwritten digits, 8x8 with values 0 to 16.

    A quarter is held out, the same for every seed, with an equal share of every digit.
    """
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
        # Not mirrored: the mirror image of a digit is another sign.
        ArraySource(images[train], labels[train], shift=1, flip=False),
        ArraySource(images[held_out], labels[held_out], shift=0, flip=False),
        [str(name) for name in bunch.target_names],
        (float(pixels.mean()),),
        (float(pixels.std()),),
        white=16,
    )


class _ArraysOnly(pickle.Unpickler):
    """An unpickler of NumPy arrays that refuses whatever could run code."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype"})

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, expected arrays only")


def _cifar10(folder: Path) -> Data:
    """CIFAR-10 in its version for Python: pickled dicts with b"data" and b"labels".

    b"data" is uint8 [N, 3072]: red, green and blue planes of 32x32.
    """

    def read(name: str) -> dict[bytes, Any]:
        path = folder / name
        try:
            with path.open("rb") as file:
                content = _ArraysOnly(file, encoding="bytes").load()
        except Exception as error:  # a broken pickle may raise anything
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
        return cast(dict[bytes, Any], content)

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


class FolderSource:
    """Image files folder/CLASS/..., cropped and resized to [size, size, 3].

    The random crop is Inception's (arXiv 1409.4842): 8% to 100% of the area, aspect ratio 3/4 to
    4/3, mirrored half of the time. The crop for evaluation is the centre square with 7/8 of the
    shorter side. At 224 that is the usual centre crop after resizing to 256.
    """

    SCALE, RATIO, CENTRE, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 224 / 256, 10

    def __init__(self, folder: Path, classes: list[str], size: int) -> None:
        required("PIL.Image", "reading images", "pillow")
        self.folder = folder
        self.size = size
        files: list[bytes] = []
        labels: list[int] = []
        class_of: dict[Path, str] = {}
        for label, name in enumerate(classes):
            found, folders = _images_below(folder / name)
            for entered in folders:
                other = class_of.setdefault(entered, name)
                if other != name:
                    raise InputError(
                        f"{folder / name}: expected images of its own, got those of {entered}, "
                        f"which the class {other} has too: they would have two labels"
                    )
            if not found:
                raise InputError(
                    f"{folder / name}: expected images ({', '.join(ENDINGS)}), found none"
                )
            files += [os.fsencode(path.relative_to(folder)) for path in found]
            labels += [label] * len(found)
        # An array, not a list: reading list items writes their reference counts, and every loading
        # process would copy the pages.
        self.files = np.array(files)
        self.labels = np.array(labels, dtype=np.int64)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    def image(self, index: int, generator: np.random.Generator | None) -> np.ndarray:
        from PIL import Image

        from .pixels import read_rgb

        image = read_rgb(self.folder / os.fsdecode(bytes(self.files[index])))
        box = self._centre(*image.size)
        if generator is not None:
            box = self._random_box(*image.size, generator)
        pixels = np.asarray(image.resize((self.size,) * 2, Image.Resampling.BILINEAR, box=box))
        return pixels[:, ::-1] if generator is not None and generator.random() < 0.5 else pixels

    def digest(self) -> str:
        """A digest of names and labels: reading all of ImageNet would take minutes."""
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
            # Uniform in the logarithm: wide and high crops are equally likely.
            ratio = np.exp(generator.uniform(*np.log(self.RATIO)))
            box_width, box_height = np.sqrt(area * ratio), np.sqrt(area / ratio)
            if box_width <= width and box_height <= height:
                left = generator.uniform(0, width - box_width)
                top = generator.uniform(0, height - box_height)
                return left, top, left + box_width, top + box_height
        return self._centre(width, height)  # a long, thin image


def _images_below(folder: Path) -> tuple[list[Path], set[Path]]:
    """The image files below a folder, sorted, and the folders, without links, that they are in.

    Hidden files and folders are left out: macOS and Jupyter keep copies of images there. Every
    folder is entered once, and no link to a folder around this one is followed. InputError if a
    folder cannot be read.
    """
    entered = _itself_and_around(folder)
    images, folders = [], set()
    for where, inside, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        here = Path(where)
        found = [here / name for name in _shown(names) if name.lower().endswith(ENDINGS)]
        if found:
            images += found
            folders.add(here.resolve())
        # Sorted, so that of two links to one folder the same is entered every time.
        targets = {name: (here / name).resolve() for name in sorted(_shown(inside))}
        inside.clear()  # os.walk enters what the list then holds
        for name, target in targets.items():
            if target not in entered:
                entered.add(target)
                inside.append(name)
    return sorted(images), folders


def _classes(folder: Path) -> list[str]:
    """The folders in a folder, sorted, without hidden ones and links to a folder around them."""
    around = _itself_and_around(folder)
    return sorted(
        name
        for name in _shown(os.listdir(folder))
        if (folder / name).is_dir() and (folder / name).resolve() not in around
    )


def _itself_and_around(folder: Path) -> set[Path]:
    real = folder.resolve()
    return {real, *real.parents}


def _shown(names: list[str]) -> list[str]:
    """The names that are not hidden."""
    return [name for name in names if not name.startswith(".")]


def _unreadable(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _folder(folder: Path, size: int) -> Data:
    parts = ("train", "val")
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        raise InputError(
            f"{folder}: expected the folders train and val, each with a folder per class; "
            f"there is no {' and no '.join(missing)} in it, {_content(folder)}"
        )
    train, val = (_classes(folder / part) for part in parts)
    if len(train) < 2:
        raise InputError(
            f"{folder / 'train'}: expected a folder per class, at least 2, found {len(train)}"
        )
    if train != val:
        only = {"train": sorted(set(train) - set(val)), "val": sorted(set(val) - set(train))}
        differing = (f"only in {part}: {_first(names)}" for part, names in only.items() if names)
        raise InputError(
            f"{folder}: expected the same classes in train and val, got {len(train)} and "
            f"{len(val)}; {'; '.join(differing)}"
        )
    return Data(
        FolderSource(folder / "train", train, size),
        FolderSource(folder / "val", val, size),
        train,
        # The statistics of ImageNet, which published weights expect.
        tuple(255 * value for value in (0.485, 0.456, 0.406)),
        tuple(255 * value for value in (0.229, 0.224, 0.225)),
        centre=FolderSource.CENTRE,
    )


def _content(folder: Path) -> str:
    """What a folder that lacks something holds, for a message."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return f"only {_first(names)}" if names else "it is empty"


def _first(names: list[str]) -> str:
    """At most five of the names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
