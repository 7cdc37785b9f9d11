"""bfloat16 by instructions for pairs and for matrices, beside what other instruction sets do."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.cases import PLAIN_LAYOUTS, name_of

from epsa_fused import _C, FusedPSAModule
from epsa_fused.functional import spc_conv

pytestmark = pytest.mark.per_isa

BACKWARD = torch.ops.epsa_fused.spc_conv_backward
KERNELS, GROUPS = (3, 5, 7, 9), (1, 4, 8, 16)
PADDING = [k // 2 for k in KERNELS]
NUMBERS = (float("inf"), -float("inf"), float("nan"))


def operands(batch: int, channels: int, size: int, layout) -> tuple[torch.Tensor, list]:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(batch, channels, size, size, generator=generator).bfloat16()
    shapes = [(channels // 4, channels // g, k, k) for k, g in zip(KERNELS, GROUPS, strict=True)]
    weights = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return x.contiguous(memory_format=layout.out_format), weights


def gradients(x, weights, grads, mask=(True,) * 5, stride=1) -> list:
    """Of x and of the weights."""
    settings = (GROUPS, stride, PADDING, [1] * 4)
    grad_x, grad_weights = BACKWARD(grads, x, weights, *settings, list(mask))
    return [grad_x, *grad_weights]


def maps(x, layout, stride=1) -> list[torch.Tensor]:
    """The gradients of the branches' maps."""
    generator = torch.Generator().manual_seed(1)
    n, channels = x.shape[:2]
    sizes = [(size + stride - 1) // stride for size in x.shape[2:]]
    drawn = [torch.randn(n, channels // 4, *sizes, generator=generator) for _ in range(4)]
    return [t.bfloat16().contiguous(memory_format=layout.out_format) for t in drawn]


def exact_gradients(x, weights, grads, stride=1) -> list:
    sums, of_weights = torch.zeros_like(x, dtype=torch.float64), []
    for grad, w, p, g in zip(grads, weights, PADDING, GROUPS, strict=True):
        one, other, _ = torch.ops.aten.convolution_backward(
            grad.double(), x.double(), w.double(), None,
            [stride] * 2, [p, p], [1, 1], False, [0, 0], g, [True, True, False],
        )  # fmt: skip
        sums += one
        of_weights.append(other)
    return [sums, *of_weights]


def assert_same_numbers(given: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal infinities and NaN, and near where both are finite."""
    finite = expected.isfinite()
    assert finite.any()
    assert torch.equal(given.isfinite(), finite)
    assert torch.equal(given.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(given[infinite].double(), expected[infinite])
    allowed = 2.0**-8 * expected[finite].abs() + 1e-4 * expected[finite].abs().max()
    assert ((given[finite] - expected[finite]).abs() <= allowed).all()


def reference(x, weights):
    return [
        F.conv2d(x.double(), w.double(), None, 1, p, 1, g)
        for w, p, g in zip(weights, PADDING, GROUPS, strict=True)
    ]


# samples alone, samples shared by threads, and units of more weights than a cache holds
@pytest.mark.parametrize("batch, channels, size", ((1, 64, 9), (5, 64, 6), (2, 512, 3)))
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_infinities_and_nan_of_x_stay_where_they_are_in_pairs(batch, channels, size, layout):
    """Neither a product by zero, of an idle lane of a matrix, nor a sum of pairs spreads them."""
    x, weights = operands(batch, channels, size, layout)
    for number, place in itertools.product(NUMBERS, ((0, 0, 0), (-1, -1, -1), (7, 2, 1))):
        x[-1][place] = number
    feats, pooled = spc_conv(x, weights, GROUPS, padding=PADDING)
    results = zip(feats, reference(x, weights), pooled.unbind(1), strict=True)
    for feat, expected, means in results:
        assert_same_numbers(feat, expected)
        finite = expected.isfinite()
        assert not finite.all()
        assert torch.equal(means.isfinite(), finite.all(dim=(2, 3)))


# x in a place that every tap meets, or in a corner; the last branch's gradient
@pytest.mark.parametrize("which", ("x", "grad"))
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_infinities_and_nan_of_the_gradients_stay_where_they_are_in_pairs(which, layout):
    x, weights = operands(3, 64, 9, layout)
    grads = maps(x, layout)
    t = x if which == "x" else grads[3]
    for number, place in itertools.product(NUMBERS, ((0, 0, 0), (-1, -1, -1), (7, 2, 1))):
        t[-1][place] = number
    results = gradients(x, weights, grads)
    exact = exact_gradients(x, weights, grads)
    assert_same_numbers(results[0], exact[0])
    spoiled = exact[1:] if which == "x" else exact[4:]
    assert not any(t.isfinite().all() for t in spoiled)
    for given, expected in zip(results[1:], exact[1:], strict=True):
        finite = given.isfinite()
        # torch multiplies the numbers by the padding's zeros too
        assert (finite | ~expected.isfinite()).all()
        assert_same_numbers(given[expected.isfinite()], expected[expected.isfinite()])
        middle = given.shape[-1] // 2
        at = (..., middle, middle)
        assert torch.equal(finite[at], expected.isfinite()[at])


# odd and even numbers of pixels in a row of the gradient, shorter than a vector and longer
@pytest.mark.parametrize("size", (7, 8, 14, 15, 28, 65, 66))
@pytest.mark.parametrize("channels", (64, 128))
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_gradients_of_stride_2_in_bfloat16(size, channels, layout):
    x, weights = operands(2, channels, size, layout)
    grads = maps(x, layout, stride=2)
    exact = exact_gradients(x, weights, grads, stride=2)
    for given, expected in zip(gradients(x, weights, grads, stride=2), exact, strict=True):
        assert_same_numbers(given, expected)


@pytest.mark.parametrize("which", ("x", "grad"))
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_infinities_that_only_the_gradients_of_weights_see_in_pairs(which, stride, layout):
    """Nothing else of the call looks at the numbers, and each number may be in any pair."""
    mask = [False] + [True] * 4
    for place in ((0, 0, 0), (5, 1, 2), (9, 2, 3), (-1, -1, -1)):
        x, weights = operands(2, 64, 9, layout)
        grads = maps(x, layout, stride)
        clean = gradients(x, weights, grads, mask, stride)
        (x if which == "x" else grads[3])[0][place] = float("inf")
        results = gradients(x, weights, grads, mask, stride)
        exact = exact_gradients(x, weights, grads, stride)
        assert not exact[4].isfinite().all()
        middle = (..., 4, 4)  # of the largest kernel, which padding does not meet
        assert torch.equal(results[4][middle].isfinite(), exact[4][middle].isfinite())
        assert torch.equal(results[4][middle].isnan(), exact[4][middle].isnan())
        if which == "grad":  # the other branches do not read it
            for given, same in zip(results[1:4], clean[1:4], strict=True):
                torch.testing.assert_close(given, same, rtol=2**-7, atol=1e-2)


# one wave of samples, and several
@pytest.mark.parametrize("batch, channels, size", ((1, 64, 9), (5, 64, 14), (2, 512, 7)))
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_the_same_gradients_for_any_number_of_threads_in_pairs(batch, channels, size, layout):
    x, weights = operands(batch, channels, size, layout)
    grads = maps(x, layout)
    exact = exact_gradients(x, weights, grads)
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(gradients(x, weights, grads))
    for expected, first, *others in zip(exact, *results, strict=True):
        assert_same_numbers(first, expected)
        assert all(torch.equal(first, other) for other in others)


def test_samples_in_several_waves_give_the_same_gradients_in_pairs():
    """The first samples, whose sums others add to, fill more memory than a wave takes."""
    layout = PLAIN_LAYOUTS[1]
    x, weights = operands(9, 64, 40, layout)
    grads = maps(x, layout)
    exact = exact_gradients(x, weights, grads)
    results = []
    for count in (1, 4):
        torch.set_num_threads(count)
        results.append(gradients(x, weights, grads))
    for expected, one, four in zip(exact, *results, strict=True):
        assert_same_numbers(one, expected)
        assert torch.equal(one, four)


@pytest.mark.parametrize("wanted", ((0,), (1, 2, 3, 4), (3,), (0, 2)))
def test_some_of_the_gradients_are_those_of_all_in_pairs(wanted):
    x, weights = operands(3, 64, 9, PLAIN_LAYOUTS[1])
    grads = maps(x, PLAIN_LAYOUTS[1])
    everything = gradients(x, weights, grads)
    some = gradients(x, weights, grads, [i in wanted for i in range(5)])
    for i in wanted:
        assert torch.equal(some[i], everything[i])
    grads[2][0, 0, 0, 0] = float("nan")
    everything = gradients(x, weights, grads)
    for i, some in enumerate(gradients(x, weights, grads, [i in wanted for i in range(5)])):
        if i in wanted:
            torch.testing.assert_close(some, everything[i], rtol=0, atol=0, equal_nan=True)


def test_an_image_that_no_tap_meets_gets_zeros_in_bfloat16():
    """Both outputs' taps lie in the padding, so there is no phase to choose kernels for."""
    x, grads = torch.ones(2, 16, 1, 1).bfloat16(), [torch.ones(2, 16, 2, 2).bfloat16()] * 2
    weights = [torch.ones(16, 16, 1, 1).bfloat16()] * 2
    results = BACKWARD(grads, x, weights, [1, 1], 2, [1, 1], [1, 1], [True] * 3)
    for result in (results[0], *results[1]):
        assert (result == 0).all()


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("packed", (False, True), ids=("", "packed"))
def test_a_sample_with_infinities_leaves_the_others_of_a_module_alone_in_pairs(layout, packed):
    torch.manual_seed(0)
    module = FusedPSAModule(64, 64).bfloat16().eval()
    x, _ = operands(5, 64, 10, layout)
    with torch.no_grad():
        expected = module(x)
        if packed:
            module.prepack(10, 10)
            assert torch.equal(module(x), expected)
        x[3, 5, 4, 4] = float("inf")
        out = module(x)
    others = [0, 1, 2, 4]
    atol = 2.0**-7 * expected.abs().max().item()
    torch.testing.assert_close(out[others], expected[others], rtol=2.0**-7, atol=atol)
    assert not out[3].isfinite().any()  # the means of all branches are infinite or NaN


# samples alone, samples shared by threads, and units of more weights than a cache holds
@pytest.mark.parametrize("batch, channels, size", ((1, 64, 9), (5, 64, 14), (2, 512, 7)))
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_the_same_for_any_number_of_threads_in_pairs(batch, channels, size, layout):
    x, weights = operands(batch, channels, size, layout)
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        feats, pooled = spc_conv(x, weights, GROUPS, padding=PADDING)
        results.append([*feats, pooled])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_an_odd_number_of_channels_of_a_group_runs_without_pairs():
    x = torch.randn(2, 8, 7, 7).bfloat16()
    weights = [torch.randn(8, 8 // groups, 3, 3).bfloat16() for groups in (1, 8)]
    feats, _ = spc_conv(x, weights, [1, 8], padding=[1, 1])
    for feat, weight, groups in zip(feats, weights, (1, 8), strict=True):
        expected = F.conv2d(x.double(), weight.double(), None, 1, 1, 1, groups)
        torch.testing.assert_close(feat.double(), expected, rtol=2.0**-8, atol=1e-4)


@pytest.mark.parametrize("odd", ("x", "weights", "both"))
def test_operands_at_odd_places_of_memory_in_pairs(odd):
    """A pair of channels need not begin at a multiple of four bytes."""
    x, weights = operands(2, 64, 7, PLAIN_LAYOUTS[1])
    grads = maps(x, PLAIN_LAYOUTS[1])
    expected, _ = spc_conv(x, weights, GROUPS, padding=PADDING)
    expected_gradients = gradients(x, weights, grads)

    def moved(t: torch.Tensor) -> torch.Tensor:
        wide = torch.zeros(t.shape[0], t.shape[2], t.shape[3], t.shape[1] + 3, dtype=t.dtype)
        result = wide.permute(0, 3, 1, 2)[:, 1:-2]
        assert result.data_ptr() % 4 == 2
        return result.copy_(t)

    if odd != "weights":
        x = moved(x)
    if odd != "x":
        weights = [moved(w) for w in weights]
    feats, _ = spc_conv(x, weights, GROUPS, padding=PADDING)
    results = feats + gradients(x, weights, list(map(moved, grads)))
    for result, same in zip(results, expected + expected_gradients, strict=True):
        assert torch.equal(result, same)


@pytest.mark.parametrize("groups, outputs", ((1, 32), (4, 16), (8, 8)))
@pytest.mark.parametrize("order", ("contiguous", "outputs inside", "at an odd place"))
def test_weights_of_one_tap_in_pairs(groups, outputs, order):
    """Any of their dimensions may be dense in memory."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 5, 5, generator=generator).bfloat16()
    weight = torch.randn(outputs, 64 // groups, 1, 1, generator=generator).bfloat16()
    if order == "outputs inside":
        weight = weight.flatten(1).t().contiguous().t()[:, :, None, None]
        assert weight.stride()[:2] == (1, outputs)
    elif order == "at an odd place":
        flat = torch.zeros(weight.numel() + 1, dtype=torch.bfloat16)
        weight = flat[1:].view(weight.shape).copy_(weight)
        assert weight.data_ptr() % 4 == 2
    feats, _ = spc_conv(x, [weight] * 2, [groups] * 2, padding=[0, 0])
    expected = F.conv2d(x.double(), weight.double(), None, 1, 0, 1, groups)
    torch.testing.assert_close(feats[1].double(), expected, rtol=2.0**-8, atol=1e-4)


def test_an_infinity_times_a_denormal_number_in_pairs():
    x = torch.ones(1, 64, 4, 4).bfloat16()
    x[0, 3, 1, 1] = float("inf")
    weights = [torch.full((16, 64, 1, 1), 2.0**-130).bfloat16()] * 2
    feats, _ = spc_conv(x, weights, [1, 1], padding=[0, 0])
    assert feats[0].isinf().nonzero().tolist() == [[0, c, 1, 1] for c in range(16)]
    assert not feats[0].isnan().any()


@pytest.mark.parametrize("which", ("x", "grad"))
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_an_infinity_times_a_denormal_number_in_the_gradients_of_weights(which, layout):
    """Instructions that take the denormal number as zero would make NaN of the product."""
    x, weights = operands(1, 64, 9, layout)
    grads = maps(x, layout)
    infinite, others = (x, grads) if which == "x" else (grads[3], [x])
    for t in others:
        t.fill_(2.0**-130)
    infinite.fill_(1)[0, 5, 4, 4] = float("inf")
    result = gradients(x, weights, grads, [False] + [True] * 4)[4]
    own = (1, 1) if which == "x" else 5  # groups of four channels and one output
    assert result[own][..., 4, 4].isposinf().all()
    assert not result.isnan().any()


def test_torch_and_the_operators_take_turns_with_the_tiles_of_matrices_in_pairs():
    """oneDNN's kernels set AMX's tiles too, and may remember how."""
    x, weights = operands(2, 64, 12, PLAIN_LAYOUTS[1])
    a, b = (torch.randn(96, 96).bfloat16() for _ in range(2))
    kernel = torch.randn(64, 64, 3, 3).bfloat16()

    def ours():
        return spc_conv(x, weights, GROUPS, padding=PADDING)[0]

    def theirs():
        return [a @ b, F.linear(a, b), F.conv2d(x, kernel, padding=1)]

    expected, others = ours(), theirs()
    for _ in range(3):
        for result, same in zip(theirs() + ours(), others + expected, strict=True):
            assert torch.equal(result, same)


def test_denormal_numbers_are_zeros_to_pairs():
    """vdpbf16ps and tdpbf16ps flush them; the other kernels keep them."""
    tiny = 2.0**-130
    x = torch.full((1, 64, 4, 4), tiny).bfloat16()
    weights = [torch.ones(16, 64, 1, 1).bfloat16()] * 2
    feats, _ = spc_conv(x, weights, [1, 1], padding=[0, 0])
    in_pairs = _C.conv_plan(
        in_channels=64, out_channels=16, groups=1, kernel=(1, 1), height=4, width=4,
        dtype="bfloat16",
    )["pairs"]  # fmt: skip
    assert x.double()[0, 0, 0, 0] == tiny
    assert (feats[0].double() == (0 if in_pairs else 64 * tiny)).all()
