"""The pictures of recorded attention: what they show, and what they refuse."""

import math
import sys

import pytest
import torch
from support.optional import optional

from epsa_fused import FusedPSAModule, plots, record_attention
from epsa_fused.plots import scale_weights


@pytest.fixture
def axes():
    matplotlib = optional("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    figure, axes = pyplot.subplots()
    yield axes
    pyplot.close(figure)


def attention(*means: float, images: int = 1, channels: int = 3) -> torch.Tensor:
    """[N, S, C], each scale's mean over channels given."""
    spread = torch.linspace(-0.01, 0.01, channels)
    return torch.tensor(means)[None, :, None] + spread.repeat(images, 1)[:, None, :]


def record() -> dict[str, list[torch.Tensor]]:
    return {
        "first": [attention(0.7, 0.3, images=2), attention(0.1, 0.9)],
        "second": [attention(0.5, 0.5, images=2), attention(0.4, 0.6)],
    }


def test_the_weights_of_scales():
    weights = scale_weights(record() | {"never called": []})
    assert list(weights) == ["first", "second"]
    right = torch.tensor([[0.7, 0.3], [0.7, 0.3], [0.1, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(weights["first"], right, rtol=1e-6, atol=1e-7)


def test_depth(axes):
    assert plots.depth(record(), axes=axes) is axes
    lines = [list(line.get_ydata()) for line in axes.lines[:2]]
    torch.testing.assert_close(
        torch.tensor(lines), torch.tensor([[0.5, 1.4 / 3], [0.5, 1.6 / 3]]).double(),
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["scale 1", "scale 2"]
    assert list(axes.lines[2].get_ydata()) == [0.5, 0.5]  # where all count alike
    assert all(float(tick).is_integer() for tick in axes.get_xticks())  # modules are counted
    assert len({line.get_marker() for line in axes.lines[:2]}) == 2


def test_classes(axes):
    plots.classes(record(), [1, 0, 1], ["cat", "dog"], module="first", axes=axes)
    shown = torch.as_tensor(axes.images[0].get_array().data)
    right = torch.tensor([[0.7, 0.3], [0.4, 0.6]]).double()
    torch.testing.assert_close(shown, right, rtol=1e-6, atol=1e-6)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog"]
    assert axes.get_title() == "first"


def test_image(axes):
    plots.image(record(), 2, labels=["3x3", "5x5"], axes=axes)
    shown = torch.as_tensor(axes.images[0].get_array().data)
    right = torch.tensor([[0.1, 0.9], [0.4, 0.6]]).double()
    torch.testing.assert_close(shown, right, rtol=1e-6, atol=1e-6)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["3x3", "5x5"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["first", "second"]


def test_tables_of_one_reach_have_the_same_colours(axes):
    limits = [
        plots.image(record(), axes=axes, reach=0.5).images[-1].get_clim(),
        plots.classes(record(), [0, 1, 1], reach=0.5, axes=axes).images[-1].get_clim(),
    ]
    assert limits == [(0, 1), (0, 1)]
    largest = plots.image(record(), axes=axes).images[-1].get_clim()
    assert largest == pytest.approx((0.3, 0.7), abs=1e-6)


def test_a_figure_of_its_own():
    optional("matplotlib").use("Agg")
    module = FusedPSAModule(64, 64)
    with record_attention(module) as recorded:
        module(torch.randn(3, 64, 5, 5))
    import matplotlib.pyplot as pyplot

    for draw in (plots.depth, plots.image, lambda r: plots.classes(r, [0, 1, 1])):
        before = pyplot.get_fignums()
        axes = draw(recorded)
        assert axes.has_data() and axes.figure.number not in before
        axes.figure.canvas.draw()
        pyplot.close(axes.figure)


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (lambda: plots.depth({}), "expected calls of record_attention, got none"),
        (lambda: plots.depth({"a": []}), "expected calls of record_attention, got none"),
        (lambda: plots.depth(record(), ["3x3"]), r"labels: expected 2, got \['3x3'\]"),
        (lambda: plots.depth(record(), "ab"), r"labels: expected 2, got 'ab'"),
        (
            lambda: plots.depth(record() | {"third": [attention(0.2, 0.3, 0.5)]}),
            r"one number of scales, got \[2, 3\]; record_attention\(model, names\)",
        ),
        (
            lambda: plots.classes(record(), [0, 1]),
            r"the class of each of 3 images, got shape \[2\]",
        ),
        (
            lambda: plots.classes(record(), [0, 1, 1], module="third"),
            "expected one of 'first', 'second', got 'third'",
        ),
        (
            lambda: plots.image({"a": [attention(0.5, 0.5)] * 2, "b": [attention(0.5, 0.5)]}),
            r"as many images of each module, got \{'a': 2, 'b': 1\}",
        ),
        (
            lambda: plots.classes(record(), [-1, 0, 1], ["cat", "dog"]),
            "classes: targets: expected .* got -1",
        ),
        (
            lambda: plots.classes(record(), [0, 1, 2], ["cat", "dog"]),
            "classes: targets: expected .* got 2",
        ),
        (lambda: plots.image(record(), 3), "image: index: expected .* got 3"),
        (lambda: plots.image(record(), reach=0), "reach: expected a number above 0, got 0"),
        (lambda: plots.classes(record(), [0, 1, 1], reach=math.nan), "reach: .* above 0, got nan"),
    ),
)
def test_what_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_targets_that_are_no_integers():
    with pytest.raises(TypeError, match=r"classes: targets: expected an int, got 0\.5"):
        plots.classes(record(), torch.tensor([0.5, 1, 1]))


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib, or epsa_fused\[plots\]"):
        plots.depth(record())
