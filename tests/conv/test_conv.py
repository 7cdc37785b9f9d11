"""The convolutions of a PSA module (spc_conv): values, dtypes and strides, forward and backward."""

import pytest
import torch
from support.cases import DTYPES, HALF_DTYPES, marked, name_of
from support.convolutions import (
    BY_NAME,
    CALLS,
    CONTIGUOUS,
    FLAT_KERNELS,
    KERNELS,
    LAYOUTS,
    OP,
    PLAIN_LAYOUTS,
    STAGES,
    WEIGHT_LAYOUTS,
    Branch,
    Call,
    check,
    dense_strides,
    exact_and_magnitudes,
    make_inputs,
    maps_format,
    run,
    same,
    spc,
    sweep,
)
from support.memory import allocations
from support.tolerance import accumulation_type

from epsa_fused import _C
from epsa_fused.convolution import spc_conv


def everything(call: Call) -> list[bool]:
    """The output mask of all gradients."""
    return [True] * (1 + len(call.branches))


def check_kinds(call, layout, dtype, results, weights=None) -> None:
    """Dtypes and strides. A weight's gradient has those of torch.empty_like(weight)."""
    memory_format = maps_format(call, layout)
    for name, result in results.items():
        if name == "pooled":
            assert (result.dtype, result.is_contiguous()) == (accumulation_type(dtype), True)
            continue
        assert result.dtype == dtype, name
        if "weights" in name and weights is not None:
            like = weights[int(name[name.index("[") + 1])]
            assert result.stride() == torch.empty_like(like).stride(), name
            continue
        expected = torch.contiguous_format if "weights" in name else memory_format
        assert result.stride() == dense_strides(result.shape, expected), name


# ---- forward and backward ----


def marks(call: Call, dtype: torch.dtype):
    """EPSANet's large stages run in two dtypes, once: the library computes float64, and float16
    differs from bfloat16 in conversions alone, which all other calls meet."""
    if call not in STAGES:
        return pytest.mark.per_isa
    return () if dtype in (torch.float32, torch.bfloat16) else pytest.mark.slow


@pytest.mark.parametrize(
    ("call", "dtype"),
    [pytest.param(call, dtype, marks=marks(call, dtype)) for call in CALLS for dtype in DTYPES],
    ids=name_of,
)
def test_every_call(call, dtype):
    exact = None
    for layout in PLAIN_LAYOUTS:
        inputs = make_inputs(call, dtype, layout)
        exact = exact or exact_and_magnitudes(call, inputs)
        results = check(call, inputs, everything(call), exact=exact)
        check_kinds(call, layout, dtype, results)


@pytest.mark.parametrize(
    "kernel",
    marked(pytest.mark.per_isa, KERNELS + FLAT_KERNELS, lambda k: max(k) in (1, 2, 3, 5)),
    ids=lambda k: f"{k[0]}x{k[1]}",
)
def test_every_kind_of_branch(kernel):
    """All groups, strides and dilations. Images, paddings, dtypes and layouts take turns."""
    for turn, call in enumerate(sweep(kernel)):
        dtype = DTYPES[turn % 4]
        layout = PLAIN_LAYOUTS[turn // 4 % 2]
        inputs = make_inputs(call, dtype, layout)
        check_kinds(call, layout, dtype, check(call, inputs, everything(call)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("kernel", KERNELS + FLAT_KERNELS, ids=lambda k: f"{k[0]}x{k[1]}")
def test_every_kind_of_branch_and_every_image(kernel, layout, dtype):
    for call in sweep(kernel, thorough=True):
        inputs = make_inputs(call, dtype, layout)
        check_kinds(call, layout, dtype, check(call, inputs, everything(call)))


def test_the_sweep_meets_every_method_and_tile():
    """On every instruction set, so the tests above reach all kernels."""
    calls = [call for kernel in KERNELS + FLAT_KERNELS for call in sweep(kernel)] + list(CALLS)
    for isa in _C.build_info()["cpu_isas"]:
        plans = [
            _C.conv_plan(
                in_channels=call.in_channels,
                out_channels=call.channels,
                groups=b.groups,
                kernel=b.kernel,
                height=call.height,
                width=call.width,
                stride=call.stride,
                padding=b.padding,
                dilation=b.dilation,
                isa=isa,
            )
            for call in calls
            for b in call.branches
        ]
        assert {p["method"] for p in plans} == {"broadcast", "dot", "winograd", "library"}
        for method in ("broadcast", "dot"):
            for part, least in (("pixels", 5), ("block", 2)):
                assert len({p[part] for p in plans if p["method"] == method}) >= least


@pytest.mark.per_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_gradient_of_pixels_that_no_kernel_meets(dtype):
    call = Call("between", 2, 64, 32, 1, 1, (Branch((1, 1), 1, 1),), 2)
    inputs = make_inputs(call, dtype)
    for _ in range(5):
        used = [torch.full_like(inputs.x, torch.nan) for _ in range(4)]
        del used  # the allocator may reuse this memory in the next call
        check(call, inputs, everything(call))


@pytest.mark.per_isa
@pytest.mark.parametrize("seed", (2838, 4009))
def test_few_pixels_under_a_kernel(seed):
    """In a corner Winograd's sums exceed the few products of the result."""
    call = Call("corner", 1, 16, 32, 8, 8, (Branch((3, 3), 1, 2),))
    check(call, make_inputs(call, seed=seed), everything(call))
    call = Call("corner of the gradient", 1, 16, 32, 8, 8, (Branch((3, 3), 1, 0),))
    check(call, make_inputs(call, seed=seed), everything(call))


@pytest.mark.per_isa
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
@pytest.mark.parametrize(
    ("stride", "branches"),
    (
        (1, (same(3, 1), same(3, 2), same(5, 2))),
        (2, (Branch((5, 5), 1, 2), Branch((6, 6), 2, 2))),  # with gradients of 3x3 kernels
    ),
    ids=("stride_1", "stride_2"),
)
def test_values_of_very_different_sizes(dtype, stride, branches):
    call = Call("sizes", 2, 32, 64, 12, 10, branches, stride)
    inputs = make_inputs(call)
    generator = torch.Generator().manual_seed(0)

    def spread(t):
        scale = torch.randn(t.shape, generator=generator, dtype=torch.float64).clamp(-1, 1)
        return (t * 10 ** (2 * scale)).to(dtype)

    inputs = inputs.map(spread)
    check(call, inputs, everything(call))


# branches of each method, and one that the library computes
LAYOUT_CALLS = (
    Call("layouts", 3, 16, 32, 7, 9, (same(3, 1), same(5, 4), same(3, 16), same(1, 2))),
    Call("layouts_stride_2", 2, 20, 20, 8, 7, (same(3, 4), same(5, 1), same(1, 10)), 2),
)


@pytest.mark.per_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("call", LAYOUT_CALLS, ids=name_of)
def test_every_layout_of_x(call, layout, dtype):
    inputs = make_inputs(call, dtype, layout, grad_layout=CONTIGUOUS)
    check_kinds(call, layout, dtype, check(call, inputs, everything(call)))


@pytest.mark.per_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("weight_layout", WEIGHT_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("call", LAYOUT_CALLS, ids=name_of)
def test_every_layout_of_weights(call, weight_layout, dtype):
    inputs = make_inputs(call, dtype, CONTIGUOUS, weight_layout)
    results = check(call, inputs, everything(call))
    check_kinds(call, CONTIGUOUS, dtype, results, inputs.weights)


@pytest.mark.parametrize(
    "dtype", marked(pytest.mark.per_isa, DTYPES, lambda t: t == torch.float32), ids=name_of
)
@pytest.mark.parametrize("grad_layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_every_layout_of_gradients(layout, grad_layout, dtype):
    call = LAYOUT_CALLS[0]
    inputs = make_inputs(call, dtype, layout, grad_layout=grad_layout)
    check_kinds(call, layout, dtype, check(call, inputs, everything(call)))


@pytest.mark.parametrize("weight_layout", WEIGHT_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("name", ("one_pixel", "one_channel_in", "one_of_each", "row", "column"))
def test_layouts_of_single_pixels_and_channels(name, weight_layout):
    """Where a size is 1 its stride can be anything."""
    call = BY_NAME[name]
    formats = (torch.contiguous_format, torch.channels_last)
    allowed = [dense_strides(call.map_shape, f) for f in formats]
    for layout in LAYOUTS:
        results = check(call, make_inputs(call, torch.float32, layout, weight_layout))
        assert all(results[f"feats[{s}]"].stride() in allowed for s in range(len(call.branches)))


def test_branches_that_share_one_weight():
    call = Call("shared", 2, 16, 16, 6, 7, (same(3, 1), same(3, 1)))
    inputs = make_inputs(call)
    (first, second), pooled = spc(call, inputs.x, [inputs.weights[0]] * 2)
    assert torch.equal(first, second) and torch.equal(pooled[:, 0], pooled[:, 1])
    assert first.data_ptr() != second.data_ptr()


def test_dilation_is_one_by_default():
    call = LAYOUT_CALLS[0]
    inputs = make_inputs(call)
    expected, _ = spc(call, inputs.x, inputs.weights)
    given = {"stride": call.stride, "padding": call.padding}
    feats, _ = spc_conv(inputs.x, tuple(inputs.weights), tuple(call.groups), **given)
    assert all(torch.equal(a, b) for a, b in zip(feats, expected, strict=True))


# ---- the means ----


@pytest.mark.per_isa
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
def test_pooled_is_the_mean_of_the_unrounded_maps(dtype):
    """Every pixel is 100 and a quarter of a rounding step, which the rounded map loses. By both
    methods and the library."""
    step = 100 * torch.finfo(dtype).eps
    branches = tuple(Branch((1, 1), g, 0) for g in (1, 2))
    for stride in (1, 3):
        call = Call("quarter", 2, 16, 18, 9, 9, branches, stride)
        x = torch.zeros(call.x_shape, dtype=dtype)
        x[:, ::8] = 100
        x[:, 1::8] = step / 4  # exact: a power of two times 25
        weights = [torch.ones(shape, dtype=dtype) for shape in call.weight_shapes]
        weights[0][:, 2:] = 0
        feats, pooled = spc(call, x, weights)
        assert all((f == 100).all() for f in feats)
        assert torch.equal(pooled, torch.full_like(pooled, 100 + step / 4))


# ---- the output mask ----

MASK_CALL = Call("masks", 3, 16, 16, 7, 6, (same(3, 1), same(5, 4), same(3, 16)))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("bits", range(16))
def test_output_mask(bits, dtype):
    """A wanted gradient has the bits that it has among all. The others are empty."""
    mask = [bool(bits >> i & 1) for i in range(4)]
    inputs = make_inputs(MASK_CALL, dtype)
    results = check(MASK_CALL, inputs, mask)
    whole = run(MASK_CALL, inputs, [True] * 4)
    for name, wanted in zip(list(whole)[-4:], mask, strict=True):
        if wanted:
            assert torch.equal(results[name], whole[name]), name


# ---- NaN and infinity ----


@pytest.mark.per_isa
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_special_values_of_x_reach_the_outputs_whose_windows_hold_them(dtype, layout, value):
    """Other outputs of the same vector, the next group or row stay finite."""
    call = Call("special", 2, 16, 32, 6, 7, (same(3, 1), same(5, 4), same(3, 16), same(3, 2)))
    for pixel in ((0, 0, 0), (5, 3, 6), (15, 5, 0), (10, 5, 6)):
        inputs = make_inputs(call, dtype, layout)
        inputs.x[(1, *pixel)] = value
        feats, pooled = spc(call, inputs.x, inputs.weights)
        mark = torch.zeros(call.x_shape)
        mark[(1, *pixel)] = 1
        marks, _ = spc(call, mark, [torch.ones(shape) for shape in call.weight_shapes])
        for s, (f, touched) in enumerate(zip(feats, marks, strict=True)):
            assert torch.equal(~f.isfinite(), touched > 0), (s, pixel)
            assert torch.equal(~pooled[:, s].isfinite(), (touched > 0).any((2, 3))), (s, pixel)


@pytest.mark.per_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_special_values_of_a_weight_stay_in_their_channel(dtype):
    call = Call("special", 2, 16, 32, 6, 7, (same(3, 1), same(5, 4), same(3, 16), same(3, 2)))
    inputs = make_inputs(call, dtype)
    for w in inputs.weights:
        w[7, 0, 1, 1] = float("nan")
    feats, pooled = spc(call, inputs.x, inputs.weights)
    for s, f in enumerate(feats):
        assert f[:, 7, 1:-1, 1:-1].isnan().all()
        assert f[:, :7].isfinite().all() and f[:, 8:].isfinite().all()
        assert pooled[:, s, 7].isnan().all()
        assert pooled[:, s, :7].isfinite().all() and pooled[:, s, 8:].isfinite().all()


# ---- memory ----


def test_results_share_no_memory():
    call = LAYOUT_CALLS[0]
    inputs = make_inputs(call)
    results = run(call, inputs, everything(call))
    tensors = [*results.values(), *inputs.tensors(), *inputs.grads]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
def test_little_memory_is_allocated_beside_the_maps(dtype, layout):
    """Packed weights, and one padded image in float32 and one tile buffer for each thread."""
    call = Call("memory", 4, 64, 64, 40, 40, (same(3, 1), same(5, 4), same(7, 8), same(9, 16)))
    inputs = make_inputs(call, dtype, layout)
    torch.set_num_threads(2)
    with torch.no_grad():
        sizes = allocations(lambda: OP(inputs.x, inputs.weights, *call.settings))
    one_map = call.batch * call.channels * 40 * 40 * inputs.x.element_size()
    image = 64 * 40 * (40 + 2 * 4 + 2) * 4
    weights = sum(w.numel() for w in inputs.weights) * 4
    assert sizes.count(one_map) == 4
    assert sum(sizes) - 4 * one_map < 2 * 1.2 * image + 1.5 * weights + 2 * 2**17
