"""The forward pass: its values, its outputs' dtypes and strides, and what it leaves alone."""

import pytest
import torch
from support.cases import (
    BY_NAME,
    CASES,
    CHANNELS_LAST,
    CONTIGUOUS,
    DTYPES,
    FORMATS,
    HALF_DTYPES,
    LAYOUTS,
    ORDERS,
    PLAIN_LAYOUTS,
    QUICK,
    QUICK_CASES,
    SMALL,
    WEIGHT_KINDS,
    Inputs,
    make_inputs,
    name_of,
    out_format,
    strides_of,
)
from support.memory import allocations
from support.tolerance import (
    accumulation_type,
    assert_close,
    assert_no_worse,
    check,
    special_values,
)

from epsa_fused import psa_attention, psa_attention_reference

pytestmark = pytest.mark.emulated

OP = torch.ops.epsa_fused.psa_attention.default


@pytest.mark.per_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("case", QUICK_CASES, ids=name_of)
def test_every_shape(case, layout, dtype, device):
    result = check(make_inputs(case, dtype, layout, device=device))
    out, attention = result["out"], result["attention"]
    assert (out.dtype, out.shape) == (dtype, case.out_shape)
    assert out.stride() == strides_of(case.out_shape, out_format(case, layout))
    assert (attention.dtype, attention.shape) == (accumulation_type(dtype), case.attention_shape)
    assert attention.is_contiguous()


@pytest.mark.per_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize(
    "case", (BY_NAME["stage3"], pytest.param(BY_NAME["not_square"], marks=QUICK)), ids=name_of
)
def test_every_layout(case, layout, dtype, device):
    out = check(make_inputs(case, dtype, layout, device=device))["out"]
    assert out.stride() == strides_of(case.out_shape, layout.out_format)


@pytest.mark.per_isa
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", WEIGHT_KINDS, ids=name_of)
@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_every_kind_of_weights(case, kind, order, device):
    check(make_inputs(case, layout=CONTIGUOUS, kind=kind, device=device), branch_order=order)


@pytest.mark.per_isa
@pytest.mark.parametrize("kind", WEIGHT_KINDS, ids=name_of)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
def test_float32_weights_beside_half_precision_features(dtype, kind, device):
    inputs = make_inputs(
        BY_NAME["stage3"], dtype, kind=kind, weight_dtype=torch.float32, device=device
    )
    assert check(inputs)["out"].dtype == dtype


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES[:4], ids=name_of)
def test_half_precision_is_no_worse_than_eager(case, dtype, device):
    """The promise to users. The rule of tolerance.py is stricter."""
    inputs = make_inputs(case, dtype, device=device)
    exact = psa_attention_reference(*inputs.double().args)
    assert_no_worse(psa_attention(*inputs.args), psa_attention_reference(*inputs.args), exact)


def test_one_channel_of_a_channels_last_convolution(device):
    """Chunks of one channel are not dense; they count as channels_last."""
    case = BY_NAME["one_channel"]
    chunks = next(layout for layout in LAYOUTS if layout.name == "chunks_channels_last")
    out = check(make_inputs(case, layout=chunks, device=device))["out"]
    assert out.stride() == strides_of(case.out_shape, torch.channels_last)


def test_a_draw_between_layouts_is_contiguous_whichever_comes_first(device):
    inputs = make_inputs(BY_NAME["stage3"], layout=CHANNELS_LAST, device=device)
    feats = [f.contiguous() if s in (1, 2) else f for s, f in enumerate(inputs.feats)]
    assert check(Inputs(feats, inputs.weights))["out"].is_contiguous()


# ---- pooled: sums that somebody else made already ----


@pytest.mark.per_isa
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("case", (*SMALL, BY_NAME["large_planes"]), ids=name_of)
def test_pooled_is_the_mean_of_each_map(case, layout, device):
    inputs = make_inputs(case, layout=layout, device=device)
    _, pooled, _ = OP(*inputs.args, True)
    means = torch.stack([f.mean((2, 3)) for f in inputs.double().feats], 1)
    assert_close(pooled, means, torch.float32)


@pytest.mark.per_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_a_given_pooled_takes_the_place_of_the_mean(layout, dtype, device):
    case = BY_NAME["stage3"]
    inputs = make_inputs(case, dtype, layout, device=device)
    given = torch.randn(case.attention_shape, dtype=accumulation_type(dtype), device=device)
    # strided, as a convolution's epilogue may leave it
    given = given.transpose(1, 2).contiguous().transpose(1, 2)
    before = given.clone()
    out, pooled, attention = OP(*inputs.args, True, given)
    assert torch.equal(given, before)
    assert torch.equal(pooled, given) and pooled.data_ptr() != given.data_ptr()

    exact = inputs.double()
    as_maps = [given[:, s, :, None, None].double() for s in range(case.branches)]
    _, expected = psa_attention_reference(as_maps, *exact.weights, return_attention=True)
    assert_close(attention, expected, accumulation_type(dtype))
    products = [f * expected[:, s, :, None, None] for s, f in enumerate(exact.feats)]
    assert_close(out, torch.cat(products[::-1], 1), accumulation_type(dtype))


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_the_ops_own_pooled_given_back_changes_nothing(layout, device):
    inputs = make_inputs(BY_NAME["stage3"], layout=layout, device=device)
    first = OP(*inputs.args, True)
    second = OP(*inputs.args, True, first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- NaN and Inf ----


@pytest.mark.per_isa
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("where", ("feats[1]", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"))
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_and_inf_travel_as_in_eager(dtype, layout, where, value, device):
    inputs = make_inputs(BY_NAME["odd"], dtype, layout, device=device)
    target = dict(zip(inputs.names(), inputs.tensors(), strict=True))[where]
    target[(1,) * target.dim()] = value
    for fused, eager in zip(
        psa_attention(*inputs.args, return_attention=True),
        psa_attention_reference(*inputs.args, return_attention=True),
        strict=True,
    ):
        assert torch.equal(special_values(fused), special_values(eager))


# ---- memory ----


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_nothing_of_the_features_size_is_allocated_but_the_output(layout):
    """Maps that are not read in place cost one copy each, and no more."""
    case = BY_NAME["stage1"]
    inputs = make_inputs(case, layout=layout)
    out = case.batch * case.branches * case.channels * case.pixels * 4
    one_map = out // case.branches
    expected = [out]
    if not layout.in_place:
        copies = {"mixed": 1, "mixed_draw": 2}.get(layout.name, case.branches)
        expected += [one_map] * copies
    with torch.no_grad():
        sizes = allocations(lambda: psa_attention(*inputs.args))
    assert sorted(s for s in sizes if s >= one_map) == sorted(expected)
    assert sum(s for s in sizes if s < one_map) < one_map


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_half_precision_maps_are_not_widened_in_memory(memory_format):
    case = BY_NAME["stage1"]
    inputs = make_inputs(case, torch.bfloat16, weight_dtype=torch.float32)
    feats = [f.contiguous(memory_format=memory_format) for f in inputs.feats]
    out = 2 * case.batch * case.branches * case.channels * case.pixels
    sizes = allocations(lambda: psa_attention(feats, *inputs.weights))
    assert [s for s in sizes if s >= out // case.branches] == [out]
