"""load_trained: a network from a training of :mod:`epsa_fused.train`, ready for images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ._checks import check_int, given
from .models import MODELS

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Picture = str | Path | Image | np.ndarray


@dataclass(frozen=True)
class Trained:
    """A trained network with what its images need; :func:`load_trained` makes it.

    Attributes:
        model: in eval mode, on the CPU, with the weights of the best epoch.
        classes: their names, in the order of the model's outputs.
        mean, std: of each channel, in units of a pixel's value; () where the training had a
            Dataset or DataLoader of the user's own, whose preprocessing is not known here.
        shape: H, W and C of an image. C is 1 for grey images.
        white: the value of white, 255 for photographs.
        centre: the share of the shorter side that the centre crop has.
        top1: the share of held-out images that the network named right, 0 to 1.
    """

    model: nn.Module
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, int, int]
    white: int
    centre: float
    top1: float

    def preprocess(self, pictures: Sequence[Picture]) -> Tensor:
        """Images as the evaluation of the training had them: [N, C, H, W] in float32.

        The centre square is resized to H x W by bilinear interpolation, and normalised.

        Args:
            pictures: files, pillow's images, or arrays uint8 [H, W, 3] or [H, W] where 255 is
                white, whatever `white` is.

        Raises:
            TypeError: a picture is of another type.
            epsa_fused.train.InputError: a picture cannot be read, and why; or `mean` is ().
        """
        if isinstance(pictures, str | Path) or not isinstance(pictures, Sequence):
            raise TypeError(f"preprocess: pictures: expected a sequence, got {given(pictures)}")
        if not self.mean:
            from .train import InputError

            raise InputError(
                "preprocess: expected a training on files, got one on images that its user "
                "prepared: prepare these in the same way, and call the model"
            )
        if not pictures:
            return torch.empty(0, self.shape[2], *self.shape[:2])
        return torch.stack([self._prepared(i, p) for i, p in enumerate(pictures)])

    @torch.no_grad()
    def predict(self, pictures: Sequence[Picture], top: int = 5) -> list[list[tuple[str, float]]]:
        """The likeliest classes of each picture with their probabilities, the likeliest first.

        Args:
            pictures: as of :meth:`preprocess`.
            top: how many classes, at most.
        """
        check_int("predict: top", top, 1)
        images = self.preprocess(pictures)
        if not len(images):
            return []
        self.model.eval()
        parameter = next(self.model.parameters())
        logits = self.model(images.to(parameter.device, parameter.dtype)).float()
        values, places = logits.softmax(1).topk(min(top, len(self.classes)))
        return [
            [(self.classes[place], value) for place, value in zip(row, shares, strict=True)]
            for row, shares in zip(places.tolist(), values.tolist(), strict=True)
        ]

    def _prepared(self, number: int, picture: Picture) -> Tensor:
        import numpy as np

        image = _image(number, picture)
        from PIL.Image import Resampling  # _image has said where pillow is missing

        height, width, channels = self.shape
        side = min(image.size) * self.centre
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.convert("L" if channels == 1 else "RGB")
        image = image.resize((width, height), Resampling.BILINEAR, box=box)
        pixels = np.asarray(image, dtype=np.float32).reshape(self.shape) * (self.white / 255)
        normalised = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(normalised).permute(2, 0, 1)


def load_trained(run: str | Path) -> Trained:
    """Load the best network of a training: its model, classes and preprocessing.

    It runs no code of the file: `torch.load` reads it with `weights_only`.

    Args:
        run: best.pt, best.safetensors, or the folder that holds them (`--out` of the training).

    Raises:
        epsa_fused.train.InputError: the file is missing, damaged or of another version, or the
            package that reads it is missing.
    """
    from .train import InputError, weights

    path = weights.best_of(run)
    found = weights.read_best(path)
    saved, settings = found.facts, found.facts["run"]
    build = MODELS.get(settings["model"])
    if build is None:
        raise InputError(
            f"{path}: expected a model of {', '.join(MODELS)}, got {settings['model']}"
        )
    model = build(
        len(settings["classes"]),
        fused=settings["psa"] == "fused",
        in_chans=saved["shape"][2],
        drop_rate=settings["dropout"],
    )
    weights.load_whole(model, found.tensors, path, settings["model"])
    return Trained(
        model=model.eval(),
        classes=list(settings["classes"]),
        mean=tuple(saved["mean"]),
        std=tuple(saved["std"]),
        shape=tuple(saved["shape"]),
        white=saved["white"],
        centre=saved["centre"],
        top1=saved["top1"],
    )


def _image(number: int, picture: Picture) -> Image:
    """Any picture as pillow's image; files as the training reads them."""
    import numpy as np

    from .train.errors import CorruptImageError, InputError, required

    required("PIL.Image", "reading images", "pillow")
    from PIL import Image

    from .train.pixels import read_rgb, upright_rgb

    if isinstance(picture, str | Path):
        try:
            return read_rgb(Path(picture))
        except CorruptImageError as error:
            raise InputError(str(error)) from error
    if isinstance(picture, np.ndarray):
        fits = picture.ndim >= 2 and picture.shape[2:] in ((), (3,)) and picture.size > 0
        if picture.dtype != np.uint8 or not fits:
            raise TypeError(
                f"preprocess: pictures[{number}]: expected uint8 [H, W, 3] or [H, W], got "
                f"{picture.dtype} {list(picture.shape)}"
            )
        return Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        try:
            return upright_rgb(picture)
        except CorruptImageError as error:
            raise InputError(f"preprocess: pictures[{number}]: {error}") from error
    raise TypeError(
        f"preprocess: pictures[{number}]: expected a file, an image of pillow or an array, got "
        f"{given(picture)}"
    )
