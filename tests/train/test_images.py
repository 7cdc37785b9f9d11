"""Image files: every row of the docs' table, and which files of a folder are images."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from support.paths import ROOT
from support.training import image_folder

from epsa_fused.train import InputError
from epsa_fused.train.__main__ import main
from epsa_fused.train.data import open_data
from epsa_fused.train.errors import CorruptImageError
from epsa_fused.train.pixels import read_rgb

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
# No greys, and as smooth as JPEG needs.
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], axis=2)
OPACITY = np.full_like(GREY, 128)
OPACITY[:8] = 255


def encoded(pixels: np.ndarray | Image.Image, format: str, **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray | bytes, **tags: int) -> bytes:
    """A TIFF of 16 x 16 pixels without compression, for what pillow reads and does not write."""
    numbers = {
        "bits": 258,
        "compression": 259,
        "photometric": 262,
        "offset": 273,
        "samples": 277,
        "length": 279,
        "extra": 338,
        "sign": 339,
    }
    data = pixels if isinstance(pixels, bytes) else pixels.tobytes()
    given = {"compression": 1, "photometric": 1, "offset": 0, "length": len(data)} | tags
    entries = {256: 16, 257: 16, 278: 16} | {numbers[name]: tag for name, tag in given.items()}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    body = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    return head + body + bytes(4) + data


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel, which pillow writes only for grey."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", head),
            chunk(b"IDAT", zlib.compress(lines)),
            chunk(b"IEND", b""),
        ]
    )


def pgm(white: int, dtype: str) -> bytes:
    values = np.rint(GREY / 255 * white).astype(dtype)
    return b"P5 16 16 %d\n" % white + values.tobytes()


def packed_12_bits(values: np.ndarray) -> bytes:
    """Two values in three bytes, the high bits first."""
    first, second = values.reshape(-1, 2).T
    three = first >> 4, (first & 15) << 4 | second >> 8, second & 255
    return np.stack(three, axis=1).astype(np.uint8).tobytes()


def palette(**options) -> bytes:
    return encoded(Image.fromarray(COLOURS).quantize(256), "PNG", **options)


def of_palette() -> np.ndarray:
    return np.asarray(Image.fromarray(COLOURS).quantize(256).convert("RGB"))


def with_opacity(colours: np.ndarray) -> np.ndarray:
    return np.dstack([colours, OPACITY])


def multiplied(colours: np.ndarray) -> np.ndarray:
    shares = OPACITY / 255 if colours.ndim == 2 else OPACITY[..., None] / 255
    return np.rint(colours * shares).astype(np.uint8)


def pal_tiff() -> bytes:
    image = Image.fromarray(COLOURS).quantize(256).convert("PA")
    image.putalpha(Image.fromarray(OPACITY))
    return encoded(image, "TIFF")


def orientation(number: int, format: str, image: np.ndarray = COLOURS) -> bytes:
    """The image, stored so that this orientation turns it upright."""
    stored = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }[number](image)
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(np.ascontiguousarray(stored), format, exif=exif)


GREY_16 = GREY.astype(np.uint16) * 257
GREY_FLOAT = (GREY / 255).astype(np.float32)
FLOATS_EXPECTED = "expected floats from 0 to 1, got "
INTEGERS = "expected values of at most 16 bits in a PNG, TIFF or PGM, got TIFF with 32-bit integers"
SIGNED = "expected unsigned integers or floats, got signed integers"
WHITE = "expected 0 to be black, got more than 8 bits where 0 is white"
# Conversions between colour spaces of 8 bits lose some levels, JPEG's more.
ROUNDED, LOSSY = 4, 30

# row of the docs' table: files, and what they give: values with the largest error, or the refusal
ROWS = {
    "grey of 1 to 8 bits (`1`, `L`)": {
        "1 bit": (encoded(Image.fromarray(GREY > 99), "PNG"), (GREY > 99) * np.uint8(255), 0),
        "4 bits": (pgm(15, "u1"), np.rint(GREY / 17).astype(np.uint8) * 17, 0),
        "4 bits of TIFF": (
            tiff((GREY[:, ::2] >> 4 << 4 | GREY[:, 1::2] >> 4), bits=4),
            (GREY >> 4) * 17,
            0,
        ),
        "8 bits": (encoded(GREY, "BMP"), GREY, 0),
    },
    "grey of 9 to 16 bits (`I;16`, `I;16B`, PGM's `I`)": {
        "PNG": (encoded(GREY_16, "PNG"), GREY, 0),
        "TIFF": (encoded(GREY_16, "TIFF"), GREY, 0),
        "big-endian TIFF": (
            encoded(Image.frombytes("I;16B", (16, 16), GREY_16.astype(">u2").tobytes()), "TIFF"),
            GREY,
            0,
        ),
        "TIFF of 12 bits": (tiff(packed_12_bits(GREY_16 >> 4), bits=12), GREY, 0),
        "PGM": (pgm(65535, ">u2"), GREY, 0),
        "PGM of 12 bits": (pgm(4095, ">u2"), GREY, 0),
        "PGM as text": (
            b"P2 16 16 1023\n"
            + b" ".join(b"%d" % round(x * 1023 / 255) for x in GREY.ravel().tolist()),
            GREY,
            0,
        ),
        "dark PNG": (encoded(GREY_16 // 16, "PNG"), np.rint(GREY / 16).astype(np.uint8), 1),
    },
    "grey floats (`F`)": {
        "TIFF": (encoded(GREY_FLOAT, "TIFF"), GREY, 0),
        "PFM": (encoded(GREY_FLOAT, "PPM"), GREY, 0),
        "dark": (encoded(GREY_FLOAT / 16, "TIFF"), np.rint(GREY / 16).astype(np.uint8), 0),
    },
    "grey floats with a value outside 0 to 1": {
        "0 to 255": (encoded(GREY.astype(np.float32), "TIFF"), FLOATS_EXPECTED + "0 to 255"),
        "negative": (encoded(GREY_FLOAT - 0.5, "TIFF"), FLOATS_EXPECTED + "-0.5 to 0.5"),
        "NaN": (encoded(GREY_FLOAT * np.float32("nan"), "TIFF"), FLOATS_EXPECTED + "nan to nan"),
    },
    "32-bit integers (`I`)": {
        "unsigned": (tiff(GREY.astype(np.uint32) << 24, bits=32), INTEGERS),
        "small": (tiff(GREY.astype(np.uint32), bits=32), INTEGERS),
    },
    "signed integers": {
        f"{bits} bits": (tiff(GREY.astype(f"i{bits // 8}"), bits=bits, sign=2), SIGNED)
        for bits in (8, 16, 32)
    },
    "TIFF where 0 is white, of at most 8 bits": {
        "8 bits": (tiff(GREY, bits=8, photometric=0), 255 - GREY, 0),
        "1 bit": (tiff(bytes(32), bits=1, photometric=0), np.full_like(GREY, 255), 0),
    },
    "TIFF where 0 is white, of more bits or of floats": {
        "16 bits": (tiff(GREY_16, bits=16, photometric=0), WHITE),
        "floats": (tiff(GREY_FLOAT, bits=32, sign=3, photometric=0), WHITE),
    },
    "colours of 8 bits (`RGB`, `RGBX`, `P`)": {
        "PNG": (encoded(COLOURS, "PNG"), COLOURS, 0),
        "WebP": (encoded(COLOURS, "WEBP", lossless=True), COLOURS, 0),
        "JPEG": (encoded(COLOURS, "JPEG", quality=100, subsampling=0), COLOURS, ROUNDED),
        "RGBX": (
            tiff(with_opacity(COLOURS), bits=8, samples=4, photometric=2, extra=0),
            COLOURS,
            0,
        ),
        "palette": (palette(), of_palette(), 0),
    },
    "colours of 16 bits per channel": {
        "PNG": (png16(COLOURS.astype(np.uint16) * 257), COLOURS, 0),
        "PNG with opacity": (png16(with_opacity(COLOURS).astype(np.uint16) * 257), COLOURS, 0),
        "grey PNG with opacity": (png16(np.dstack([GREY_16, GREY_16])), GREY, 0),
        "PPM": (
            b"P6 16 16 65535\n" + (COLOURS.astype(">u2") * 257).astype(">u2").tobytes(),
            COLOURS,
            0,
        ),
        "TIFF": (
            tiff(COLOURS.astype(np.uint16) * 257, bits=16, samples=3, photometric=2),
            COLOURS,
            0,
        ),
    },
    "other colours (`CMYK`, `YCbCr`, `LAB`)": {
        "CMYK": (encoded(Image.fromarray(COLOURS).convert("CMYK"), "TIFF"), COLOURS, ROUNDED),
        "CMYK JPEG": (
            encoded(Image.fromarray(COLOURS).convert("CMYK"), "JPEG", quality=100),
            COLOURS,
            LOSSY,
        ),
        "YCbCr": (encoded(Image.fromarray(COLOURS).convert("YCbCr"), "TIFF"), COLOURS, ROUNDED),
        "LAB": (encoded(Image.fromarray(COLOURS).convert("LAB"), "TIFF"), COLOURS, LOSSY),
    },
    "transparency (`LA`, `PA`, `RGBA`, a transparent colour)": {
        "LA": (encoded(np.dstack([GREY, OPACITY]), "PNG"), GREY, 0),
        "PA": (pal_tiff(), of_palette(), 0),
        "RGBA": (encoded(with_opacity(COLOURS), "PNG"), COLOURS, 0),
        "all transparent": (encoded(np.dstack([COLOURS, 0 * GREY]), "PNG"), COLOURS, 0),
        "a colour": (encoded(COLOURS, "PNG", transparency=(0, 0, 255)), COLOURS, 0),
        "a grey": (encoded(GREY, "PNG", transparency=7), GREY, 0),
        "a colour of the palette": (palette(transparency=3), of_palette(), 0),
        "opacities of the palette": (palette(transparency=bytes(range(256))), of_palette(), 0),
    },
    "colours multiplied by their opacity (`La`, `RGBa`)": {
        "La": (
            tiff(np.dstack([multiplied(GREY), OPACITY]), bits=8, samples=2, photometric=1, extra=1),
            GREY,
            1,
        ),
        "RGBa": (
            tiff(with_opacity(multiplied(COLOURS)), bits=8, samples=4, photometric=2, extra=1),
            COLOURS,
            1,
        ),
    },
    "EXIF orientation": {
        **{f"JPEG {i}": (orientation(i, "JPEG"), COLOURS, LOSSY) for i in range(1, 9)},
        "PNG": (orientation(6, "PNG"), COLOURS, 0),
        "TIFF": (orientation(6, "TIFF"), COLOURS, 0),
        "WebP": (orientation(8, "WEBP"), COLOURS, LOSSY),
        # pillow would map these into memory
        **{f"grey TIFF {i}": (orientation(i, "TIFF", GREY), GREY, 0) for i in range(1, 9)},
        **{f"16-bit TIFF {i}": (orientation(i, "TIFF", GREY_16), GREY, 0) for i in range(5, 9)},
        "16 bits": (
            encoded(
                np.rot90(GREY_16).copy(),
                "PNG",
                exif=b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
            ),
            GREY,
            0,
        ),
    },
    "several frames or pages": {
        format: (
            encoded(
                COLOURS, format, save_all=True, append_images=[Image.new("RGB", (16, 16))], **more
            ),
            COLOURS,
            0,
        )
        for format, more in (("TIFF", {}), ("PNG", {}), ("WEBP", {"lossless": True}))
    },
    "cut short or damaged": {
        format: (encoded(COLOURS, format)[:-40], r"\w+: .+")
        for format in ("PNG", "TIFF", "PPM", "BMP", "WEBP", "JPEG")
    },
}


def table() -> dict[str, str]:
    """The rows of the docs' table."""
    lines = (ROOT / "docs" / "training.md").read_text().split("| how it is read |\n|---|---|\n")[1]
    rows = re.match(r"(?:\|.*\n)*", lines)[0].splitlines()
    return dict(row.strip("| ").split(" | ") for row in rows)


def test_the_table_of_images_has_the_rows_that_are_tested():
    assert list(table()) == list(ROWS)
    for row, how in table().items():
        refused = [len(case) == 2 for case in ROWS[row].values()]
        assert refused == [how == "refused"] * len(refused), row


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{row.partition(' (')[0]}: {name}")
        for row, cases in ROWS.items()
        for name, case in cases.items()
    ],
)
def test_images_are_read_as_the_table_says(tmp_path, case):
    file = tmp_path / "image.png"  # pillow goes by the content
    file.write_bytes(case[0])
    with warnings.catch_warnings(action="error"):
        if len(case) == 2:
            with pytest.raises(CorruptImageError, match=rf"^{file}: {case[1]}"):
                read_rgb(file)
            return
        image = read_rgb(file)
    _, expected, error = case
    if expected.ndim == 2:
        expected = np.stack([expected] * 3, axis=2)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= error


MODES = {
    "grey": ("1", "L", "LA", "La", "F"),
    "coloured": ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"),
    "unfit": ("I", "I;16", "I;16B", "I;16L", "I;16N"),
}


@pytest.mark.parametrize(
    ("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes]
)
def test_every_mode_of_pillow_is_right_or_refused(tmp_path, monkeypatch, kind, mode):
    """Also those that no file gives here: another plugin of pillow might."""
    pixels = {
        "grey": np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8),
        "coloured": np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8),
        "unfit": np.zeros((1, 2, 3), np.uint8),
    }[kind]
    if mode == "F":
        image = Image.fromarray(pixels[..., 0] / np.float32(255))
    elif kind == "unfit":
        image = Image.new(mode, (2, 1))
    else:
        image = Image.fromarray(pixels)
        if mode in ("La", "RGBa"):
            image = image.convert(mode.upper())  # the only mode that converts to it
        image = image.convert(mode)
    assert image.mode == mode
    monkeypatch.setattr(Image, "open", lambda file: image)
    path = tmp_path / "image"
    path.touch()
    if kind == "unfit":
        with pytest.raises(CorruptImageError, match=r"got no format with (16|32)-bit integers"):
            read_rgb(path)
    else:
        assert np.abs(np.asarray(read_rgb(path)).astype(int) - pixels).max() <= LOSSY


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_refused_image_ends_the_command_by_its_name(tmp_path, capsys, workers):
    folder = image_folder(tmp_path / "data")
    file = folder / "train" / "bee" / "3.png"
    file.write_bytes(encoded(GREY.astype(np.float32), "TIFF"))
    arguments = ["--data", str(folder), "--out", str(tmp_path / "out"), "--model", "small_epsanet"]
    arguments += ["--image-size", "8", "--epochs", "1", "--batch", "24", "--workers", workers]
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: an image cannot be read: {file}: {FLOATS_EXPECTED}0 to 255 "
        "(--corrupt skip leaves such images out)"
    )


# ---- which files are images ----


def files_of(folder) -> list[str]:
    return [os.fsdecode(bytes(file)) for file in open_data(str(folder), 8).train.files]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    folder = image_folder(tmp_path / ".hidden" / "data", train=2)
    before = files_of(folder)
    assert len(before) == 6
    for part in ("train", "val"):
        ant = folder / part / "ant"
        for hidden in (ant / ".ipynb_checkpoints", folder / part / ".ipynb_checkpoints"):
            hidden.mkdir()
            (hidden / "0-checkpoint.JPEG").write_bytes((ant / "0.JPEG").read_bytes())
        (ant / "._0.JPEG").write_bytes(b"resource fork")
    assert files_of(folder) == before
    assert open_data(str(folder), 8).classes == ["ant", "bee", "cat"]
    nested = folder / "train" / "ant" / "nested"
    nested.mkdir()
    (nested / "shown.PNG").write_bytes(b"")
    assert set(files_of(folder)) - set(before) == {"ant/nested/shown.PNG"}


@pytest.mark.parametrize(
    ("at", "around"),
    [
        *((at, around) for at in ("ant/link", "ant/nested/link") for around in ("ant", ".", "..")),
        *(("link", around) for around in (".", "..")),
    ],
)
def test_a_link_to_a_folder_around_it_is_not_followed(tmp_path, at, around):
    folder = image_folder(tmp_path / "data", train=2)
    (folder / "train" / "ant" / "nested").mkdir()
    before = files_of(folder)
    (folder / "train" / at).symlink_to(folder / "train" / around)
    assert files_of(folder) == before


def test_a_folder_with_several_links_to_it_is_read_once(tmp_path):
    folder = image_folder(tmp_path / "data", train=2)
    before = files_of(folder)
    more = tmp_path / "more"
    more.mkdir()
    (more / "2.png").write_bytes(b"")
    for name in ("again", "once"):
        (folder / "train" / "ant" / name).symlink_to(more)
    assert set(files_of(folder)) - set(before) == {"ant/again/2.png"}


def test_a_link_back_from_elsewhere_is_not_followed(tmp_path):
    """The images of the other classes would get this class's label."""
    folder = image_folder(tmp_path / "data", train=2)
    before = files_of(folder)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "back").symlink_to(folder / "train")
    (folder / "train" / "ant" / "link").symlink_to(tmp_path / "more")
    assert files_of(folder) == before


def test_folders_that_link_to_each_other_end(tmp_path):
    folder = image_folder(tmp_path / "data", train=2)
    ant = folder / "train" / "ant"
    for name, other in (("a", "b"), ("b", "a")):
        (ant / name).mkdir()
        (ant / name / "link").symlink_to(ant / other)
        (ant / name / f"{name}.png").write_bytes(b"")
    names = [file.rpartition("/")[2] for file in files_of(folder) if file.startswith("ant/")]
    assert sorted(names) == ["0.JPEG", "1.png", "a.png", "b.png"]


def test_a_class_may_be_a_link(tmp_path):
    folder = image_folder(tmp_path / "data", train=2)
    before = files_of(folder)
    (folder / "train" / "bee").rename(tmp_path / "elsewhere")
    (folder / "train" / "bee").symlink_to(tmp_path / "elsewhere")
    assert files_of(folder) == before


@pytest.mark.parametrize(
    ("at", "to"), [("ant/link", "bee"), ("bee/link", "ant/nested"), ("dog", "bee")]
)
def test_classes_that_share_a_folder_are_refused(tmp_path, at, to):
    """By a link from one into the other, or by two names of one folder."""
    folder = image_folder(tmp_path / "data", train=2)
    nested = folder / "train" / "ant" / "nested"
    nested.mkdir()
    (nested / "2.png").write_bytes(b"")
    (folder / "train" / at).symlink_to(folder / "train" / to)
    if at == "dog":
        (folder / "val" / "dog").mkdir()
        (folder / "val" / "dog" / "0.png").write_bytes(b"")
    with pytest.raises(InputError, match=f"expected images of its own, got those of .*{to}"):
        files_of(folder)


@pytest.mark.parametrize("where", ["train", "train/ant", "train/ant/nested"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, where):
    folder = image_folder(tmp_path)
    (folder / "train" / "ant" / "nested").mkdir()

    def refusing(list_folder):
        def refuses(path="."):
            if os.fspath(path) == str(folder / where):
                raise PermissionError(13, "Permission denied", str(path))
            return list_folder(path)

        return refuses

    for name in ("scandir", "listdir"):  # root may read everything
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    with pytest.raises(InputError, match=rf"^{folder / where}: cannot be read: Permission denied$"):
        open_data(str(folder), 8)


# ---- what is missing ----


def test_a_folder_without_what_it_needs_says_what_it_has(tmp_path):
    for name in "abcdefg":
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "train").write_bytes(b"")
    (tmp_path / "val").mkdir()
    with pytest.raises(
        InputError, match=r"there is no train in it, only a, b, c, d, e and 4 more$"
    ):
        open_data(str(tmp_path), 8)
    for name in "abcdefg":
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"there is no train in it, only train, val/$"):
        open_data(str(tmp_path), 8)


def test_data_that_cannot_be_reached_say_why(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"")
    for name, why in (
        ("none", "No such file or directory"),
        ("dangling", "No such file or directory"),
        ("loop", "Too many levels of symbolic links"),
        ("file/inside", "Not a directory"),
    ):
        path = tmp_path / name
        with pytest.raises(
            InputError, match=rf"^--data: expected 'digits' or a folder, got '{path}': {why}$"
        ):
            open_data(str(path), 8)
