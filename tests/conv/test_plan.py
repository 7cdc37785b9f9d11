"""Which method computes a convolution on the CPU: a pure function of sizes, dtype and
instruction set."""

import pytest
from support.convolutions import STAGES

from epsa_fused import _C

ISAS = ("baseline", "avx2", "avx512")
PAIRS = ("avx512_bf16", "amx_bf16")
LANES = {"baseline": 4, "avx2": 8, "avx512": 16}
GOOD = {
    "in_channels": 64,
    "out_channels": 16,
    "groups": 4,
    "kernel": (5, 5),
    "height": 56,
    "width": 56,
    "stride": 1,
    "padding": 2,
    "dilation": 1,
    "dtype": "float32",
    "isa": "avx512",
}


def plan(**changes) -> dict:
    return _C.conv_plan(**(GOOD | changes))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("call", STAGES, ids=str)
def test_no_branch_of_epsanet_goes_to_the_library(call, isa):
    for b in call.branches:
        for dtype in ("float32", "bfloat16", "float16"):
            chosen = plan(
                in_channels=call.in_channels,
                out_channels=call.channels,
                groups=b.groups,
                kernel=b.kernel,
                height=call.height,
                width=call.width,
                stride=call.stride,
                padding=b.padding,
                dtype=dtype,
                isa=isa,
            )
            # wide groups in lanes of outputs, narrow ones in lanes of inputs
            outputs = call.channels // b.groups
            expected = "broadcast" if outputs >= LANES[isa] else "dot"
            transformed = 16 * call.in_channels * outputs  # weights
            if b.kernel == (3, 3) and call.stride == 1 and transformed <= 2**18:
                expected = "winograd"
            assert chosen["method"] == expected, (b, dtype)


@pytest.mark.parametrize("isa", PAIRS)
@pytest.mark.parametrize("call", STAGES, ids=str)
def test_every_branch_of_epsanet_runs_in_pairs(call, isa):
    for b in call.branches:
        sizes = {
            "in_channels": call.in_channels,
            "out_channels": call.channels,
            "groups": b.groups,
            "kernel": b.kernel,
            "height": call.height,
            "width": call.width,
            "stride": call.stride,
            "padding": b.padding,
            "isa": isa,
        }
        chosen = plan(dtype="bfloat16", **sizes)
        outputs = call.channels // b.groups
        expected = "matrix" if isa == "amx_bf16" else "broadcast" if outputs >= 16 else "dot"
        assert chosen["pairs"] and chosen["method"] == expected, b
        for dtype in ("float32", "float16", "float64"):
            other = plan(dtype=dtype, **sizes)
            assert not other["pairs"]
            assert other == plan(dtype=dtype, **(sizes | {"isa": "avx512"}))


# inputs and outputs of a group; the tiles' pixels of a position
@pytest.mark.parametrize(
    ("ic", "oc", "change", "position"),
    (
        (64, 16, {}, 1),
        (64, 9, {}, 1),
        (32, 8, {}, 2),
        (32, 4, {}, 4),
        (16, 4, {}, 2),
        (4, 1, {}, 2),
        (2, 1, {}, 1),
        (16, 6, {}, 1),
        (32, 8, {"stride": 2}, 2),
        (64, 16, {"dilation": 2, "padding": 4}, 1),
        # outputs that would leave most of a tile idle, and pixels that are no neighbours
        (32, 3, {}, None),
        (32, 8, {"dilation": 2, "padding": 4}, None),
        (32, 8, {"stride": 3}, None),
        # lanes that would hold parts of two groups; half a pair
        (6, 4, {}, None),
        (3, 3, {}, None),
    ),
)
def test_what_fits_into_tiles_of_matrices(ic, oc, change, position):
    sizes = {"in_channels": 16 * ic, "out_channels": 16 * oc, "groups": 16}
    chosen = plan(dtype="bfloat16", isa="amx_bf16", **sizes, **change)
    assert chosen["pairs"] == (position is not None)
    if position:
        assert (chosen["method"], chosen["block"]) == ("matrix", position)
    else:
        assert chosen == plan(dtype="bfloat16", isa="avx512", **sizes, **change)


@pytest.mark.parametrize("width", (1, 5, 7, 14, 28, 56, 57, 100))
def test_rows_of_tiles_cover_an_output_row_with_little_waste(width):
    sizes = {"in_channels": 128, "out_channels": 32, "groups": 4}
    chosen = plan(dtype="bfloat16", isa="amx_bf16", width=width, **sizes)
    row = chosen["pixels"] * chosen["block"]
    tiles = -(-width // row)
    assert 1 <= chosen["pixels"] <= 16
    assert tiles == -(-width // (16 * chosen["block"]))
    assert tiles * row - width < tiles * chosen["block"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("change", "method"),
    (
        ({}, "winograd"),
        ({"groups": 2}, "winograd"),
        ({"stride": 2}, "broadcast"),
        ({"dilation": 2, "padding": 2}, "broadcast"),
        ({"kernel": (3, 5)}, "broadcast"),
        ({"kernel": (5, 5)}, "broadcast"),
        ({"in_channels": 66, "groups": 2}, "broadcast"),  # 33: not whole vectors
        # too few outputs: more products than there are pairs of pixels and taps
        ({"height": 3, "width": 3}, "broadcast"),
        ({"height": 56, "width": 1}, "broadcast"),
        ({"height": 6, "width": 6}, "winograd"),
        # transformed weights of 1 MiB, and of more
        ({"in_channels": 512}, "winograd"),
        ({"in_channels": 528}, "broadcast"),
    ),
    ids=str,
)
def test_where_winograd_pays(change, method, isa):
    wide = {"out_channels": 32, "groups": 1, "kernel": (3, 3), "padding": 1}
    assert plan(isa=isa, **(wide | change))["method"] == method


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("change", "kernel"),
    (({"dtype": "float64"}, False), ({"stride": 2}, True), ({"stride": 3}, False)),
    ids=("float64", "stride_2", "stride_3"),
)
def test_what_only_the_library_can(change, kernel, isa):
    assert (plan(isa=isa, **change)["method"] != "library") == kernel
    assert plan(isa=isa)["method"] != "library"


@pytest.mark.parametrize(
    ("ic", "oc", "methods"),
    (
        # inputs and outputs of a group; the methods with 4, 8 and 16 lanes
        (16, 16, ("broadcast", "broadcast", "broadcast")),
        (16, 4, ("broadcast", "dot", "dot")),
        (4, 4, ("broadcast", "dot", "dot")),
        (1, 1, ("dot", "dot", "dot")),
        (2, 1, ("dot", "dot", "dot")),
        (32, 3, ("dot", "dot", "dot")),
        # neither lanes of inputs, nor half of the lanes of outputs in use
        (3, 1, ("library", "library", "library")),
        (3, 2, ("broadcast", "library", "library")),
        (12, 5, ("broadcast", "broadcast", "library")),
        (12, 9, ("broadcast", "broadcast", "broadcast")),
    ),
)
def test_the_method_follows_from_the_channels_of_a_group(ic, oc, methods):
    for isa, method in zip(ISAS, methods, strict=True):
        for groups in (1, 3):
            chosen = plan(in_channels=groups * ic, out_channels=groups * oc, groups=groups, isa=isa)
            assert chosen["method"] == method, isa


@pytest.mark.parametrize("isa", ISAS)
def test_units_cover_every_output_channel(isa):
    for groups, ic, oc in ((1, 16, 40), (4, 16, 16), (5, 4, 4), (37, 1, 1), (3, 32, 3), (7, 2, 6)):
        chosen = plan(in_channels=groups * ic, out_channels=groups * oc, groups=groups, isa=isa)
        if chosen["method"] == "library":
            continue
        units, channels = chosen["units"], chosen["unit_channels"]
        covered = groups * oc if chosen["method"] == "dot" else oc
        of_a_group = units if chosen["method"] == "dot" else units // groups
        assert of_a_group * channels >= covered > (of_a_group - 1) * channels
        assert 1 <= chosen["strip"] <= 56


@pytest.mark.parametrize("isa", ISAS)
def test_a_tile_fits_into_the_registers(isa):
    registers = 32 if isa == "avx512" else 16
    for width in range(1, 60):
        for groups in (1, 2, 4, 8, 16):
            chosen = plan(groups=groups, width=width, isa=isa)
            if chosen["method"] != "library":
                pixels, block = chosen["pixels"], chosen["block"]
                assert pixels * block + min(pixels, block) + 1 <= registers


def test_a_plan_is_a_pure_function():
    assert plan() == plan()
    in_use = plan(isa=_C.cpu_isa())
    assert plan(isa=None) == in_use


BAD = (
    *(({name: 0}, rf"{name}: expected at least 1, got 0") for name in (
        "in_channels", "out_channels", "groups", "height", "width", "stride", "dilation")),
    ({"kernel": (0, 5)}, r"kernel\[0\]: expected at least 1, got 0"),
    ({"kernel": (5, -1)}, r"kernel\[1\]: expected at least 1, got -1"),
    ({"padding": -1}, r"padding: expected at least 0, got -1"),
    ({"padding": 2**63 - 1}, rf"padding: expected at most 2147483647, got {2**63 - 1}"),
    ({"dilation": 2**62}, rf"dilation: expected at most 2147483647, got {2**62}"),
    ({"groups": 3}, r"groups: expected a divisor of in_channels = 64 and out_channels = 16, got 3"),
    ({"out_channels": 18}, r"divisor of in_channels = 64 and out_channels = 18, got 4"),
    ({"height": 0}, r"height: expected at least 1, got 0"),
    ({"width": 3, "padding": 0}, r"the output would be empty, expected at least 1 x 1"),
    ({"dilation": 20}, r"the output would be empty, expected at least 1 x 1"),
    ({"isa": "sse2"}, r"isa: expected one of .*baseline.*avx2.*avx512.*, got '?sse2'?"),
    ({"dtype": "int8"}, r"dtype: expected one of .*float32.*, got '?int8'?"),
)  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        plan(**change)
