"""Random shapes, dtypes, layouts and weights: what nobody thought of putting in a table."""

import torch
from cases import DTYPES, LAYOUTS, ORDERS, WEIGHT_KINDS, Case, make_inputs, strides_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import accumulation_type, check, make_cotangents, run

from epsa_fused import psa_attention

bounded = settings(deadline=None, derandomize=True, max_examples=500, database=None)


@st.composite
def cases(draw) -> Case:
    """Up to some ten thousand elements, so that some are cut and dealt out to threads."""
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
