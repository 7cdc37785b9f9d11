"""What spc_conv and its backward refuse."""

import torch
from support.convolutions import BACKWARD, OP, Call, make_inputs, same
from support.errors import (
    HERE,
    Arguments,
    Change,
    Refusals,
    at,
    both,
    item,
    on_meta,
    put,
    raising,
    shaped,
    tensors,
)
from torch import Tensor

# 3 branches of [2, 8, 6, 7] from x [2, 12, 6, 7]
CALL = Call("good", 2, 12, 8, 6, 7, (same(3, 1), same(5, 2), same(3, 4)))
SETTINGS = ("groups", "stride", "padding", "dilation")


def forward(device: str) -> Arguments:
    inputs = make_inputs(CALL).map(lambda t: t.to(device))
    settings = dict(zip(SETTINGS, CALL.settings, strict=True))
    return {"x": inputs.x, "weights": inputs.weights} | settings


def backward(device: str) -> Arguments:
    grads = [g.to(device) for g in make_inputs(CALL).grads]
    return {"grad_feats": grads} | forward(device) | {"output_mask": [True] * 4}


def cut(name: str) -> Change:
    return at(name, lambda given: given[:-1])


def weight(index: int, *shape: int) -> Change:
    return item("weights", index, shaped(*shape))


def number(name: str, index: int, value: int) -> Change:
    return item(name, index, lambda _: value)


def branches(count: int) -> Change:
    """So many equal branches."""
    ones = both(*(put(name, [1] * count) for name in ("groups", "padding", "dilation")))
    few = both(*(at(name, lambda given: given[:1] * count) for name in ("weights", "grad_feats")))
    return both(ones, few, put("output_mask", [True] * (count + 1)))


HUGE = 2**63 - 1

BAD = raising(
    ValueError,
    {
        "no_branch": (branches(0), r"weights has 0 branches, expected 1 to 8"),
        "nine_branches": (branches(9), r"weights has 9 branches, expected 1 to 8"),
        "one_weight_less": (cut("weights"),
            r"groups has 3 entries, expected 2, one for each of the weights"),
        "groups_short": (cut("groups"), r"groups has 2 entries, expected 3, one for"),
        "padding_short": (cut("padding"), r"padding has 2 entries, expected 3, one for"),
        "dilation_short": (cut("dilation"), r"dilation has 2 entries, expected 3, one for"),
        "groups_long": (at("groups", lambda g: [*g, 1]), r"groups has 4 entries, expected 3"),
        "rank_3": (at("x", lambda t: t[0]),
            r"x has shape \[12, 6, 7\], expected 4 dimensions \[N, C, H, W\]"),
        "rank_5": (at("x", lambda t: t[None]),
            r"x has shape \[1, 2, 12, 6, 7\], expected 4 dimensions"),
        "no_channels": (at("x", lambda t: t[:, :0]),
            r"x has shape \[2, 0, 6, 7\], expected at least one channel and a spatial size of at "
            r"least 1 x 1 \(only the batch may be empty\)"),
        "no_rows": (at("x", lambda t: t[:, :, :0]),
            r"x has shape \[2, 12, 0, 7\], expected.*1 x 1"),
        "no_columns": (at("x", lambda t: t[..., :0]),
            r"x has shape \[2, 12, 6, 0\], expected.*1 x 1"),
        "stride_0": (put("stride", 0), r"stride is 0, expected at least 1"),
        "stride_negative": (put("stride", -2), r"stride is -2, expected at least 1"),
        "groups_0": (number("groups", 1, 0), r"groups\[1\] is 0, expected at least 1"),
        "groups_negative": (number("groups", 2, -4), r"groups\[2\] is -4, expected at least 1"),
        "padding_negative": (number("padding", 1, -1), r"padding\[1\] is -1, expected at least 0"),
        "dilation_0": (number("dilation", 0, 0), r"dilation\[0\] is 0, expected at least 1"),
        "dilation_negative": (number("dilation", 2, -1),
            r"dilation\[2\] is -1, expected at least 1"),
        "groups_huge": (number("groups", 1, HUGE),
            rf"groups\[1\] is {HUGE}, expected at most 2147483647"),
        "padding_huge": (number("padding", 1, HUGE),
            rf"padding\[1\] is {HUGE}, expected at most 2147483647"),
        "dilation_huge": (number("dilation", 1, HUGE),
            rf"dilation\[1\] is {HUGE}, expected at most 2147483647"),
        "weight_rank": (weight(1, 8, 6, 5),
            r"weights\[1\] has shape \[8, 6, 5\], expected 4 dimensions \[C, in_channels / "
            r"groups, kernel_h, kernel_w\]"),
        "weight_channels": (weight(1, 8, 12, 5, 5),
            r"weights\[1\] has shape \[8, 12, 5, 5\], expected 12 / 2 channels in its second "
            r"dimension: x has 12 channels and groups\[1\] is 2"),
        "groups_do_not_divide": (number("groups", 1, 5),
            r"weights\[1\] has shape \[8, 6, 5, 5\], expected 12 / 5 channels in its second "
            r"dimension"),
        "outputs_of_groups": (both(weight(2, 8, 4, 3, 3), number("groups", 2, 3)),
            r"weights\[2\] has shape \[8, 4, 3, 3\], expected a multiple of groups\[2\] = 3 "
            r"output channels"),
        "outputs_differ": (weight(1, 10, 6, 5, 5),
            r"weights\[1\] has shape \[10, 6, 5, 5\], expected 8 output channels, as weights\[0\] "
            r"has"),
        "no_outputs": (weight(0, 0, 12, 3, 3),
            r"weights\[0\] has shape \[0, 12, 3, 3\], expected no empty dimension"),
        "no_taps": (weight(0, 8, 12, 3, 0),
            r"weights\[0\] has shape \[8, 12, 3, 0\], expected no empty dimension"),
        "output_empty": (both(weight(1, 8, 6, 3, 8), number("padding", 1, 0)),
            r"the output of branch 1 would be empty: x is 6 x 7 with padding 0, the kernel 3 x 8 "
            r"with dilation 1; expected an output of at least 1 x 1"),
        "dilated_output_empty": (number("dilation", 2, 5),
            r"the output of branch 2 would be empty: x is 6 x 7 with padding 1, the kernel 3 x 3 "
            r"with dilation 5; expected"),
        "outputs_of_other_size": (number("padding", 2, 2),
            r"the output of branch 2 is 8 x 9, expected 6 x 7, that of branch 0"),
    },
) | raising(
    TypeError,
    {
        "integer": (tensors(Tensor.int),
            r"x has dtype Int, expected Float, Double, BFloat16 or Half"),
        "complex": (tensors(lambda t: t.to(torch.complex64)),
            r"x has dtype ComplexFloat, expected Float, Double, BFloat16 or Half"),
        "float8": (tensors(lambda t: t.to(torch.float8_e4m3fn)),
            r"x has dtype Float8_e4m3fn, expected Float, Double, BFloat16 or Half"),
        "double_weight": (item("weights", 1, Tensor.double),
            r"weights\[1\] has dtype Double, expected Float, the dtype of x"),
        "half_x": (at("x", Tensor.half),
            r"weights\[0\] has dtype Float, expected Half, the dtype of x"),
    },
)  # fmt: skip

BAD_BACKWARD = raising(
    ValueError,
    {
        "grads_short": (cut("grad_feats"), r"grad_feats has 2 entries, expected 3, one for each"),
        "grad_shape": (
            item("grad_feats", 1, lambda g: g[:, 1:]),
            r"grad_feats\[1\] has shape \[2, 7, 6, 7\], expected \[2, 8, 6, 7\]",
        ),
        "grad_rank": (
            item("grad_feats", 2, lambda g: g[0]),
            r"grad_feats\[2\] has shape \[8, 6, 7\], expected \[2, 8, 6, 7\]",
        ),
        "mask_short": (
            cut("output_mask"),
            r"output_mask has 3 entries, expected 4 \(x and the weights\)",
        ),
        "mask_long": (put("output_mask", [True] * 5), r"output_mask has 5 entries, expected 4"),
    },
) | raising(
    TypeError,
    {
        "grad_dtype": (
            item("grad_feats", 0, Tensor.double),
            r"grad_feats\[0\] has dtype Double, expected Float, the dtype of x",
        ),
    },
)


def elsewhere(name: str) -> dict:
    words = rf"{name}\[1\] is on meta, expected {HERE}, the device of x"
    return raising(RuntimeError, {f"{name}_device": (item(name, 1, on_meta), words)})


def with_bias(device: str) -> Arguments:
    return forward(device) | {"winograd": True, "bias": torch.ones(24, device=device)}


BAD_BIAS = raising(
    ValueError,
    {
        f"bias_{name}": (
            at("bias", shaped(*shape)),
            rf"bias has shape \[{shown}\], expected \[24\]",
        )
        for name, shape, shown in (
            ("short", (23,), "23"),
            ("of_one_branch", (8,), "8"),
            ("rank", (3, 8), "3, 8"),
            ("scalar", (), ""),
        )
    },
) | raising(
    TypeError,
    {
        "bias_dtype": (
            at("bias", Tensor.double),
            r"bias has dtype Double, expected Float, the dtype of x",
        )
    },
)
BIAS_ELSEWHERE = raising(
    RuntimeError,
    {"bias_device": (at("bias", on_meta), rf"bias is on meta, expected {HERE}, the device of x")},
)

SUITES = {
    "spc_conv": Refusals(OP, forward, BAD | elsewhere("weights")),
    "spc_conv_bias": Refusals(OP, with_bias, BAD_BIAS | BIAS_ELSEWHERE),
    "spc_conv_backward": Refusals(
        BACKWARD, backward, BAD | BAD_BACKWARD | elsewhere("weights") | elsewhere("grad_feats")
    ),
}
