"""FusedSplitPSA: the PSA variant whose branches each have an input and an SE of their own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..functional import psa_attention
from ..reference import is_reversed
from .layers import why_se_not_fused

# An SE network in an nn.Sequential: pooling, convolution, ReLU, convolution, sigmoid.
SE_LAYERS = ("0", "1", "2", "3", "4")


def why_not_split_psa(convs: Iterable[nn.Module], se_blocks: Iterable[nn.Module]) -> str | None:
    """Why FusedSplitPSA may not compute what these layers do when they are called."""
    convs, se_blocks = list(convs), list(se_blocks)
    if len(convs) != len(se_blocks):
        return f"it has {len(convs)} convs and {len(se_blocks)} se_blocks, expected as many"
    for i, se in enumerate(se_blocks):
        why = why_se_not_fused(f"se_blocks.{i}", se, nn.Sequential, SE_LAYERS)
        if why is None and len(se) != len(SE_LAYERS):
            why = f"se_blocks.{i} has {len(se)} layers, expected {len(SE_LAYERS)}"
        if why is not None:
            return why
    for layer in (1, 3):
        if len({se[layer].bias is None for se in se_blocks}) > 1:
            return f"some of se_blocks.*.{layer} have a bias and some have none"
        shapes = [list(se[layer].weight.shape) for se in se_blocks]
        if any(shape != shapes[0] for shape in shapes):
            return f"the weights of se_blocks.*.{layer} have shapes {shapes}, expected equal ones"
    return None


class FusedSplitPSA(nn.Module):
    """Pyramid Squeeze Attention over the parts of its input, the attention step fused.

    x [N, S*C, H, W] is cut into S parts [N, C, H, W]; part s goes through convs[s] and is weighed
    by the SE network se_blocks[s]; a softmax across the branches and the products follow, as in
    :func:`epsa_fused.psa_attention` with weights of each branch's own. It is what
    :func:`epsa_fused.fuse` makes of the module that External-Attention-pytorch calls PSA.

    Args:
        convs: S convolutions whose results have one shape.
        se_blocks: S nn.Sequential of AdaptiveAvgPool2d(1), 1x1 Conv2d, ReLU, 1x1 Conv2d, Sigmoid.
            As in FusedPSAModule their parameters are read and they are not called: forward raises
            RuntimeError where that would make a difference.
        branch_order: as in :func:`epsa_fused.psa_attention`.

    Raises:
        ValueError: for layers that cannot be fused; the message says why.
    """

    def __init__(
        self,
        convs: Iterable[nn.Module],
        se_blocks: Iterable[nn.Sequential],
        *,
        branch_order: str = "forward",
    ) -> None:
        super().__init__()
        is_reversed(branch_order)
        self.convs = nn.ModuleList(convs)
        self.se_blocks = nn.ModuleList(se_blocks)
        self.branch_order = branch_order
        why = why_not_split_psa(self.convs, self.se_blocks)
        if why is not None:
            raise ValueError(f"FusedSplitPSA: {why}")

    def extra_repr(self) -> str:
        return f"branch_order={self.branch_order!r}"

    def forward(self, x: Tensor) -> Tensor:
        """x [N, S*C, H, W] -> [N, S*C', H', W']."""
        why = why_not_split_psa(self.convs, self.se_blocks)
        if why is not None:
            raise RuntimeError(f"FusedSplitPSA: {why}")
        parts = x.chunk(len(self.convs), dim=1)
        feats = [conv(part) for conv, part in zip(self.convs, parts, strict=True)]
        fc1, fc2 = ([se[layer] for se in self.se_blocks] for layer in (1, 3))
        return psa_attention(
            feats,
            *(_stack(layer.weight for layer in fc1), _stack(layer.bias for layer in fc1)),
            *(_stack(layer.weight for layer in fc2), _stack(layer.bias for layer in fc2)),
            branch_order=self.branch_order,
        )


def _stack(parameters: Iterable[Tensor | None]) -> Tensor | None:
    parameters = list(parameters)
    return None if parameters[0] is None else torch.stack(parameters)
