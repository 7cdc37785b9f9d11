"""The PSA module in plain PyTorch: the reference of the fused kernels' tests and benchmarks.

Source: EPSANet, arXiv 2105.14447, equations 1 to 8, with the semantics of its published code. All
branches share one SE, the softmax takes the sigmoid's outputs, and branches are concatenated in
reversed order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, cast, overload

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ._checks import check_flag, check_int, check_ints, check_tensor, given
from ._library import MAX_BRANCHES, MIN_BRANCHES

BRANCH_ORDERS = ("reversed", "forward")


def is_reversed(branch_order: str) -> bool:
    """Whether `branch_order` is "reversed"; ValueError unless it is "reversed" or "forward"."""
    if branch_order not in BRANCH_ORDERS:
        raise ValueError(
            f"branch_order: expected one of {BRANCH_ORDERS}, got {branch_order!r} "
            "('reversed' is the order of the published code and its weights)"
        )
    return branch_order == "reversed"


def _conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None, branch: int, out: int) -> Tensor:
    """One SE layer of one branch: x [N, in, 1, 1] -> [N, out, 1, 1]."""
    per_branch = weight.dim() in (3, 5)
    weight = (weight[branch] if per_branch else weight).reshape(out, x.shape[1], 1, 1)
    if bias is not None and per_branch:
        bias = bias[branch]
    return F.conv2d(x, weight, bias)


@overload
def psa_attention_reference(
    feats: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    branch_order: str = ...,
    return_attention: Literal[False] = ...,
) -> Tensor: ...
@overload
def psa_attention_reference(
    feats: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    branch_order: str = ...,
    return_attention: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def psa_attention_reference(
    feats: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    branch_order: str = ...,
    return_attention: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def psa_attention_reference(
    feats: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    branch_order: str = "reversed",
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention step of PSA in plain PyTorch, differentiable to any order.

    Arguments, results and errors of `branch_order` are those of :func:`epsa_fused.psa_attention`.
    Every step follows the published code. With half-precision maps each step rounds to its dtype;
    the SE layers run in that of their weights.
    """
    if not isinstance(feats, Sequence):
        raise TypeError(f"psa_attention_reference: feats: expected a sequence, got {given(feats)}")
    check_flag("return_attention", return_attention)
    c = feats[0].shape[1]
    hidden = fc1_weight.shape[1 if fc1_weight.dim() in (3, 5) else 0]

    # 1. Squeeze and excitation of each branch (eq. 4 and 5).
    weights = []
    for branch, feat in enumerate(feats):
        pooled = F.adaptive_avg_pool2d(feat, 1).to(fc1_weight.dtype)  # [N, C, 1, 1]
        squeezed = F.relu(_conv1x1(pooled, fc1_weight, fc1_bias, branch, hidden))
        weights.append(torch.sigmoid(_conv1x1(squeezed, fc2_weight, fc2_bias, branch, c)))
    out, attention = _recalibrate(feats, weights, is_reversed(branch_order))
    return (out, attention) if return_attention else out


# What record_attention passes for return_attention: it needs no gradient of the attention.
DETACHED = "detached"


def asks_for_attention(name: str, flag: bool | str) -> bool | str:
    """The argument return_attention of a module's call: a bool, or DETACHED.

    torch.fx gives the module that it traces stand-ins for all arguments. Its graph is that of the
    output alone, and refuses another value.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(flag, Proxy):
        torch._assert(flag == False, f"{name}: this graph has no attention")  # noqa: E712
        return False
    if isinstance(flag, Tensor) and torch.jit.is_tracing():
        # The ONNX exporter by TorchScript makes tensors of arguments. The trace holds this value.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            flag = bool(flag)
    if flag is not False and not (isinstance(flag, str) and flag == DETACHED):
        check_flag(f"{name}: return_attention", flag)
    return flag


@torch.fx.wrap  # one node of a graph: a stand-in has no dtype to look at
def accumulated(attention: Tensor) -> Tensor:
    """In the dtype of the fused operators' attention: float64, or float32 for all others."""
    return attention if attention.dtype == torch.float64 else attention.float()


def _recalibrate(
    feats: Sequence[Tensor], weights: Sequence[Tensor], reversed_order: bool
) -> tuple[Tensor, Tensor]:
    """Steps 2 to 4: SE weights [N, C, 1, 1] of each branch -> out, attention [N, S, C]."""
    branches = len(feats)
    n, c, h, w = feats[0].shape

    # 2. Recalibrate the sigmoid's outputs by a softmax across the branches (eq. 6).
    attention = torch.softmax(torch.cat(list(weights), 1).view(n, branches, c, 1, 1), dim=1)

    # 3. Multiply each map by the attention of its channels (eq. 7).
    maps = torch.cat(list(feats), 1).view(n, branches, c, h, w)
    products = maps * attention.to(maps.dtype)

    # 4. Concatenate (eq. 8). The published code prepends each branch to the earlier ones.
    out = products[:, 0]
    for branch in range(1, branches):
        pair = (products[:, branch], out)
        out = torch.cat(pair if reversed_order else pair[::-1], 1)
    return out, attention.flatten(2)


class SEWeight(nn.Module):
    """The squeeze-and-excitation network (arXiv 1709.01507): weights of a map's channels.

    Args:
        channels: C of the maps.
        reduction: channels per hidden unit.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // reduction, kernel_size=1)
        self.relu = nn.ReLU()  # in place it would refuse hooks of gradients on fc1
        self.fc2 = nn.Conv2d(channels // reduction, channels, kernel_size=1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C, 1, 1], in (0, 1)."""
        return cast(Tensor, self.sigmoid(self.fc2(self.relu(self.fc1(self.avg_pool(x))))))


def _check_configuration(
    inplans: int,
    planes: int,
    conv_kernels: Sequence[int],
    stride: int,
    conv_groups: Sequence[int],
    reduction: int,
    dilation: int,
) -> None:
    """Raise ValueError or TypeError if no PSA module can be built from these arguments."""
    check_ints("conv_kernels", conv_kernels)
    check_ints("conv_groups", conv_groups)
    branches = len(conv_kernels)
    if len(conv_groups) != branches:
        raise ValueError(
            f"conv_kernels and conv_groups: expected equal lengths, got {branches} "
            f"({tuple(conv_kernels)}) and {len(conv_groups)} ({tuple(conv_groups)})"
        )
    if not MIN_BRANCHES <= branches <= MAX_BRANCHES:
        raise ValueError(
            f"conv_kernels: expected {MIN_BRANCHES} to {MAX_BRANCHES} branches, got {branches}"
        )
    for name, value in (
        ("inplans", inplans),
        ("planes", planes),
        ("stride", stride),
        ("reduction", reduction),
        ("dilation", dilation),
    ):
        check_int(name, value, 1)
    for i, kernel in enumerate(conv_kernels):
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"conv_kernels[{i}]: expected an odd kernel size, got {kernel}")
    if planes % branches:
        raise ValueError(f"planes: expected a multiple of the {branches} branches, got {planes}")
    channels = planes // branches
    for i, groups in enumerate(conv_groups):
        if groups < 1 or inplans % groups or channels % groups:
            raise ValueError(
                f"conv_groups[{i}]: expected a divisor of inplans = {inplans} and of "
                f"planes // branches = {channels}, got {groups}"
            )
    if channels < reduction:
        raise ValueError(
            f"reduction: expected at most planes // branches = {channels}, got {reduction}, "
            f"which leaves the SE no hidden unit; reduction={channels} gives one"
        )


class PSAModule(nn.Module):
    """Pyramid Squeeze Attention in plain PyTorch; equation numbers from arXiv 2105.14447.

    S grouped convolutions, one per entry of `conv_kernels`, each map x [N, inplans, H, W] to
    [N, planes / S, H', W']. :func:`psa_attention_reference` then weighs their channels by the
    layers of `se`. The output is [N, planes, H', W'].

    Args:
        inplans: input channels.
        planes: output channels, a multiple of the number of branches S.
        conv_kernels: kernel size of each branch, odd; 2 to 8 branches.
        stride: stride of every convolution; H' = ceil(H / stride).
        conv_groups: groups of each branch's convolution.
        reduction: channels of a branch per hidden unit of the SE (16 in the published code).
        branch_order: "reversed" as in the published code and in weights trained with it, or
            "forward" as in the paper's equation 8.
        dilation: of every convolution. The padding grows with it, so H' and W' stay.

    The `state_dict` keys are those of the published code: conv_1.weight, ..., se.fc1.weight,
    se.fc1.bias, se.fc2.weight, se.fc2.bias.

    Raises:
        ValueError, TypeError: the module cannot be built; the message names the argument.
    """

    def __init__(
        self,
        inplans: int,
        planes: int,
        conv_kernels: Sequence[int] = (3, 5, 7, 9),
        stride: int = 1,
        conv_groups: Sequence[int] = (1, 4, 8, 16),
        *,
        reduction: int = 16,
        branch_order: str = "reversed",
        dilation: int = 1,
    ) -> None:
        super().__init__()
        _check_configuration(
            inplans, planes, conv_kernels, stride, conv_groups, reduction, dilation
        )
        is_reversed(branch_order)
        self.branches = len(conv_kernels)
        self.split_channel = planes // self.branches
        self.branch_order = branch_order
        for i, (kernel, groups) in enumerate(zip(conv_kernels, conv_groups, strict=True), 1):
            conv = nn.Conv2d(
                inplans,
                self.split_channel,
                kernel,
                stride=stride,
                padding=dilation * (kernel // 2),
                dilation=dilation,
                groups=groups,
                bias=False,
            )
            self.add_module(f"conv_{i}", conv)
        self.se = SEWeight(self.split_channel, reduction)

    def extra_repr(self) -> str:
        return f"branch_order={self.branch_order!r}"

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x [N, inplans, H, W] -> [N, planes, H', W'].

        With `return_attention` also the attention [N, S, C], indexed by branch (not by slot), in
        float32 (float64 for float64). Both are differentiable.
        """
        name = type(self).__name__
        check_tensor(f"{name}: x", x)
        asked = asks_for_attention(name, return_attention)
        feats = self._feats(x)
        attention = self._own_attention()
        # that of a subclass may know no other argument
        return attention(feats, return_attention=True) if asked else attention(feats)

    @overload
    def attention(self, feats: list[Tensor], return_attention: Literal[False] = ...) -> Tensor: ...
    @overload
    def attention(
        self, feats: list[Tensor], return_attention: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def attention(
        self, feats: list[Tensor], return_attention: bool
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def attention(
        self, feats: list[Tensor], return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The attention step on the branches' maps, S x [N, C, H, W] -> [N, S*C, H, W].

        With `return_attention` also the attention [N, S, C].
        """
        out, attention = _recalibrate(feats, self._weights(feats), is_reversed(self.branch_order))
        return (out, accumulated(attention)) if return_attention else out

    # Where the layers are; AdoptedPSA has them elsewhere.

    def _own_attention(self) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
        return self.attention

    def _convs(self) -> list[nn.Module]:
        """What makes each branch's map."""
        return [getattr(self, f"conv_{i + 1}") for i in range(self.branches)]

    def _feats(self, x: Tensor) -> list[Tensor]:
        """The branches' maps, S x [N, C, H', W']."""
        return [conv(x) for conv in self._convs()]

    def _weights(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """The SE's weights of each branch, S x [N, C, 1, 1]."""
        return [self.se(feat) for feat in feats]
