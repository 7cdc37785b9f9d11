"""Bad input of spc_conv: the type of the exception, and a message that names the argument and
states what was expected and what was given. After each error the next good call works."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from support.cases import memory_of
from support.convolutions import BACKWARD, OP, Call, Inputs, make_inputs, same
from torch import Tensor

# 3 branches of [2, 8, 6, 7] from x [2, 12, 6, 7]
CALL = Call("good", 2, 12, 8, 6, 7, (same(3, 1), same(5, 2), same(3, 4)))


@dataclass(frozen=True)
class Arguments:
    """Of both operators."""

    x: Tensor
    weights: list[Tensor]
    groups: list[int]
    stride: int
    padding: list[int]
    dilation: list[int]
    grads: list[Tensor] = field(default_factory=list)
    mask: list[bool] = field(default_factory=lambda: [True] * 4)

    @property
    def forward(self) -> tuple:
        return self.x, self.weights, self.groups, self.stride, self.padding, self.dilation

    @property
    def backward(self) -> tuple:
        return self.grads, *self.forward, self.mask


def good(inputs: Inputs | None = None) -> Arguments:
    inputs = inputs or make_inputs(CALL)
    return Arguments(inputs.x, inputs.weights, *CALL.settings, inputs.grads)


Change = Callable[[Arguments], Arguments]


@dataclass(frozen=True)
class Bad:
    change: Change
    error: type[Exception]
    message: str


def x(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda a: replace(a, x=change(a.x))


def item(name: str, index: int, change: Callable) -> Change:
    """One entry of a list."""

    def changed(a: Arguments) -> Arguments:
        given = list(getattr(a, name))
        given[index] = change(given[index])
        return replace(a, **{name: given})

    return changed


def weight(index: int, *shape: int) -> Change:
    return item("weights", index, lambda w: torch.ones(shape, dtype=w.dtype))


def number(name: str, index: int, value: int) -> Change:
    return item(name, index, lambda _: value)


def all_tensors(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda a: replace(
        a,
        x=change(a.x),
        weights=[change(w) for w in a.weights],
        grads=[change(g) for g in a.grads],
    )


def cut(name: str) -> Change:
    return lambda a: replace(a, **{name: getattr(a, name)[:-1]})


def stride(value: int) -> Change:
    return lambda a: replace(a, stride=value)


def branches(count: int) -> Change:
    """Of `count` equal branches."""
    return lambda a: Arguments(
        a.x, a.weights[:1] * count, [1] * count, 1, [1] * count, [1] * count, a.grads[:1] * count,
        [True] * (count + 1),
    )  # fmt: skip


HUGE = 2**63 - 1

BAD = {
    # the lists
    "no_branch": Bad(branches(0), ValueError, r"weights has 0 branches, expected 1 to 8"),
    "nine_branches": Bad(branches(9), ValueError, r"weights has 9 branches, expected 1 to 8"),
    "one_weight_less": Bad(
        cut("weights"), ValueError, r"groups has 3 entries, expected 2, one for each of the weights"
    ),
    "groups_short": Bad(cut("groups"), ValueError, r"groups has 2 entries, expected 3, one for"),
    "padding_short": Bad(cut("padding"), ValueError, r"padding has 2 entries, expected 3, one for"),
    "dilation_short": Bad(
        cut("dilation"), ValueError, r"dilation has 2 entries, expected 3, one for"
    ),
    "groups_long": Bad(
        lambda a: replace(a, groups=[*a.groups, 1]), ValueError, r"groups has 4 entries, expected 3"
    ),
    # x
    "rank_3": Bad(
        x(lambda t: t[0]),
        ValueError,
        r"x has shape \[12, 6, 7\], expected 4 dimensions \[N, C, H, W\]",
    ),
    "rank_5": Bad(
        x(lambda t: t[None]), ValueError, r"x has shape \[1, 2, 12, 6, 7\], expected 4 dimensions"
    ),
    "no_channels": Bad(
        x(lambda t: t[:, :0]),
        ValueError,
        r"x has shape \[2, 0, 6, 7\], expected at least one channel and a spatial size of at least "
        r"1 x 1 \(only the batch may be empty\)",
    ),
    "no_rows": Bad(
        x(lambda t: t[:, :, :0]), ValueError, r"x has shape \[2, 12, 0, 7\], expected.*1 x 1"
    ),
    "no_columns": Bad(
        x(lambda t: t[..., :0]), ValueError, r"x has shape \[2, 12, 6, 0\], expected.*1 x 1"
    ),
    # dtypes
    "integer": Bad(
        all_tensors(Tensor.int),
        TypeError,
        r"x has dtype Int, expected Float, Double, BFloat16 or Half",
    ),
    "complex": Bad(
        all_tensors(lambda t: t.to(torch.complex64)),
        TypeError,
        r"x has dtype ComplexFloat, expected Float, Double, BFloat16 or Half",
    ),
    "float8": Bad(
        all_tensors(lambda t: t.to(torch.float8_e4m3fn)),
        TypeError,
        r"x has dtype Float8_e4m3fn, expected Float, Double, BFloat16 or Half",
    ),
    "double_weight": Bad(
        item("weights", 1, Tensor.double),
        TypeError,
        r"weights\[1\] has dtype Double, expected Float, the dtype of x",
    ),
    "half_x": Bad(
        x(Tensor.half), TypeError, r"weights\[0\] has dtype Float, expected Half, the dtype of x"
    ),
    # numbers
    "stride_0": Bad(stride(0), ValueError, r"stride is 0, expected at least 1"),
    "stride_negative": Bad(stride(-2), ValueError, r"stride is -2, expected at least 1"),
    "groups_0": Bad(number("groups", 1, 0), ValueError, r"groups\[1\] is 0, expected at least 1"),
    "groups_negative": Bad(
        number("groups", 2, -4), ValueError, r"groups\[2\] is -4, expected at least 1"
    ),
    "padding_negative": Bad(
        number("padding", 1, -1), ValueError, r"padding\[1\] is -1, expected at least 0"
    ),
    "dilation_0": Bad(
        number("dilation", 0, 0), ValueError, r"dilation\[0\] is 0, expected at least 1"
    ),
    "dilation_negative": Bad(
        number("dilation", 2, -1), ValueError, r"dilation\[2\] is -1, expected at least 1"
    ),
    # sums of these would overflow, and look small
    "groups_huge": Bad(
        number("groups", 1, HUGE),
        ValueError,
        rf"groups\[1\] is {HUGE}, expected at most 2147483647",
    ),
    "padding_huge": Bad(
        number("padding", 1, HUGE),
        ValueError,
        rf"padding\[1\] is {HUGE}, expected at most 2147483647",
    ),
    "dilation_huge": Bad(
        number("dilation", 1, HUGE),
        ValueError,
        rf"dilation\[1\] is {HUGE}, expected at most 2147483647",
    ),
    # the weights' shapes
    "weight_rank": Bad(
        weight(1, 8, 6, 5),
        ValueError,
        r"weights\[1\] has shape \[8, 6, 5\], expected 4 dimensions "
        r"\[C, in_channels / groups, kernel_h, kernel_w\]",
    ),
    "weight_channels": Bad(
        weight(1, 8, 12, 5, 5),
        ValueError,
        r"weights\[1\] has shape \[8, 12, 5, 5\], expected 12 / 2 channels in its second "
        r"dimension: x has 12 channels and groups\[1\] is 2",
    ),
    "groups_do_not_divide": Bad(
        number("groups", 1, 5),
        ValueError,
        r"weights\[1\] has shape \[8, 6, 5, 5\], expected 12 / 5 channels in its second dimension",
    ),
    "outputs_of_groups": Bad(
        lambda a: number("groups", 2, 3)(weight(2, 8, 4, 3, 3)(a)),
        ValueError,
        r"weights\[2\] has shape \[8, 4, 3, 3\], expected a multiple of groups\[2\] = 3 output "
        r"channels",
    ),
    "outputs_differ": Bad(
        weight(1, 10, 6, 5, 5),
        ValueError,
        r"weights\[1\] has shape \[10, 6, 5, 5\], expected 8 output channels, as weights\[0\] has",
    ),
    "no_outputs": Bad(
        weight(0, 0, 12, 3, 3),
        ValueError,
        r"weights\[0\] has shape \[0, 12, 3, 3\], expected no empty dimension",
    ),
    "no_taps": Bad(
        weight(0, 8, 12, 3, 0),
        ValueError,
        r"weights\[0\] has shape \[8, 12, 3, 0\], expected no empty dimension",
    ),
    # the outputs' sizes
    "output_empty": Bad(
        lambda a: number("padding", 1, 0)(weight(1, 8, 6, 3, 8)(a)),
        ValueError,
        r"the output of branch 1 would be empty: x is 6 x 7 with padding 0, the kernel 3 x 8 with "
        r"dilation 1; expected an output of at least 1 x 1",
    ),
    "dilated_output_empty": Bad(
        number("dilation", 2, 5),
        ValueError,
        r"the output of branch 2 would be empty: x is 6 x 7 with padding 1, the kernel 3 x 3 with "
        r"dilation 5; expected",
    ),
    "outputs_of_other_size": Bad(
        number("padding", 2, 2),
        ValueError,
        r"the output of branch 2 is 8 x 9, expected 6 x 7, that of branch 0",
    ),
}

BAD_BACKWARD = {
    "grads_short": Bad(
        cut("grads"), ValueError, r"grad_feats has 2 entries, expected 3, one for each"
    ),
    "grad_shape": Bad(
        item("grads", 1, lambda g: g[:, 1:]),
        ValueError,
        r"grad_feats\[1\] has shape \[2, 7, 6, 7\], expected \[2, 8, 6, 7\]",
    ),
    "grad_rank": Bad(
        item("grads", 2, lambda g: g[0]),
        ValueError,
        r"grad_feats\[2\] has shape \[8, 6, 7\], expected \[2, 8, 6, 7\]",
    ),
    "grad_dtype": Bad(
        item("grads", 0, Tensor.double),
        TypeError,
        r"grad_feats\[0\] has dtype Double, expected Float, the dtype of x",
    ),
    "mask_short": Bad(
        cut("mask"),
        ValueError,
        r"output_mask has 3 entries, expected 4 \(x and the weights\)",
    ),
    "mask_long": Bad(
        lambda a: replace(a, mask=[True] * 5), ValueError, r"output_mask has 5 entries, expected 4"
    ),
}


def assert_raises(bad: Bad, op, name: str, *, requires_grad: bool = False) -> None:
    """With the message; nothing is written, and a good call gives what it gave before."""
    arguments = good()
    expected, _ = OP(*arguments.forward)
    wrong = bad.change(arguments)
    tensors = [wrong.x, *wrong.weights, *wrong.grads]
    if requires_grad:
        tensors = [t.requires_grad_() for t in tensors if t.is_floating_point()]
    before = [memory_of(t).clone() for t in tensors]
    with pytest.raises(bad.error, match=f"^{name}: {bad.message}"):
        op(*(wrong.forward if op is OP else wrong.backward))
    assert all(torch.equal(memory_of(t), old) for t, old in zip(tensors, before, strict=True))
    with torch.no_grad():
        feats, _ = OP(*good().forward)
    assert all(torch.equal(a, b) for a, b in zip(feats, expected, strict=True))


@pytest.mark.parametrize("requires_grad", (False, True), ids=("no_grad", "grad"))
@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad, requires_grad):
    assert_raises(BAD[bad], OP, "spc_conv", requires_grad=requires_grad)


@pytest.mark.parametrize("requires_grad", (False, True), ids=("no_grad", "grad"))
@pytest.mark.parametrize("bad", BAD | BAD_BACKWARD)
def test_bad_arguments_of_the_backward_op(bad, requires_grad):
    bad = (BAD | BAD_BACKWARD)[bad]
    assert_raises(bad, BACKWARD, "spc_conv_backward", requires_grad=requires_grad)


@pytest.mark.parametrize("name", ("weights", "grads"))
def test_tensors_on_different_devices(name):
    wrong = item(name, 1, lambda t: t.to("meta"))(good())
    shown = {"weights": "weights", "grads": "grad_feats"}[name]
    # a meta tensor among them sends the call to the fake kernel
    message = rf"spc_conv(_backward)?: {shown}\[1\] is on meta, expected cpu, the device of x"
    with pytest.raises(RuntimeError, match=message):
        OP(*wrong.forward) if name == "weights" else BACKWARD(*wrong.backward)


META = ("rank_3", "groups_short", "padding_short", "dilation_short", "weight_rank")
META += ("double_weight", "weight_channels", "groups_do_not_divide")


@pytest.mark.parametrize("bad", META)
def test_meta_tensors_are_checked_too(bad):
    bad = BAD[bad]
    wrong = all_tensors(lambda t: t.to("meta"))(bad.change(good()))
    with pytest.raises(bad.error, match=r"^spc_conv: (weights|x|groups|padding|dilation)"):
        OP(*wrong.forward)


def test_a_compiled_call_raises_the_same_error():
    """The fake kernel lets the number of outputs pass; the real one meets it in the graph."""
    compiled = torch.compile(lambda *a: OP(*a), backend="eager", fullgraph=True)
    bad = BAD["outputs_differ"]
    with pytest.raises(ValueError, match=bad.message):
        compiled(*bad.change(good()).forward)
