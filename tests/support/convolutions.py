"""The calls of spc_conv that are tested, their layouts, and the rule by which results are judged.

Every result is compared, entry by entry, with ATen's convolutions in float64. The allowance is

    u(dtype) * |expected|              the rounding of the result to its own dtype, and
    FACTOR * eps(acc) * magnitude      what the accumulation type's roundings add up to,

The magnitude is the entry's value if nothing in its sum cancelled: the same convolution of |x| and
|w|, for a gradient of |grad|. Winograd's method adds up more than the products of an entry. Its own
sums count where they are larger: under few pixels of the image (padding of 2 and more), or among
pixels or weights of very different sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from support.cases import _strided
from support.tolerance import accumulation_type
from torch import Tensor

from epsa_fused import _C
from epsa_fused.convolution import spc_conv

OP = torch.ops.epsa_fused.spc_conv.default
BACKWARD = torch.ops.epsa_fused.spc_conv_backward.default

# The worst seen in random calls is 3.1.
FACTOR = 8


# ---- calls ----


@dataclass(frozen=True)
class Branch:
    kernel: tuple[int, int]
    groups: int
    padding: int
    dilation: int = 1

    def out_size(self, height: int, width: int, stride: int) -> tuple[int, int]:
        return tuple(
            (size + 2 * self.padding - self.dilation * (k - 1) - 1) // stride + 1
            for size, k in zip((height, width), self.kernel, strict=True)
        )


def same(kernel: int, groups: int, dilation: int = 1) -> Branch:
    """An odd kernel that leaves the size (of stride 1) as it is."""
    return Branch((kernel, kernel), groups, dilation * (kernel // 2), dilation)


@dataclass(frozen=True)
class Call:
    """x [batch, in_channels, height, width], and branches of `channels` output channels each."""

    name: str
    batch: int
    in_channels: int
    channels: int
    height: int
    width: int
    branches: tuple[Branch, ...]
    stride: int = 1

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.in_channels, self.height, self.width

    @property
    def weight_shapes(self) -> list[tuple[int, int, int, int]]:
        return [(self.channels, self.in_channels // b.groups, *b.kernel) for b in self.branches]

    @property
    def map_shape(self) -> tuple[int, int, int, int]:
        size = self.branches[0].out_size(self.height, self.width, self.stride)
        return self.batch, self.channels, *size

    @property
    def groups(self) -> list[int]:
        return [b.groups for b in self.branches]

    @property
    def padding(self) -> list[int]:
        return [b.padding for b in self.branches]

    @property
    def dilation(self) -> list[int]:
        return [b.dilation for b in self.branches]

    @property
    def settings(self) -> tuple:
        """The operators' last arguments."""
        return self.groups, self.stride, self.padding, self.dilation

    def __str__(self) -> str:
        return self.name


def stage(width: int, size: int, stride: int = 1, batch: int = 2) -> Call:
    """The PSA module of an EPSANet-50's stage: `width` planes, kernels 3 to 9, groups 1 to 16."""
    branches = tuple(same(k, g) for k, g in ((3, 1), (5, 4), (7, 8), (9, 16)))
    name = f"stage_{width}x{size}_batch{batch}" + ("" if stride == 1 else f"_stride{stride}")
    return Call(name, batch, width, width // 4, size, size, branches, stride)


STAGES = tuple(
    stage(width, size, stride, batch=1 if size > 20 else 2)
    for width, size in ((64, 56), (128, 28), (256, 14), (512, 7))
    for stride in (1, 2)
)

CALLS = (
    *STAGES,
    # one sample, and batches that do not divide by the threads
    stage(64, 14, batch=1),
    stage(64, 14, batch=7),
    Call("empty_batch", 0, 16, 8, 7, 7, (same(3, 1), same(5, 2))),
    # one of everything
    Call("one_of_each", 1, 1, 1, 1, 1, (same(1, 1),)),
    Call("one_channel", 3, 1, 1, 6, 5, (same(3, 1), same(1, 1))),
    Call("one_channel_in", 3, 1, 18, 6, 5, (same(3, 1), same(5, 1))),
    Call("one_channel_out", 3, 18, 1, 6, 5, (same(3, 1), same(5, 1))),
    Call("one_pixel", 5, 24, 36, 1, 1, (same(1, 1), same(9, 4), same(3, 12))),
    Call("one_pixel_out", 2, 16, 16, 5, 7, (Branch((5, 7), 4, 0),)),
    # a single row or column, in or out
    Call("row", 2, 18, 18, 1, 37, (same(3, 2), same(7, 6))),
    Call("column", 2, 18, 18, 37, 1, (same(3, 2), same(7, 6))),
    Call("column_out", 3, 20, 40, 9, 4, (Branch((3, 4), 1, 0), Branch((3, 4), 4, 0))),
    # images much smaller than the kernels, and padding that reaches past both of them
    Call("tiny_image", 3, 8, 24, 2, 3, (same(11, 1), same(9, 2), same(7, 8), same(11, 4, 2))),
    Call("much_padding", 2, 16, 16, 3, 2, (Branch((3, 3), 1, 9), Branch((5, 5), 16, 10))),
    # kernels that are even or not square
    Call("even", 2, 12, 24, 9, 8, (Branch((2, 2), 1, 1), Branch((4, 4), 3, 2))),
    Call("not_square", 2, 12, 24, 9, 11, (Branch((3, 5), 2, 2), Branch((3, 5), 12, 2))),
    Call("flat", 2, 16, 16, 11, 13, (Branch((1, 11), 1, 5), Branch((1, 11), 4, 5))),
    Call("tall", 2, 16, 16, 13, 11, (Branch((11, 1), 1, 5), Branch((11, 1), 16, 5))),
    # from one branch to the most
    Call("branches_1", 3, 20, 10, 9, 8, (same(5, 2),)),
    Call("branches_3", 3, 20, 10, 9, 8, (same(1, 10), same(5, 5), same(9, 1))),
    Call("branches_8", 2, 48, 48, 7, 8, tuple(same(k, g) for k, g in zip(
        (1, 3, 5, 7, 9, 11, 3, 5), (1, 2, 3, 4, 6, 8, 16, 48), strict=True))),
    # the last output row reads past the image
    Call("stride_2_odd", 3, 32, 32, 15, 13, (same(3, 1), same(5, 4), same(7, 32)), 2),
    Call("stride_3", 3, 32, 32, 15, 13, (same(3, 1), same(5, 4), same(7, 32)), 3),
    Call("dilated", 3, 32, 32, 15, 13, (same(3, 1, 2), same(5, 4, 3), same(7, 8, 2))),
    # a tile buffer holds one of these long rows
    Call("wide", 1, 16, 48, 4, 301, (same(3, 1), same(5, 4))),
    # for Winograd's method: odd sizes, groups, more channels and tiles in a row than one block has
    Call("winograd", 3, 96, 96, 15, 13, (same(3, 1), same(3, 3), same(3, 6))),
    Call("winograd_wide", 1, 32, 24, 5, 301, (same(3, 1),)),
    Call("winograd_padding", 2, 32, 40, 6, 9, (Branch((3, 3), 1, 4),)),
    Call("many_channels", 1, 520, 264, 3, 5, (same(3, 1), same(3, 8), same(1, 4))),
)  # fmt: skip
BY_NAME = {call.name: call for call in CALLS}


# ---- a sweep over kernels, groups, strides and dilations ----

# groups, input and output channels of a group: full, shared and unused lanes of registers of 4, 8
# and 16 floats
CHANNELS = (
    (1, 3, 5),
    (1, 16, 17),
    (1, 19, 33),
    (2, 8, 12),
    (2, 20, 40),
    (3, 5, 7),
    (3, 32, 3),
    (4, 4, 4),
    (1, 6, 64),
    (4, 16, 16),
    (4, 16, 8),
    (5, 2, 6),
    (6, 1, 1),
    (9, 8, 2),
    (11, 1, 3),
    (37, 1, 1),
)
IMAGES = ((1, 1), (2, 3), (5, 7), (9, 8), (13, 17), (7, 29))
KERNELS = tuple((k, k) for k in range(1, 12))
FLAT_KERNELS = ((1, 3), (3, 1), (2, 5), (11, 2), (4, 7))


def sweep(kernel: tuple[int, int], *, thorough: bool = False) -> list[Call]:
    """Calls of one branch: all groups, strides 1 to 3, dilations 1 and 2. Images and paddings take
    turns; `thorough` combines them all."""
    calls = []
    turn = sum(kernel)
    for (groups, ic, oc), stride, dilation in itertools.product(CHANNELS, (1, 2, 3), (1, 2)):
        reach = tuple(dilation * (k - 1) + 1 for k in kernel)
        paddings = (0, min(reach) // 2, max(reach) + 1)
        images = IMAGES if thorough else (IMAGES[turn % len(IMAGES)],)
        for height, width in images:
            least = max((r - s + 1) // 2 for r, s in zip(reach, (height, width), strict=True))
            choices = sorted({max(p, least) for p in paddings})
            if not thorough:
                choices = (choices[turn // len(IMAGES) % len(choices)],)
            for padding in choices:
                branch = Branch(kernel, groups, padding, dilation)
                name = f"{kernel}_{groups}x{ic}x{oc}_{height}x{width}"
                name += f"_stride{stride}_padding{padding}_dilation{dilation}"
                sizes = (groups * ic, groups * oc, height, width)
                batch = (1, 3, 2)[turn % 3]
                calls.append(Call(name, batch, *sizes, (branch,), stride))
                turn += 1
        turn += 1
    return calls


# ---- memory layouts ----


def channels_last(t: Tensor) -> Tensor:
    """In memory too: strides of one channel or one pixel leave the order open."""
    n, c, h, w = t.shape
    return t.new_empty(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


def unaligned(t: Tensor) -> Tensor:
    flat = t.new_empty(t.numel() + 1)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory. `maps` is the layout of the maps that follows from x, if it has
    several channels and pixels."""

    name: str
    make: Callable[..., Tensor]  # (random, sizes of the four dimensions)
    maps: torch.memory_format = torch.contiguous_format


CONTIGUOUS = Layout("contiguous", lambda random, n, c, h, w: random(n, c, h, w))
CHANNELS_LAST = Layout(
    "channels_last",
    lambda random, n, c, h, w: channels_last(random(n, c, h, w)),
    torch.channels_last,
)
PLAIN_LAYOUTS = (CONTIGUOUS, CHANNELS_LAST)
LAYOUTS = (
    *PLAIN_LAYOUTS,
    Layout("unaligned", lambda random, *size: unaligned(random(*size))),
    Layout("batch_strided", lambda random, n, c, h, w: random(2 * n, c, h, w)[::2]),
    Layout("some_channels", lambda random, n, c, h, w: random(n, c + 3, h, w)[:, 2 : c + 2]),
    Layout("some_channels_last",
        lambda random, n, c, h, w: channels_last(random(n, c + 4, h, w))[:, 1 : c + 1],
        torch.channels_last),
    Layout("cropped", lambda random, n, c, h, w: random(n, c, h + 2, w + 3)[:, :, 1:-1, 1:-2]),
    Layout("cropped_channels_last",
        lambda random, n, c, h, w: channels_last(random(n, c, h + 2, w + 3))[:, :, 1:-1, 1:-2],
        torch.channels_last),
    Layout("every_second_pixel", lambda random, n, c, h, w: random(n, c, h, 2 * w)[..., ::2]),
    Layout("every_second_channel", lambda random, n, c, h, w: random(n, 2 * c, h, w)[:, ::2]),
    Layout("transposed", lambda random, n, c, h, w: random(n, c, w, h).transpose(2, 3)),
    Layout("reversed", lambda random, n, c, h, w: random(w, h, c, n).permute(3, 2, 1, 0)),
    Layout("batch_inside", lambda random, n, c, h, w: random(h, w, n, c).permute(2, 3, 0, 1),
        torch.channels_last),
    Layout("expanded_batch", lambda random, n, c, h, w: random(1, c, h, w).expand(n, c, h, w)),
    Layout("expanded_channels", lambda random, n, c, h, w: random(n, 1, h, w).expand(n, c, h, w)),
    Layout("expanded_pixels", lambda random, n, c, h, w: random(n, c, 1, 1).expand(n, c, h, w),
        torch.channels_last),
    Layout("expanded_rows", lambda random, n, c, h, w: random(n, c, 1, w).expand(n, c, h, w)),
)  # fmt: skip
# layouts of a weight [C, in_channels / groups, kernel_h, kernel_w], without a meaning for `maps`
WEIGHT_LAYOUTS = (
    *PLAIN_LAYOUTS,
    Layout("unaligned", lambda random, *size: unaligned(random(*size))),
    Layout("strided", lambda random, *size: _strided(random(*size))),
    Layout("some_outputs", lambda random, o, i, h, w: random(2 * o, i, h, w)[1::2]),
    Layout("some_inputs", lambda random, o, i, h, w: random(o, i + 2, h, w)[:, 1:-1]),
    Layout("some_inputs_last",
        lambda random, o, i, h, w: channels_last(random(o, i + 2, h, w))[:, 1:-1]),
    Layout("some_taps", lambda random, o, i, h, w: random(o, i, h + 1, w + 2)[:, :, 1:, 1:-1]),
    Layout("inputs_outside", lambda random, o, i, h, w: random(i, o, h, w).transpose(0, 1)),
    Layout("taps_transposed", lambda random, o, i, h, w: random(o, i, w, h).transpose(2, 3)),
    Layout("outputs_inside", lambda random, o, i, h, w: random(i, h, w, o).permute(3, 0, 1, 2)),
    Layout("expanded_outputs", lambda random, o, i, h, w: random(1, i, h, w).expand(o, i, h, w)),
    Layout("expanded_inputs", lambda random, o, i, h, w: random(o, 1, h, w).expand(o, i, h, w)),
    Layout("expanded_taps", lambda random, o, i, h, w: random(o, i, 1, 1).expand(o, i, h, w)),
)  # fmt: skip


def maps_format(call: Call, layout: Layout) -> torch.memory_format:
    """An image of one channel or one pixel has both layouts where it is dense; contiguous wins."""
    both = call.in_channels == 1 or call.height * call.width == 1
    return torch.contiguous_format if both else layout.maps


def dense_strides(shape: Sequence[int], memory_format: torch.memory_format) -> tuple[int, ...]:
    """The strides of a new tensor."""
    return torch.empty(shape, device="meta").to(memory_format=memory_format).stride()


# ---- inputs ----


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weights: list[Tensor]
    grads: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [self.x, *self.weights]

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(
            function(self.x), list(map(function, self.weights)), list(map(function, self.grads))
        )

    def leaves(self) -> Inputs:
        """x and weights, in the same memory, require their gradients."""
        x, *weights = (t.detach().requires_grad_() for t in self.tensors())
        return Inputs(x, weights, self.grads)


def make_inputs(
    call: Call,
    dtype: torch.dtype = torch.float32,
    layout: Layout = CONTIGUOUS,
    weight_layout: Layout = CONTIGUOUS,
    grad_layout: Layout | None = None,
    *,
    seed: int = 0,
) -> Inputs:
    """All entries of x and of the weights differ, and so do the means of the channels. The values
    are drawn in float64, so every dtype gets the same."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.float64, generator=generator)

    def feature(*sizes: int) -> Tensor:
        return (random(*sizes) + random(1, sizes[1], 1, 1)).to(dtype)

    def values(*sizes: int) -> Tensor:
        return random(*sizes).to(dtype)

    return Inputs(
        layout.make(feature, *call.x_shape),
        [weight_layout.make(values, *shape) for shape in call.weight_shapes],
        [(grad_layout or layout).make(values, *call.map_shape) for _ in call.branches],
    )


# ---- results ----


def method(call: Call, branch: Branch, dtype: torch.dtype) -> str:
    """How the CPU computes a branch: by one of the package's kernels or by the library."""
    return _C.conv_plan(
        in_channels=call.in_channels,
        out_channels=call.channels,
        groups=branch.groups,
        kernel=branch.kernel,
        height=call.height,
        width=call.width,
        stride=call.stride,
        padding=branch.padding,
        dilation=branch.dilation,
        dtype=str(dtype).removeprefix("torch."),
    )["method"]


def run_own(call: Call, inputs: Inputs) -> list[Tensor]:
    """The maps and means of the branches that the package's kernels compute."""
    feats, pooled = OP(inputs.x, inputs.weights, *call.settings)
    own = [s for s, b in enumerate(call.branches) if method(call, b, inputs.x.dtype) != "library"]
    return [t for s in own for t in (feats[s], pooled[:, s])]


def run(call: Call, inputs: Inputs, mask: list[bool] | None = None) -> dict[str, Tensor]:
    """The results of the forward and, with a mask, of the backward operator, by name."""
    feats, pooled = OP(inputs.x, inputs.weights, *call.settings)
    results = {f"feats[{s}]": f for s, f in enumerate(feats)} | {"pooled": pooled}
    if mask is not None:
        grad_x, grads = BACKWARD(inputs.grads, inputs.x, inputs.weights, *call.settings, mask)
        results["grad of x"] = grad_x
        results |= {f"grad of weights[{s}]": g for s, g in enumerate(grads)}
    return results


def reference(call: Call, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [
        torch.conv2d(x, w, None, call.stride, b.padding, b.dilation, b.groups)
        for w, b in zip(weights, call.branches, strict=True)
    ]


def exact_results(
    call: Call, inputs: Inputs, *, absolute: bool = False, backward: bool = True
) -> dict[str, Tensor]:
    """In float64. `absolute` takes absolute values, so that nothing cancels."""

    def exact(t: Tensor) -> Tensor:
        t = t.detach().double().contiguous()
        return t.abs() if absolute else t

    inputs = inputs.map(exact).leaves()
    feats = reference(call, inputs.x, inputs.weights)
    results = {f"feats[{s}]": f.detach() for s, f in enumerate(feats)}
    results["pooled"] = torch.stack([f.detach().mean((2, 3)) for f in feats], 1)
    if backward:
        grads = torch.autograd.grad(feats, inputs.tensors(), inputs.grads)
        results["grad of x"] = grads[0]
        results |= {f"grad of weights[{s}]": g for s, g in enumerate(grads[1:])}
    return results


# Winograd's F(2 x 2, 3 x 3): the transforms of image, weights and products, without signs.
_IMAGE = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]]).double()
_KERNEL = torch.tensor([[2, 0, 0], [1, 1, 1], [1, 1, 1], [0, 0, 2]]).double() / 2
_PRODUCTS = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).double()


def winograd_magnitude(
    x: Tensor, w: Tensor, padding: Sequence[int], out_size: Sequence[int], groups: int
) -> Tensor:
    """What Winograd's method makes of |x| and |w| where nothing cancels, for a 3x3 kernel."""
    tiles = [(size + 1) // 2 for size in out_size]
    (top, left), (below, right) = (
        padding,
        (2 * t + 2 - p - size for t, p, size in zip(tiles, padding, x.shape[2:], strict=True)),
    )
    windows = F.pad(x.abs(), (left, right, top, below)).unfold(2, 4, 2).unfold(3, 4, 2)
    image = torch.einsum("ij,nchwjk,lk->nchwil", _IMAGE, windows, _IMAGE)
    kernel = torch.einsum("ij,ocjk,lk->ocil", _KERNEL, w.abs(), _KERNEL)
    products = torch.einsum(
        "ngchwil,gocil->ngohwil",
        image.unflatten(1, (groups, -1)),
        kernel.unflatten(0, (groups, -1)),
    )
    sums = torch.einsum("ai,ngohwil,bl->ngohawb", _PRODUCTS, products, _PRODUCTS)
    n, channels = x.shape[0], w.shape[0]
    sums = sums.reshape(n, channels, 2 * tiles[0], 2 * tiles[1])
    return sums[:, :, : out_size[0], : out_size[1]]


def winograd_magnitudes(call: Call, inputs: Inputs, backward: bool) -> dict[str, Tensor]:
    """What Winograd's method adds to the magnitudes."""
    inputs = inputs.map(lambda t: t.detach().double().contiguous().abs())
    x = inputs.x
    more = {}
    pooled = x.new_zeros(call.batch, len(call.branches), call.channels)
    for s, (b, w, grad) in enumerate(zip(call.branches, inputs.weights, inputs.grads, strict=True)):
        if b.dilation > 1:
            continue
        if b.kernel == (3, 3) and call.stride == 1:
            direct = torch.conv2d(x, w, None, 1, b.padding, 1, b.groups)
            sums = winograd_magnitude(x, w, [b.padding] * 2, call.map_shape[2:], b.groups)
            more[f"feats[{s}]"] = (sums - direct).clamp(min=0)
            pooled[:, s] = more[f"feats[{s}]"].mean((2, 3))
        if not backward:
            continue
        # the gradient's rows and columns of each remainder are a convolution of stride 1
        swapped = w.unflatten(0, (b.groups, -1)).transpose(1, 2).flatten(0, 1)
        grad_x = more.setdefault("grad of x", torch.zeros_like(x))
        phases = (range(min(call.stride, size)) for size in (call.height, call.width))
        for row, column in itertools.product(*phases):
            taps = [(first + b.padding) % call.stride for first in (row, column)]
            part = swapped[:, :, taps[0] :: call.stride, taps[1] :: call.stride]
            padding = [2 - (first + b.padding) // call.stride for first in (row, column)]
            if part.shape[2:] != (3, 3) or min(padding) < 0:
                continue
            part = part.flip(2, 3)
            to = grad_x[:, :, row :: call.stride, column :: call.stride]
            size = to.shape[2:]
            ends = [t + 2 - p - g for t, p, g in zip(size, padding, grad.shape[2:], strict=True)]
            around = F.pad(grad, (padding[1], ends[1], padding[0], ends[0]))
            direct = torch.conv2d(around, part, groups=b.groups)
            sums = winograd_magnitude(grad, part, padding, size, b.groups)
            to += (sums - direct).clamp(min=0)
    return more | {"pooled": pooled}


def allowance(actual: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """How far each entry may be from what is expected; `dtype` is that of the inputs."""
    info = torch.finfo(actual.dtype)
    rounding = info.eps / 2 * expected.abs().clamp(min=info.smallest_normal)
    return rounding + FACTOR * torch.finfo(accumulation_type(dtype)).eps * magnitude


Exact = tuple[dict[str, Tensor], dict[str, Tensor]]


def exact_and_magnitudes(call: Call, inputs: Inputs, *, backward: bool = True) -> Exact:
    magnitudes = exact_results(call, inputs, absolute=True, backward=backward)
    for name, more in winograd_magnitudes(call, inputs, backward).items():
        magnitudes[name] = magnitudes[name] + more
    return exact_results(call, inputs, backward=backward), magnitudes


def check(
    call: Call, inputs: Inputs, mask: list[bool] | None = None, *, exact: Exact | None = None
) -> dict[str, Tensor]:
    """Compare results with the reference in float64; returns them, by name."""
    actual = run(call, inputs, mask)
    expected, magnitudes = exact or exact_and_magnitudes(call, inputs, backward=mask is not None)
    assert actual.keys() == expected.keys()
    dtype = inputs.x.dtype
    for name, result in actual.items():
        if mask is not None and "grad" in name:
            wanted = dict(zip(list(actual)[-len(mask) :], mask, strict=True))[name]
            if not wanted:
                assert (result.shape, result.dtype) == ((0,), dtype), (call.name, name)
                continue
        assert result.shape == expected[name].shape, (call.name, name, result.shape)
        limit = allowance(result, expected[name], magnitudes[name], dtype)
        error = (result.double() - expected[name]).abs()
        if not (error <= limit).all():  # NaN is no number either
            worst = (error / limit).max().item()
            raise AssertionError(
                f"{call.name}: {name} ({dtype}): {worst:.3g} times what is allowed"
            )
    return actual


def spc(
    call: Call, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The public function."""
    return spc_conv(
        x,
        weights,
        call.groups,
        stride=call.stride,
        padding=call.padding,
        dilation=call.dilation,
        bias=bias,
    )
