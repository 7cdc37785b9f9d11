"""scale, shift and relu behind the attention step: operands, and the exact result."""

from __future__ import annotations

import torch
from support.tolerance import accumulation_type
from torch import Tensor

EPILOGUES = [(True, True), (True, False), (False, True)]  # scale and shift; relu


def factors(channels: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """scale and shift of an output's channels, no two alike."""
    random = torch.Generator().manual_seed(3)
    made = [torch.randn(channels, generator=random, dtype=torch.float64) for _ in range(2)]
    return tuple(v.to(device, accumulation_type(dtype)) for v in made)


def assert_is_epilogue(out, feats, attention, reversed_, scale, shift, relu):
    """Each output is rounded once; before, the sums' own rounding may add a little."""
    products = [f.double() * a[:, :, None, None].double() for f, a in zip(
        feats, attention.unbind(1), strict=True)]  # fmt: skip
    plain = torch.cat(products[::-1] if reversed_ else products, 1)
    exact, size = plain, plain.abs()
    if scale is not None:
        wide = [v.double()[:, None, None] for v in (scale, shift)]
        exact, size = plain * wide[0] + wide[1], size * wide[0].abs() + wide[1].abs()
    exact = exact.relu() if relu else exact
    eps = torch.finfo(out.dtype).eps / 2
    allowed = eps * exact.abs() + 4 * torch.finfo(attention.dtype).eps * size
    tiny = torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps
    assert ((out.double() - exact).abs() <= allowed + tiny).all()
