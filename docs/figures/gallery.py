"""Draws the gallery: what the scales of an EPSANet-50 weigh, and where it looks.

    python docs/figures/gallery.py [FOLDER]

scikit-learn and scikit-image ship the photographs, a class each. The training command learns to
tell which one a crop is from: by crops of the left two thirds, tried on crops of the right third.
That takes about ten minutes on two cores, in build/gallery; a finished training is taken as it is.
gallery.json gets the figures that docs/gallery.md gives. The extra `gallery` has what this needs:
the package `grad-cam` needs torchvision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from sklearn.datasets import load_sample_image
from style import HERE, main, save

from epsa_fused import load_trained, plots, record_attention
from epsa_fused.plots import Record
from epsa_fused.train import Config, train
from epsa_fused.trained import Trained

BUILD = HERE.parents[1] / "build" / "gallery"
KERNELS = ("3x3", "5x5", "7x7", "9x9")
SHOWN = ("cat", "coffee", "flower", "temple")
MODULES = ("layer2.3.conv2", "layer4.2.conv2")  # by class
HEIGHT = 320  # of the photographs: the same for all, as the network knows one scale
CROP = 96
CROPS = 160  # of each class, to learn from
SETTINGS = {
    "model": "epsanet50",
    "image_size": 64,
    "epochs": 20,
    "batch": 32,
    "lr": 0.02,
    "schedule": "cosine",
    "workers": 0,
    "channels_last": True,
    "resume": "auto",
}


def photographs() -> dict[str, Image.Image]:
    """By class, all of HEIGHT pixels."""
    from skimage import data

    pixels = {
        "astronaut": data.astronaut(),
        "cat": data.chelsea(),
        "coffee": data.coffee(),
        "flower": load_sample_image("flower.jpg"),
        "galaxies": data.hubble_deep_field(),
        "retina": data.retina(),
        "rocket": data.rocket(),
        "temple": load_sample_image("china.jpg"),
    }
    images = {name: Image.fromarray(array) for name, array in pixels.items()}
    return {
        name: image.resize((image.width * HEIGHT // image.height, HEIGHT))
        for name, image in images.items()
    }


def thirds(image: Image.Image) -> dict[str, Image.Image]:
    """What is learned from, and what is held out."""
    cut = 2 * image.width // 3
    return {
        "train": image.crop((0, 0, cut, image.height)),
        "val": image.crop((cut, 0, image.width, image.height)),
    }


def write_crops(images: Mapping[str, Image.Image], folder: Path, count: int) -> None:
    """`count` random crops of each class to learn from, a quarter as many held out."""
    random = np.random.default_rng(0)
    for name, image in images.items():
        for part, area in thirds(image).items():
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count if part == "train" else count // 4):
                left, top = random.integers((area.width - CROP, area.height - CROP), endpoint=True)
                crop = area.crop((left, top, left + CROP, top + CROP))
                crop.save(folder / part / name / f"{i:03}.png")


def trained_network(
    images: Mapping[str, Image.Image], build: Path, count: int, settings: Mapping[str, Any]
) -> Trained:
    crops = build / "crops"
    if not crops.exists():
        write_crops(images, crops, count)
    train(Config.of(str(crops), out=str(build / "run"), **settings))
    return load_trained(build / "run")


# ---- the pictures ----


def squares(images: Mapping[str, Image.Image]) -> dict[str, Image.Image]:
    """The middle of the held-out third of each that the pictures show, as large as a crop."""
    found = {}
    for name in SHOWN:
        area = thirds(images[name])["val"]
        left, top = (area.width - CROP) // 2, (area.height - CROP) // 2
        found[name] = area.crop((left, top, left + CROP, top + CROP))
    return found


def weights_of_crops(trained: Trained, crops: Path) -> tuple[Record, list[int]]:
    """The scales and the class of every held-out crop."""
    files = sorted((crops / "val").glob("*/*.png"))
    with torch.no_grad(), record_attention(trained.model) as scales:
        for file in files:
            trained.model(trained.preprocess([file]))
    return scales, [trained.classes.index(file.parent.name) for file in files]


def depth(scales: Record) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    plots.depth(scales, KERNELS, axes)
    return figure


def classes(scales: Record, targets: list[int], names: list[str]) -> Figure:
    figure, all_axes = plt.subplots(1, len(MODULES), figsize=(8, 3.2), layout="constrained")
    for module, axes in zip(MODULES, all_axes, strict=True):
        plots.classes(scales, targets, names, module=module, labels=KERNELS, axes=axes)
    return figure


def each_image(trained: Trained, images: Mapping[str, Image.Image]) -> Figure:
    """Every square above the scales of all modules, in one colour scale."""
    with torch.no_grad(), record_attention(trained.model) as scales:
        trained.model(trained.preprocess([*images.values()]))
    reach = max((w - 0.25).abs().max().item() for w in plots.scale_weights(scales).values())
    figure, (above, below) = plt.subplots(
        2, len(images), figsize=(7.4, 5.8), layout="constrained", height_ratios=(2, 5)
    )
    for i, (name, image) in enumerate(images.items()):
        above[i].imshow(image)
        above[i].set_title(name)
        above[i].axis("off")
        plots.image(scales, i, KERNELS, below[i], reach=reach)
        below[i].tick_params(labelsize=8)
        below[i].images[0].colorbar.remove()
        if i:
            below[i].set_yticks([])
    figure.colorbar(below[-1].images[0], ax=below, label="weight of a scale")
    return figure


def grad_cam(
    trained: Trained, images: Mapping[str, Image.Image]
) -> tuple[Figure, dict[str, float]]:
    """Four squares as one image, with the heat for each of their classes; the share of the heat
    that is in the square of its class."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    side = trained.shape[0]
    corners = [(side * (i % 2), side * (i // 2)) for i in range(4)]
    together = Image.new("RGB", (2 * side, 2 * side))
    for corner, image in zip(corners, images.values(), strict=True):
        together.paste(image.resize((side, side)), corner)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (trained.mean, trained.std))
    x = ((torch.tensor(np.array(together)).permute(2, 0, 1) - mean) / std)[None]

    figure, (whole, *others) = plt.subplots(1, 5, figsize=(8, 1.9), layout="constrained")
    whole.imshow(together)
    whole.set_title("image")
    shares = {}
    with GradCAM(trained.model, [trained.model.layer4[-1]]) as cam:
        for (left, top), name, axes in zip(corners, images, others, strict=True):
            heat = cam(x, [ClassifierOutputTarget(trained.classes.index(name))])[0]
            inside = heat[top : top + side, left : left + side]
            shares[name] = float(inside.sum() / heat.sum()) if heat.any() else 0.0
            axes.imshow(together.convert("L"), cmap="gray")
            drawn = axes.imshow(heat, cmap="inferno", alpha=0.5, vmin=0, vmax=1)
            axes.add_patch(Rectangle((left, top), side - 1, side - 1, fill=False, color="white"))
            axes.set_title(name)
    for axes in (whole, *others):
        axes.axis("off")
    figure.colorbar(drawn, ax=others, label="heat / largest")
    return figure, shares


def draw_all(folder: Path) -> None:
    images = photographs()
    trained = trained_network(images, BUILD, CROPS, SETTINGS)
    scales, targets = weights_of_crops(trained, BUILD / "crops")
    save(depth(scales), folder / "gallery-depth.svg")
    save(classes(scales, targets, trained.classes), folder / "gallery-classes.svg")
    save(each_image(trained, squares(images)), folder / "gallery-images.png")
    figure, shares = grad_cam(trained, squares(images))
    save(figure, folder / "gallery-grad-cam.png")
    means = torch.stack([w.mean(0) for w in plots.scale_weights(scales).values()])
    figures = {
        "top1": trained.top1,
        "lines of the depth": [means.min().item(), means.max().item()],
        "heat in the square of its class": shares,
    }
    (folder / "gallery.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main(draw_all)
