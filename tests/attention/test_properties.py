"""Random shapes, dtypes, layouts and weights, for cases that no table has."""

import math

import pytest
import torch
from support import convolutions
from support.cases import DTYPES, LAYOUTS, ORDERS, WEIGHT_KINDS, Case, make_inputs, strides_of
from support.tolerance import accumulation_type, check, make_cotangents, run

from epsa_fused import psa_attention

pytest.importorskip("hypothesis", reason="a GPU machine may lack it")
from hypothesis import given, settings
from hypothesis import strategies as st

bounded = settings(deadline=None, derandomize=True, max_examples=500, database=None)


@st.composite
def cases(draw) -> Case:
    """Up to about ten thousand elements, so that threads share some of them."""
    branches = draw(st.integers(2, 8))
    channels = draw(st.integers(1, 80))
    height = draw(st.integers(1, 20))
    width = draw(st.integers(1, min(20, 1 + 4000 // (channels * height))))
    return Case(
        "random",
        draw(st.integers(0, 5)),
        branches,
        channels,
        height,
        width,
        draw(st.integers(1, 9)),
    )


@st.composite
def calls(draw) -> dict:
    """The arguments of make_inputs."""
    dtype = draw(st.sampled_from(DTYPES))
    weight_dtypes = (dtype, accumulation_type(dtype))
    return {
        "case": draw(cases()),
        "dtype": dtype,
        "layout": draw(st.sampled_from(LAYOUTS)),
        "kind": draw(st.sampled_from(WEIGHT_KINDS)),
        "weight_dtype": draw(st.sampled_from(weight_dtypes)),
        "seed": draw(st.integers(0, 2**31)),
    }


@pytest.mark.emulated
@pytest.mark.random
@bounded
@given(call=calls(), order=st.sampled_from(ORDERS), loss_on=st.sampled_from(("out", "a", "both")))
def test_any_call_agrees_with_the_reference(call, order, loss_on):
    case = call["case"]
    grad_out, grad_attention = make_cotangents(case, call["dtype"], call["layout"].out_format)
    result = check(
        make_inputs(**call),
        grad_out if loss_on != "a" else None,
        grad_attention if loss_on != "out" else None,
        branch_order=order,
    )
    formats = (torch.contiguous_format, torch.channels_last)
    assert result["out"].stride() in [strides_of(case.out_shape, f) for f in formats]


@bounded
@given(call=calls(), order=st.sampled_from(ORDERS), threads=st.sampled_from((2, 3, 4)))
def test_any_call_is_bitwise_the_same_for_any_number_of_threads(call, order, threads):
    inputs = make_inputs(**call)
    cotangents = make_cotangents(call["case"], call["dtype"], call["layout"].out_format)
    torch.set_num_threads(1)
    expected = run(psa_attention, inputs, *cotangents, branch_order=order)
    torch.set_num_threads(threads)
    actual = run(psa_attention, inputs, *cotangents, branch_order=order)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# ---- convolutions ----


@st.composite
def convolution_calls(draw) -> convolutions.Call:
    """Branches of different kernels whose paddings give the same output size."""
    groups = [draw(st.sampled_from((1, 1, 2, 3, 4, 8, 16))) for _ in range(draw(st.integers(1, 8)))]
    common = math.lcm(*groups)
    in_channels = common * draw(st.integers(1, max(1, 40 // common)))
    channels = common * draw(st.integers(1, max(1, 40 // common)))
    height, width = draw(st.integers(1, 17)), draw(st.integers(1, 30))
    # each kernel reaches `base` + 2 * `more` pixels, with the padding `padding` + `more`
    base = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    least = max(base[0] - height + 1, base[1] - width + 1, 0) // 2
    padding = draw(st.integers(least, least + 3))
    branches = []
    for g in groups:
        more, dilation = draw(st.integers(0, 4)), draw(st.integers(1, 3))
        fits = all((b + 2 * more - 1) % dilation == 0 for b in base)
        dilation = dilation if fits else 1
        kernel = tuple((b + 2 * more - 1) // dilation + 1 for b in base)
        branches.append(convolutions.Branch(kernel, g, padding + more, dilation))
    batch, stride = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    sizes = (in_channels, channels, height, width)
    return convolutions.Call("random", batch, *sizes, tuple(branches), stride)


@st.composite
def convolution_inputs(draw) -> dict:
    """The arguments of convolutions.make_inputs."""
    return {
        "call": draw(convolution_calls()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(st.sampled_from(convolutions.LAYOUTS)),
        "weight_layout": draw(st.sampled_from(convolutions.WEIGHT_LAYOUTS)),
        "grad_layout": draw(st.sampled_from(convolutions.LAYOUTS)),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(bounded, max_examples=300)
@given(given_inputs=convolution_inputs(), bits=st.integers(0, 2**9 - 1))
def test_any_convolutions_agree_with_the_reference(given_inputs, bits):
    call = given_inputs["call"]
    mask = [bool(bits >> i & 1) for i in range(1 + len(call.branches))]
    results = convolutions.check(call, convolutions.make_inputs(**given_inputs), mask)
    allowed = [
        convolutions.dense_strides(call.map_shape, f)
        for f in (torch.contiguous_format, torch.channels_last)
    ]
    assert all(results[f"feats[{s}]"].stride() in allowed for s in range(len(call.branches)))


@settings(bounded, max_examples=200)
@given(given_inputs=convolution_inputs(), threads=st.sampled_from((2, 3, 4)))
def test_any_convolutions_are_bitwise_the_same_for_any_number_of_threads(given_inputs, threads):
    call = given_inputs["call"]
    inputs = convolutions.make_inputs(**given_inputs)
    torch.set_num_threads(1)
    expected = convolutions.run_own(call, inputs)
    torch.set_num_threads(threads)
    assert all(map(torch.equal, convolutions.run_own(call, inputs), expected))
