"""Blocks of other kinds with branches or SE networks, which nobody wants a word about."""

import torch
import torch.nn.functional as F
from support.lookalikes.parts import Shared, convolution, convolutions, recalibrated, squeeze
from torch import nn


class Cascade(Shared):
    """Each branch adds the map of the one before it to its input."""

    def forward(self, x):
        maps = [self.conv_branches[0](x)]
        for branch in self.conv_branches[1:]:
            maps.append(branch(x + maps[-1]))
        return recalibrated(maps, [self.se_block(m) for m in maps])


class FailingCascade(Cascade):
    def forward(self, x):
        super().forward(x)
        raise NotImplementedError


class Chain(nn.Module):
    """A bottleneck with an SE, as in RegNet: its convolutions follow each other."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = convolution(1), convolution(3, 2)
        self.se, self.conv3 = squeeze(), convolution(1)

    def forward(self, x):
        out = self.conv2(self.conv1(x).relu()).relu()
        return self.conv3(out * self.se(out)) + x


class Added(nn.Module):
    """Two branches whose sum has an SE, as in MobileOne."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.se = convolution(3), convolution(1), squeeze()

    def forward(self, x):
        out = self.wide(x) + self.narrow(x)
        return out * self.se(out)


class TwoInputs(Added):
    """As the fusion modules of BiSeNet."""

    def forward(self, x, y):
        out = self.wide(x) + self.narrow(y)
        return out * self.se(out)


class SE(nn.Module):
    """It weighs its input, as in timm."""

    def __init__(self, channels):
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x):
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def units(inplans, *channels_and_kernels):
    """Convolutions, each with a BatchNorm and a ReLU."""
    layers = []
    for channels, kernel in channels_and_kernels:
        conv = nn.Conv2d(inplans, channels, kernel, padding=kernel // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
        inplans = channels
    return nn.Sequential(*layers)


class MixedConv(nn.ModuleDict):
    """A depthwise convolution of another kernel for each part of the channels."""

    def __init__(self, channels):
        super().__init__()
        for k in (3, 5, 7):
            self[str(k)] = nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels)

    def forward(self, x):
        return torch.cat([conv(p) for conv, p in zip(self.values(), x.chunk(3, 1), strict=True)], 1)


class MixNet(nn.Module):
    """An inverted residual of MixNet."""

    def __init__(self):
        super().__init__()
        self.conv_pw, self.bn1 = nn.Conv2d(24, 48, 1, bias=False), nn.BatchNorm2d(48)
        self.conv_dw, self.bn2 = MixedConv(16), nn.BatchNorm2d(48)
        self.se, self.conv_pwl, self.bn3 = SE(48), nn.Conv2d(48, 24, 1), nn.BatchNorm2d(24)

    def forward(self, x):
        hidden = F.silu(self.bn1(self.conv_pw(x)))
        hidden = F.silu(self.bn2(self.conv_dw(hidden)))
        return self.bn3(self.conv_pwl(self.se(hidden)))


class MixNetWithoutExpansion(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_dw, self.se = MixedConv(16), SE(48)

    def forward(self, x):
        return self.se(self.conv_dw(x))


class Inception(nn.Module):
    """SE-Inception: the SE sees the channels of all branches."""

    def __init__(self):
        super().__init__()
        self.a, self.b = units(64, (32, 1)), units(64, (16, 1), (32, 3))
        self.c = units(64, (16, 1), (32, 5))
        self.d = nn.Sequential(nn.MaxPool2d(3, 1, 1), *units(64, (32, 1)))
        self.se = SE(128)

    def forward(self, x):
        return self.se(torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1))


class Patches(nn.Module):
    """CrossFormer's patches of several sizes, with an SE."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 32, k, 4, (k - 4) // 2) for k in (4, 8, 16))
        self.se = SE(96)

    def forward(self, x):
        return self.se(torch.cat([conv(x) for conv in self.convs], 1))


class Bottleneck(nn.Module):
    """Several kernels between two 1x1 convolutions, and no SE."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(48, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.k3, self.k5, self.k7 = convolutions()[:3]
        self.conv3, self.bn3 = nn.Conv2d(16, 48, 1, bias=False), nn.BatchNorm2d(48)

    def forward(self, x):
        hidden = self.bn1(self.conv1(x)).relu()
        return x + self.bn3(self.conv3(self.k3(hidden) + self.k5(hidden) + self.k7(hidden)))


class MonaConvs(nn.Module):
    def __init__(self):
        super().__init__()
        kernels = (3, 5, 7)
        self.conv1, self.conv2, self.conv3 = (convolution(k, 16) for k in kernels)
        self.projector = convolution(1)

    def forward(self, x):
        out = (self.conv1(x) + self.conv2(x) + self.conv3(x)) / 3 + x
        return out + self.projector(out)


class Mona(nn.Module):
    """An adapter whose width is that of its three convolutions together."""

    def __init__(self):
        super().__init__()
        self.project1, self.project2 = nn.Linear(48, 16), nn.Linear(16, 48)
        self.adapter_conv, self.norm = MonaConvs(), nn.LayerNorm(48)

    def forward(self, x, size):
        hidden = self.project1(self.norm(x)).transpose(1, 2).unflatten(2, size)
        hidden = self.adapter_conv(hidden).flatten(2).transpose(1, 2)
        return x + self.project2(F.gelu(hidden))


class ConvSE(nn.Module):
    def __init__(self, conv, norm=False):
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels) if norm else nn.Identity()
        self.se = SE(conv.out_channels)

    def forward(self, x):
        return self.se(self.norm(self.conv(x)).relu())


class InARow(nn.Module):
    """Blocks that follow each other."""

    def __init__(self, norm=False):
        super().__init__()
        self.blocks = nn.ModuleList(ConvSE(conv, norm) for conv in convolutions())

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class InARowOfTwoInputs(InARow):
    """No call of one input shows what it does."""

    def forward(self, x, other):
        return super().forward(x + other)


class AllAdded(InARow):
    """D-LinkNet's centre."""

    def forward(self, x):
        maps = [x]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return sum(maps)


class Network(nn.Module):
    def __init__(self, norm=True):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16, 10)
        self.block1, self.block2, self.block3 = (ConvSE(c, norm) for c in convolutions()[:3])

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class SumOfBranches(nn.Module):
    """Dilated branches are added up, and one SE weighs the sum."""

    def __init__(self, norm=False):
        super().__init__()
        convs = [nn.Conv2d(32, 16, 3, padding=d, dilation=d) for d in (1, 2, 4)]
        self.branches = nn.ModuleList(
            nn.Sequential(conv, nn.BatchNorm2d(16)) if norm else conv for conv in convs
        )
        self.se = SE(16)

    def forward(self, x):
        return self.se(sum(branch(x) for branch in self.branches))


class SumOfBranchesWithNorm(SumOfBranches):
    """The BatchNorm is a child beside the branches."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x):
        return self.norm(super().forward(x))


class SumOfTwoInputs(SumOfBranches):
    def forward(self, x, other):
        return super().forward(x) + other


class SumOfALevelEach(SumOfBranches):
    """Its input is a list of maps."""

    def forward(self, x):
        first, second, third = x
        a, b, c = self.branches
        return self.se(a(first) + b(second) + c(third))


class SumOfRows(SumOfBranches):
    """A branch is called on something that is no map, and fails."""

    def __init__(self):
        super().__init__(norm=True)

    def forward(self, x):
        return super().forward(x[0, 0, 0])


class SumAndFail(SumOfBranches):
    def forward(self, x):
        raise RuntimeError(f"no use of {super().forward(x)}")


class BranchesBesideOne(nn.Module):
    """An SE weighs each of three branches, and none the fourth."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(ConvSE(c, norm=True) for c in convolutions(inplans=32)[:3])
        self.last = convolution(1, inplans=32)

    def forward(self, x):
        return torch.cat([*(block(x) for block in self.blocks), self.last(x)], 1)


class Private(nn.Module):
    """A chain whose child has the name of an attribute of the fused modules."""

    def __init__(self, name="_convs"):
        super().__init__()
        self.name = name
        setattr(self, name, nn.ModuleList((convolution(3), convolution(3))))
        self.se = SE(16)

    def forward(self, x):
        out = x
        for conv in self._modules[self.name]:
            out = conv(out).relu()
        return x + self.se(out)


class PerPixel(Shared):
    """No pooling: its layers alone look like those of PSA."""

    def __init__(self):
        super().__init__(convolutions(inplans=32))

    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        return recalibrated(maps, [self.se_block[1:](m) for m in maps])


class JointNetwork(Shared):
    """One SE network sees the channels of all branches."""

    def __init__(self):
        super().__init__(se=squeeze(channels=64))

    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        return recalibrated(maps, self.se_block(torch.cat(maps, 1)).chunk(4, 1))


BLOCKS = {
    "cascade": Cascade,
    "failing": FailingCascade,
    "chain": Chain,
    "added": Added,
    "two_inputs": TwoInputs,
    "mixnet": MixNet,
    "mixnet_without_expansion": MixNetWithoutExpansion,
    "inception": Inception,
    "patches": Patches,
    "bottleneck_of_kernels": Bottleneck,
    "mona": Mona,
    "in_a_row": InARow,
    "in_a_row_with_norms": lambda: InARow(norm=True),
    "in_a_row_of_two_inputs": InARowOfTwoInputs,
    "all_added": AllAdded,
    "all_added_with_norms": lambda: AllAdded(norm=True),
    "network": Network,
    "network_without_norms": lambda: Network(norm=False),
    "sum_of_branches": SumOfBranches,
    "sum_of_branches_with_norms": lambda: SumOfBranches(norm=True),
    "sum_of_branches_with_a_norm": SumOfBranchesWithNorm,
    "sum_of_two_inputs": SumOfTwoInputs,
    "sum_of_a_level_each": SumOfALevelEach,
    "sum_of_rows": SumOfRows,
    "sum_and_fail": SumAndFail,
    "branches_beside_one": BranchesBesideOne,
    "private_convs": Private,
    "private_layers": lambda: Private("_layers"),
    "private_weights": lambda: Private("_weights"),
    "per_pixel": PerPixel,
    "joint_network": JointNetwork,
}
