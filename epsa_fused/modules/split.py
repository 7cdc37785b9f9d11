"""SplitPSA, the PSA variant whose branches each have an input and an SE of their own, and
FusedSplitPSA, the same with the attention step fused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch.fx import Proxy

from .._checks import check_modules, check_tensor
from ..functional import psa_attention
from ..reference import _recalibrate, accumulated, asks_for_attention, is_reversed
from .calling import warn_once, why_here
from .layers import has_bias, read_se, why_not_plain, why_se_called
from .tracing import NotScriptable, as_leaf

# An SE network in an nn.Sequential: pooling, convolution, ReLU, convolution, sigmoid.
SE_LAYERS = ("0", "1", "2", "3", "4")


def why_not_split_psa(convs: Iterable[nn.Module], se_blocks: Iterable[nn.Module]) -> str | None:
    """The reason why FusedSplitPSA may compute something else than these layers, or None."""
    convs, se_blocks = list(convs), list(se_blocks)
    if len(convs) != len(se_blocks):
        return f"it has {len(convs)} convs and {len(se_blocks)} se_blocks, expected as many"
    for i, se in enumerate(se_blocks):
        why = why_se_called(f"se_blocks.{i}", se, nn.Sequential, SE_LAYERS)
        if why is None and len(se._modules) != len(SE_LAYERS):
            why = f"se_blocks.{i} has {len(se._modules)} layers, expected {len(SE_LAYERS)}"
        if why is not None:
            return why
    for layer in (1, 3):
        fcs = _layers(se_blocks, layer)
        if len({has_bias(fc) for fc in fcs}) > 1:
            return f"some of se_blocks.*.{layer} have a bias and some have none"
        shapes = [_weight_shape(fc) for fc in fcs]
        if any(shape != shapes[0] for shape in shapes):
            return f"the weights of se_blocks.*.{layer} have shapes {shapes}, expected equal ones"
    return None


class SplitPSA(nn.Module):
    """Pyramid Squeeze Attention over the parts of its input, in plain PyTorch.

    x [N, S*C, H, W] is cut into S parts [N, C, H, W]. Convolution convs[s] maps part s, and the SE
    network se_blocks[s] weighs its channels. A softmax across the branches and the products
    follow, as in :func:`epsa_fused.psa_attention` with SE weights per branch. The result is
    [N, S*C', H', W'] for convolutions with C' output channels.

    It computes what External-Attention-pytorch's PSA does, whose published class hides its layers
    from PyTorch in plain lists. :func:`epsa_fused.unfuse` builds it.

    Args:
        convs: S convolutions with outputs of one shape.
        se_blocks: S SE networks, [N, C', H', W'] -> [N, C', 1, 1].
        branch_order: as in :func:`epsa_fused.psa_attention`.

    Raises:
        ValueError: `branch_order` is unknown.
    """

    def __init__(
        self,
        convs: Iterable[nn.Module],
        se_blocks: Iterable[nn.Module],
        *,
        branch_order: str = "forward",
    ) -> None:
        super().__init__()
        check_modules("convs", convs)
        check_modules("se_blocks", se_blocks)
        is_reversed(branch_order)
        self.convs = nn.ModuleList(convs)
        self.se_blocks = nn.ModuleList(se_blocks)
        self.branch_order = branch_order

    def extra_repr(self) -> str:
        return f"branch_order={self.branch_order!r}"

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x [N, S*C, H, W] -> [N, S*C', H', W'].

        With `return_attention` also the attention [N, S, C'], as of :class:`PSAModule`.
        """
        name = type(self).__name__
        check_tensor(f"{name}: x", x)
        asked = asks_for_attention(name, return_attention)
        feats = self._feats(x)
        weights = [se(feat) for se, feat in zip(self.se_blocks, feats, strict=True)]
        out, attention = _recalibrate(feats, weights, is_reversed(self.branch_order))
        return (out, accumulated(attention)) if asked else out

    def _feats(self, x: Tensor) -> list[Tensor]:
        """The branches' maps, S x [N, C', H', W']."""
        parts = x.chunk(len(self.convs), dim=1)
        return [conv(parts[i]) for i, conv in enumerate(self.convs)]  # torch.fx traces an index


class FusedSplitPSA(NotScriptable, SplitPSA):
    """:class:`SplitPSA` with the attention step fused.

    :func:`epsa_fused.fuse` builds it from External-Attention-pytorch's PSA, once its lists of
    layers are nn.ModuleLists.

    Args:
        convs: S convolutions with outputs of one shape. They are called.
        se_blocks: S nn.Sequential of AdaptiveAvgPool2d(1), 1x1 Conv2d, ReLU, 1x1 Conv2d, Sigmoid.
            Their parameters are read, each once a call. Where a call of them may compute something
            else, SplitPSA's own forward calls them, as in :class:`FusedPSAModule`.
        branch_order: as in :func:`epsa_fused.psa_attention`.

    Raises:
        ValueError: the layers cannot be fused; the message says why.
    """

    def __init__(
        self,
        convs: Iterable[nn.Module],
        se_blocks: Iterable[nn.Module],
        *,
        branch_order: str = "forward",
    ) -> None:
        super().__init__(convs, se_blocks, branch_order=branch_order)
        why = why_not_split_psa(self.convs, self.se_blocks)
        if why is not None:
            raise ValueError(f"FusedSplitPSA: {why}")

    def extra_repr(self) -> str:
        why = self._why_not_fused()
        return super().extra_repr() + (f", not fused: {why}" if why is not None else "")

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x [N, S*C, H, W] -> [N, S*C', H', W'].

        With `return_attention` also the attention [N, S, C'], as of :class:`PSAModule`.
        """
        asked = asks_for_attention("FusedSplitPSA", return_attention)
        if isinstance(x, Proxy):
            leaf = as_leaf(self, x, asked)
            return super().forward(x, bool(asked)) if leaf is None else leaf
        check_tensor("FusedSplitPSA: x", x)
        why = why_not_plain("x", x) or self._why_not_fused()
        if why is not None:
            warn_once(self, why)
            return super().forward(x, bool(asked))
        feats = self._feats(x)
        networks = zip(_layers(self.se_blocks, 1), _layers(self.se_blocks, 3), strict=True)
        return psa_attention(
            feats,
            *read_se(networks),
            branch_order=self.branch_order,
            return_attention=bool(asked),
        )

    def _why_not_fused(self) -> str | None:
        return why_here() or why_not_split_psa(self.convs, self.se_blocks)


def _layers(se_blocks: Iterable[nn.Module], index: int) -> list[nn.Conv2d]:
    return [cast(nn.Conv2d, cast(nn.Sequential, se)[index]) for se in se_blocks]


def _weight_shape(fc: nn.Conv2d) -> list[int]:
    """The shape of the 1x1 convolution's weight; by its settings where no parameter holds it."""
    weight = fc._parameters.get("weight")
    if weight is None:
        return [fc.out_channels, fc.in_channels, *fc.kernel_size]
    return list(weight.shape)
