"""docs/figures/gallery.py in small, and that docs/gallery.md shows what it made."""

import json
import re

import pytest
from support.optional import optional
from support.pages import PAGES, figure_script
from support.paths import ROOT

FIGURES = ROOT / "docs" / "figures"


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """The script, on four pictures cut from two photographs, with a training of one step."""
    for package in ("numpy", "PIL", "sklearn", "tqdm"):
        optional(package)
    script, images = figure_script("gallery"), optional("sklearn.datasets").load_sample_images()
    build = tmp_path_factory.mktemp("gallery")
    settings = script.SETTINGS | {"epochs": 1, "batch": 16, "image_size": 32}
    photographs = {
        name: script.Image.fromarray(images.images[i % 2][:, 100 * i : 100 * i + 240])
        for i, name in enumerate(script.SHOWN)
    }
    photographs = {name: image.resize((440, 300)) for name, image in photographs.items()}
    return script, photographs, build, script.trained_network(photographs, build, 4, settings)


def test_it_learns_and_shows_different_parts(gallery):
    script, photographs, build, trained = gallery
    assert trained.classes == list(script.SHOWN)
    for name, image in photographs.items():
        learned, held_out = script.thirds(image).values()
        assert learned.width + held_out.width == image.width
        assert held_out.tobytes() == image.crop((learned.width, 0, *image.size)).tobytes()
        files = {
            part: len([*(build / "crops" / part / name).iterdir()]) for part in ("train", "val")
        }
        assert files == {"train": 4, "val": 1}


def test_it_draws_the_scales(gallery):
    script, photographs, build, trained = gallery
    scales, targets = script.weights_of_crops(trained, build / "crops")
    assert targets == [0, 1, 2, 3] and len(scales) == 16
    by_class = script.classes(scales, targets, trained.classes)
    tables = [axes.images[0].get_array() for axes in by_class.axes[:2]]
    assert [table.shape for table in tables] == [(4, 4)] * 2
    assert len(script.depth(scales).axes[0].lines) == len(script.KERNELS) + 1
    each = script.each_image(trained, script.squares(photographs)).axes[4:8]
    assert all(axes.images[0].get_array().shape == (16, 4) for axes in each)
    assert len({axes.images[0].get_clim() for axes in each}) == 1


def test_it_draws_grad_cam(gallery):
    optional("pytorch_grad_cam")
    script, photographs, _, trained = gallery
    figure, shares = script.grad_cam(trained, script.squares(photographs))
    assert list(shares) == list(script.SHOWN) and all(0 <= s <= 1 for s in shares.values())
    assert len(figure.axes) == 6


def test_the_page_gives_the_committed_figures():
    figures = json.loads((FIGURES / "gallery.json").read_text())
    page = PAGES["docs/gallery.md"]
    assert f"{figures['top1']:.1%} of the held-out crops" in page
    low, high = figures["lines of the depth"]
    assert f"from {low:.2f} to {high:.2f}" in page
    for name, share in figures["heat in the square of its class"].items():
        assert f"| {name} | {share:.0%} |" in page
    pictures = set(re.findall(r"figures/(gallery-[\w-]+\.(?:svg|png))", page))
    assert pictures == {path.name for path in FIGURES.glob("gallery-*")}
    assert all((FIGURES / name).stat().st_size < 150_000 for name in pictures)
