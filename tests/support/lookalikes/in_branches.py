"""Near misses that show in their own branches alone: in place, in common, or of unequal sizes."""

import torch
import torch.nn.functional as F
from support.lookalikes.parts import Shared, convolution, convolutions, recalibrated, with_norm
from torch import nn


def in_place_first():
    """Branches that overwrite what they are given."""
    return [nn.Sequential(nn.ReLU(inplace=True), conv) for conv in convolutions()]


class ClonedForBranches(Shared):
    """Its branches overwrite copies of its input."""

    def forward(self, x):
        maps = [branch(x.clone()) for branch in self.conv_branches]
        return recalibrated(maps, [self.se_block(m) for m in maps])


class LastBranchFirst(Shared):
    """It calls its branches in the other order."""

    def forward(self, x):
        x = x * 1
        maps = [branch(x) for branch in reversed(self.conv_branches)][::-1]
        return recalibrated(maps, [self.se_block(m) for m in maps])


def with_one_in_place():
    return [*convolutions()[:3], in_place_first()[3]]


def with_one_norm():
    norm = nn.BatchNorm2d(16)
    return [nn.Sequential(conv, norm) for conv in convolutions()]


class Resized(Shared):
    """Its branches make maps of unequal sizes."""

    def __init__(self):
        pooled = nn.Sequential(nn.MaxPool2d(2), convolution(1))
        strided = nn.Sequential(convolution(5, stride=2), nn.BatchNorm2d(16))
        super().__init__([*with_norm()[:1], strided, pooled])

    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        maps = [F.interpolate(m, size=maps[0].shape[2:]) for m in maps]
        return recalibrated(maps, [self.se_block(m) for m in maps])


class OnlyOnGPUs(nn.Conv2d):
    """As kernels in CUDA alone."""

    def forward(self, x):
        if not x.is_cuda:
            raise NotImplementedError("not implemented on the CPU")
        return super().forward(x)


def on_gpus():
    return [OnlyOnGPUs(16, 16, k, padding=k // 2) for k in (3, 5, 7)]


def strided():
    """Strided branches, of which one has a norm."""
    convs = convolutions(stride=2)
    return [*convs[:3], nn.Sequential(convs[3], nn.BatchNorm2d(16))]


class WithConstant(nn.Module):
    """A convolution behind a filter that is neither a parameter nor a buffer."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.filter = torch.full((16, 1, 3, 3), 1 / 9)

    def forward(self, x):
        return self.conv(F.conv2d(x, self.filter, padding=1, groups=16))


def pooling():
    """Branches that need maps of some size, and draw random numbers in training."""
    pools = (nn.AvgPool2d(k) for k in (4, 4, 4))
    convs = [nn.Sequential(p, conv) for p, conv in zip(pools, convolutions()[:3], strict=True)]
    return [nn.Sequential(*conv, nn.Dropout2d(0.5)) for conv in convs]
