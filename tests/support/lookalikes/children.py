"""Near misses: their children are more than PSA's, others, or hidden."""

import torch
from support.lookalikes.parts import Shared, convolutions, recalibrated, squeeze
from support.lookalikes.variants import Own, Weighed
from torch import nn


class Uneven(nn.Module):
    """Branches of different channels."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, k + 1, k, padding=k // 2) for k in (3, 5, 7))
        self.ses = nn.ModuleList(squeeze(channels=k + 1) for k in (3, 5, 7))

    def forward(self, x):
        maps = [conv(x) for conv in self.convs]
        return torch.cat([m * se(m) for m, se in zip(maps, self.ses, strict=True)], 1)


class PlainLists(nn.Module):
    """Its layers are hidden from PyTorch, as in External-Attention-pytorch's class."""

    def __init__(self):
        super().__init__()
        self.convs = convolutions()
        self.se_blocks = [squeeze() for _ in range(4)]
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x):
        maps = [conv(part) for conv, part in zip(self.convs, x.chunk(4, 1), strict=True)]
        return recalibrated(maps, [se(m) for se, m in zip(self.se_blocks, maps, strict=True)])


class PlainList(nn.Module):
    """Its branches hold their SE networks and norms, and PyTorch does not know of them."""

    def __init__(self):
        super().__init__()
        self.branches = [Weighed(c, nn.BatchNorm2d(16)) for c in convolutions()]

    def forward(self, x):
        return recalibrated(*zip(*(branch(x) for branch in self.branches), strict=True))


class AndNorms(Shared):
    """The BatchNorms are children beside the convolutions."""

    def __init__(self):
        super().__init__(convolutions(inplans=32))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(4))

    def forward(self, x):
        maps = [n(b(x)) for n, b in zip(self.norms, self.conv_branches, strict=True)]
        return recalibrated(maps, [self.se_block(m) for m in maps])


class Block(Shared):
    """A whole block of a network, with the branches among its other layers."""

    def __init__(self):
        super().__init__(convolutions(inplans=32))
        self.before, self.norm = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(64)

    def forward(self, x):
        return self.norm(super().forward(self.before(x)))


class Bottleneck(Shared):
    """A whole block of EPSANet, with all its layers in one class."""

    def __init__(self):
        super().__init__(convolutions(inplans=64))
        self.conv1, self.bn1 = nn.Conv2d(128, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.bn2, self.conv3 = nn.BatchNorm2d(64), nn.Conv2d(64, 128, 1, bias=False)

    def forward(self, x):
        out = super().forward(self.bn1(self.conv1(x)).relu())
        return x + self.conv3(self.bn2(out).relu())


def with_ses(*ses):
    module = Own()
    module.ses = nn.ModuleList(ses)
    return module


class TwoNames(Shared):
    """The list holds what is there by other names, too."""

    def __init__(self):
        super().__init__()
        self.first, self.second, *_ = self.conv_branches


class WithParameters(Shared):
    def __init__(self):
        super().__init__(convolutions(inplans=32))
        self.factors = nn.ParameterList([torch.ones(1)])

    def forward(self, x):
        return super().forward(x) * self.factors[0]
