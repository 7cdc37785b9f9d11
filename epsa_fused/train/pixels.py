"""Image files as RGB pixels. It imports pillow: import it where images are read."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    TiffImageFile,
)

from .errors import CorruptImageError, InputError

# These error numbers concern one file. A decoder's errors have no number, or EINVAL if a broken
# file names an invalid position. Other numbers (EIO, EMFILE) concern the machine.
_OF_ONE_FILE = (
    None,
    errno.EINVAL,
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ELOOP,
)

# Values of TIFF's tags.
_WHITE_IS_ZERO, _SIGNED = 0, 2


class _UnfitError(Exception):
    """The values of an image have no range that its format tells."""


def read_rgb(path: Path) -> Image.Image:
    """The first image of a file, upright, mode RGB with 8 bits per channel.

    Wider values are scaled from the range of the format, never from that of the image: two images
    of one format get the same scale. The table in docs/training.md has every kind of image.

    Raises:
        CorruptImageError: the image cannot be read, or its format tells no range of its values.
        InputError: reading failed for another reason than this image.
    """
    try:
        # From its path pillow would map a plain TIFF into memory, and then turn it wrongly.
        with path.open("rb") as stream, Image.open(stream) as file:
            ImageOps.exif_transpose(file, in_place=True)
            return _rgb(file, file)
    except MemoryError:
        raise
    except _UnfitError as error:
        raise CorruptImageError(f"{path}: {error}") from None
    except Exception as error:  # a decoder may raise anything
        if isinstance(error, OSError) and error.errno not in _OF_ONE_FILE:
            # Skipping the image would train on the rest of a failing disk.
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        raise CorruptImageError(f"{path}: {type(error).__name__}: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """The same of an image that pillow has opened or made. It stays as it is.

    Raises:
        CorruptImageError: it cannot be converted, or nothing tells the range of its values.
    """
    try:
        return _rgb(ImageOps.exif_transpose(image), image)
    except _UnfitError as error:
        raise CorruptImageError(str(error)) from None
    except (OSError, ValueError, SyntaxError) as error:
        raise CorruptImageError(f"{type(error).__name__}: {error}") from error


def _rgb(image: Image.Image, file: Image.Image) -> Image.Image:
    """`image`, or a turned copy of it, in RGB; `file` tells its format."""
    tags = file.tag_v2 if isinstance(file, TiffImageFile) else {}
    if _SIGNED in tags.get(SAMPLEFORMAT, ()):
        # pillow reads signed bytes as unsigned ones.
        raise _UnfitError("expected unsigned integers or floats, got signed integers")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        if tags.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
            # pillow inverts values of at most 8 bits.
            raise _UnfitError("expected 0 to be black, got more than 8 bits where 0 is white")
        # pillow's own conversion would clip the values to 255.
        values = np.asarray(image)
        grey = np.rint(values * (255 / _white(image.mode, values, file))).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    # The colours are taken without their transparency; pillow would warn of its loss.
    image.info.pop("transparency", None)
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")


def _white(mode: str, values: np.ndarray, file: Image.Image) -> int:
    """The largest value that the format allows; `values` [H, W] are checked where they are floats.

    Raises:
        _UnfitError: the format tells none, or a float is outside 0 to 1.
    """
    if mode == "F":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # NaN too is refused
            raise _UnfitError(f"expected floats from 0 to 1, got {low:g} to {high:g}")
        return 1
    if isinstance(file, TiffImageFile) and mode != "I":
        return int(2 ** file.tag_v2[BITSPERSAMPLE][0] - 1)
    if file.format in ("PNG", "PPM"):  # pillow scales PGM to 16 bits, whatever its maximum
        return 65535
    raise _UnfitError(
        "expected values of at most 16 bits in a PNG, TIFF or PGM, got "
        f"{file.format or 'no format'} with {32 if mode == 'I' else 16}-bit integers"
    )
