"""The shapes, memory layouts and SE weights that the kernels are tested with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)
ORDERS = ("reversed", "forward")
FORMATS = (torch.contiguous_format, torch.channels_last)


def name_of(value) -> str | None:
    """A test id: float32 for torch.float32, the name of a case."""
    if isinstance(value, torch.dtype | torch.memory_format):
        return str(value).removeprefix("torch.").removesuffix("_format")
    return getattr(value, "name", None)


# ---- shapes ----


@dataclass(frozen=True)
class Case:
    """S branches of maps [N, C, H, W]; the SE has r hidden units."""

    name: str
    batch: int
    branches: int
    channels: int
    height: int
    width: int
    hidden: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def map_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.branches * self.channels, self.height, self.width

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        return self.batch, self.branches, self.channels


CASES = (
    # the four stages of EPSANet-50: planes 64, 128, 256, 512
    Case("stage1", 2, 4, 16, 56, 56, 1),
    Case("stage2", 2, 4, 32, 28, 28, 2),
    Case("stage3", 2, 4, 64, 14, 14, 4),
    Case("stage4", 2, 4, 128, 7, 7, 8),
    # one sample, and a batch that is not a multiple of the threads
    Case("one_sample", 1, 4, 64, 14, 14, 4),
    Case("batch_of_7", 7, 4, 32, 14, 14, 2),
    Case("empty_batch", 0, 4, 16, 7, 7, 2),
    # both layouts at once: one pixel, one channel
    Case("one_pixel", 5, 4, 24, 1, 1, 3),
    Case("one_channel", 2, 4, 1, 6, 5, 1),
    Case("one_of_each", 3, 2, 1, 1, 1, 1),
    # no size a multiple of a vector; not square; a single row or column
    Case("odd", 3, 3, 5, 5, 3, 2),
    Case("not_square", 2, 4, 17, 6, 11, 3),
    Case("row", 2, 4, 18, 1, 37, 2),
    Case("column", 2, 4, 18, 37, 1, 2),
    # branch counts besides 3 and 4
    Case("branches_2", 2, 2, 33, 9, 8, 4),
    Case("branches_5", 2, 5, 7, 9, 8, 1),
    Case("branches_6", 2, 6, 8, 9, 8, 1),
    Case("branches_7", 2, 7, 31, 4, 4, 5),
    Case("branches_8", 2, 8, 16, 4, 5, 2),
    # The CPU kernels cut these maps into chunks (make_geometry in csrc/cpu/attention_plan.cpp).
    # A plane is 3 chunks, the last one short. A chunk is one pixel of many channels, or two pixels
    # where a map would have more than 256 chunks.
    Case("large_planes", 1, 2, 3, 183, 181, 1),
    Case("many_channels", 1, 2, 4100, 3, 3, 5),
    Case("many_pixels", 1, 2, 4099, 17, 17, 2),
)

BY_NAME = {case.name: case for case in CASES}
# few and small, for tests of many parameters
SMALL = tuple(BY_NAME[name] for name in ("stage4", "odd", "not_square"))


def marked(mark: pytest.MarkDecorator, values: Iterable, chosen: Callable[[Any], bool]) -> list:
    """Parameters of a test; those that are `chosen` have the mark."""
    return [pytest.param(v, marks=mark) if chosen(v) else v for v in values]


# What `make test` runs on the emulated kernels.
QUICK = pytest.mark.emulated_quick
QUICK_CASES = marked(QUICK, CASES, lambda case: case.name in ("odd", "branches_5"))


# ---- memory layouts ----

Random = Callable[..., Tensor]  # sizes -> values


def _chunks(t: Tensor, case: Case) -> list[Tensor]:
    return list(t.chunk(case.branches, dim=1))


def _each(make: Callable[[Random, Case], Tensor]) -> Callable[[Random, Case], list[Tensor]]:
    return lambda random, case: [make(random, case) for _ in range(case.branches)]


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _wide_pixels(random: Random, case: Case) -> Tensor:
    """Some channels of a channels_last tensor, from an odd offset."""
    n, c, h, w = case.map_shape
    return _channels_last(random(n, c + 4, h, w))[:, 1 : c + 1]


def _unaligned(random: Random, case: Case) -> Tensor:
    """Contiguous, but from an odd element of its memory."""
    values = random(*case.map_shape)
    flat = values.new_empty(values.numel() + 1)
    flat[1:] = values.flatten()
    return flat[1:].view(case.map_shape)


def _overlapping(random: Random, case: Case) -> Tensor:
    """Samples that start one element apart in the same memory."""
    n, c, h, w = case.map_shape
    flat = random(1, 1, 1, c * h * w + n).flatten()
    return flat.as_strided((n, c, h, w), (1, h * w, w, 1))


def _cropped(random: Random, case: Case) -> Tensor:
    n, c, h, w = case.map_shape
    return random(n, c, h + 2, w + 3)[:, :, 1:-1, 1:-2]


def _alternating(first_contiguous: int) -> Callable[[Random, Case], list[Tensor]]:
    def make(random: Random, case: Case) -> list[Tensor]:
        maps = [random(*case.map_shape) for _ in range(case.branches)]
        return [m if s < first_contiguous else _channels_last(m) for s, m in enumerate(maps)]

    return make


@dataclass(frozen=True)
class Layout:
    """How the maps of all branches lie in memory, and the layout of `out` that follows."""

    name: str
    make: Callable[[Random, Case], list[Tensor]]
    out_format: torch.memory_format
    in_place: bool  # whether the operator reads the maps without a copy


CONTIGUOUS = Layout(
    "contiguous", _each(lambda random, case: random(*case.map_shape)), torch.contiguous_format, True
)
CHANNELS_LAST = Layout(
    "channels_last",
    _each(lambda random, case: _channels_last(random(*case.map_shape))),
    torch.channels_last,
    True,
)
PLAIN_LAYOUTS = (CONTIGUOUS, CHANNELS_LAST)

LAYOUTS = (
    *PLAIN_LAYOUTS,
    # chunks of one convolution's output
    Layout("chunks", lambda random, case: _chunks(random(*case.out_shape), case),
        torch.contiguous_format, True),
    Layout("chunks_channels_last",
        lambda random, case: _chunks(_channels_last(random(*case.out_shape)), case),
        torch.channels_last, True),
    Layout("batch_strided",
        _each(lambda random, case: random(2 * case.batch, *case.map_shape[1:])[::2]),
        torch.contiguous_format, True),
    Layout("wide_pixels", _each(_wide_pixels), torch.channels_last, True),
    Layout("unaligned", _each(_unaligned), torch.contiguous_format, True),
    Layout("overlapping", _each(_overlapping), torch.contiguous_format, True),
    Layout("expanded_batch",
        _each(lambda random, case: random(1, *case.map_shape[1:]).expand(case.map_shape)),
        torch.contiguous_format, True),
    Layout("expanded_pixels",
        _each(lambda random, case: random(*case.map_shape[:2], 1, 1).expand(case.map_shape)),
        torch.channels_last, True),
    Layout("expanded_channels", _each(
        lambda random, case: random(case.batch, 1, case.height, case.width).expand(case.map_shape)),
        torch.contiguous_format, False),
    Layout("cropped", _each(_cropped), torch.contiguous_format, False),
    Layout("transposed", _each(lambda random, case: random(
        case.batch, case.channels, case.width, case.height).transpose(2, 3)),
        torch.contiguous_format, False),
    # layouts differ among branches: the majority decides, contiguous in a draw
    Layout("mixed", _alternating(1), torch.channels_last, False),
    Layout("mixed_draw", _alternating(2), torch.contiguous_format, False),
)  # fmt: skip


def out_format(case: Case, layout: Layout) -> torch.memory_format:
    """A dense map of one channel or one pixel has both layouts; contiguous wins."""
    both = case.channels == 1 or case.pixels == 1
    return torch.contiguous_format if both else layout.out_format


def strides_of(shape: tuple[int, ...], memory_format: torch.memory_format) -> tuple[int, ...]:
    """The strides of a dense tensor. One pixel has the same bytes in both formats; the package
    promises contiguous strides for it."""
    _, c, h, w = shape
    if memory_format == torch.channels_last and h * w > 1:
        return h * w * c, 1, w * c, c
    return c * h * w, h * w, w, 1


def memory_of(t: Tensor) -> Tensor:
    """Every byte of the memory that `t` is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


# ---- SE weights ----


WEIGHT_NAMES = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


@dataclass(frozen=True)
class WeightKind:
    name: str
    per_branch: bool = False
    fc1_bias: bool = True
    fc2_bias: bool = True
    conv: bool = False  # with the two trailing ones of a 1x1 convolution's weight
    strided: bool = False  # not contiguous


WEIGHT_KINDS = (
    WeightKind("matrices"),
    WeightKind("conv", conv=True),
    WeightKind("strided", strided=True),
    WeightKind("strided_conv", strided=True, conv=True),
    WeightKind("fc1_bias_only", fc2_bias=False),
    WeightKind("fc2_bias_only", fc1_bias=False),
    WeightKind("no_bias", fc1_bias=False, fc2_bias=False, conv=True),
    WeightKind("per_branch", per_branch=True),
    WeightKind("per_branch_conv", per_branch=True, conv=True),
    WeightKind("per_branch_strided", per_branch=True, strided=True),
    WeightKind("per_branch_fc1_bias_only", per_branch=True, fc2_bias=False),
    WeightKind("per_branch_fc2_bias_only", per_branch=True, fc1_bias=False),
    WeightKind("per_branch_no_bias", per_branch=True, fc1_bias=False, fc2_bias=False),
)
MATRICES, _, STRIDED = WEIGHT_KINDS[:3]


def _strided(t: Tensor) -> Tensor:
    """The same values in every second element of a transposed tensor."""
    memory = t.new_empty(*t.shape[::-1], 2)
    memory[..., 0] = t.permute(*range(t.dim())[::-1])
    return memory[..., 0].permute(*range(t.dim())[::-1])


# ---- inputs ----


@dataclass(frozen=True)
class Inputs:
    """One call's arguments: the maps of S branches and four SE weights."""

    feats: list[Tensor]
    weights: list[Tensor | None]

    @property
    def args(self) -> tuple:
        return self.feats, *self.weights

    def names(self) -> list[str]:
        """Names of the tensors that are given, in the order of `tensors`."""
        given = [w for w, t in zip(WEIGHT_NAMES, self.weights, strict=True) if t is not None]
        return [f"feats[{s}]" for s in range(len(self.feats))] + given

    def tensors(self) -> list[Tensor]:
        return [*self.feats, *(w for w in self.weights if w is not None)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(
            [function(f) for f in self.feats],
            [None if w is None else function(w) for w in self.weights],
        )

    def leaves(self) -> Inputs:
        """Each tensor in the same memory, as a leaf that requires its gradient."""
        return self.map(lambda t: t.detach().requires_grad_())

    def double(self) -> Inputs:
        """Contiguous float64 copies, for the reference."""
        return self.map(lambda t: t.detach().double().contiguous())


def make_inputs(
    case: Case,
    dtype: torch.dtype = torch.float32,
    layout: Layout = CONTIGUOUS,
    kind: WeightKind = MATRICES,
    *,
    weight_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Inputs whose every part shows in the results: each channel has a mean of its own, hidden
    units of both signs, and attention well away from 1/S.

    The values are drawn on the CPU in float64, so they are those of any dtype and device.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64, generator=generator)

    def feature(*sizes: int) -> Tensor:
        values = normal(*sizes) + normal(1, sizes[1], 1, 1)
        return values.to(device, dtype)

    def weight(*sizes: int, scale: float, mean: float = 0.0) -> Tensor:
        lead = (case.branches,) if kind.per_branch else ()
        trail = (1, 1) if kind.conv and len(sizes) == 2 else ()
        values = (normal(*lead, *sizes, *trail) * scale + mean).to(device, weight_dtype or dtype)
        return _strided(values) if kind.strided else values

    c, r = case.channels, case.hidden
    return Inputs(
        layout.make(feature, case),
        [
            weight(r, c, scale=c**-0.5),
            weight(r, scale=0.5, mean=0.5) if kind.fc1_bias else None,
            weight(c, r, scale=2 * r**-0.5),
            weight(c, scale=0.5) if kind.fc2_bias else None,
        ],
    )
