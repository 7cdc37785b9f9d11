"""Small networks for small images, such as the digits and CIFAR-10 of the training command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from ..reference import SEWeight
from .block import EPSABlock
from .registry import register

EXPANSION = 2


class SmallOptions(TypedDict, total=False):
    """The options of :class:`SmallResNet`; see there."""

    in_chans: int
    drop_rate: float
    planes: tuple[int, ...]


class SEBlock(nn.Module):
    """The bottleneck block of SENet (arXiv 1709.01507).

    It differs from :class:`EPSABlock` in two ways: a 3x3 convolution replaces the PSA module, and
    SE weights scale the output's channels before the shortcut is added.

    x [N, inplanes, H, W] -> [N, planes * expansion, H / stride, W / stride], rounded up.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        outplanes = planes * expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.se = SEWeight(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return cast(Tensor, self.relu(out * self.se(out) + identity))


class SmallResNet(nn.Module):
    """A ResNet for images of 8x8 to 32x32: a 3x3 stem, then one bottleneck block per stage.

    images [N, in_chans, H, W] -> logits [N, num_classes]. Every stage but the first halves H and W.

    Args:
        block: called as block(inplanes, planes, stride, downsample, expansion=...).
        num_classes, in_chans, drop_rate: as of :class:`epsa_fused.EPSANet`.
        planes: of each stage's block. PSA with fewer than 64 needs other groups and reduction.
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        num_classes: int,
        *,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        planes: tuple[int, ...] = (64, 128),
    ) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        channels = planes[0]
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stages = nn.Sequential()
        for i, width in enumerate(planes):
            stride, out = (1 if i == 0 else 2), width * EXPANSION
            downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
            )
            self.stages.append(block(channels, width, stride, downsample, expansion=EXPANSION))
            channels = out
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return cast(Tensor, self.fc(F.dropout(x, self.drop_rate, self.training)))


@register()
def small_epsanet(
    num_classes: int,
    *,
    fused: bool = True,
    conv_groups: Sequence[int] = (1, 4, 8, 16),
    reduction: int = 16,
    **options: Unpack[SmallOptions],
) -> SmallResNet:
    """A :class:`SmallResNet` with PSA modules, fused or plain."""
    block = partial(EPSABlock, fused=fused, conv_groups=conv_groups, reduction=reduction)
    return SmallResNet(block, num_classes, **options)


@register()
def small_senet(
    num_classes: int, *, fused: bool = True, **options: Unpack[SmallOptions]
) -> SmallResNet:
    """A :class:`SmallResNet` with SE, as deep as :func:`small_epsanet`.

    `fused` has no effect: the network has nothing to fuse.
    """
    return SmallResNet(SEBlock, num_classes, **options)
