"""What modules like a PSA module are made of."""

import torch
from support import published
from torch import nn

GROUPS = (1, 2, 4, 8)


def published_psa(cls=published.PSAModule):
    return cls(16, 64, conv_groups=GROUPS)


def external_psa(cls=published.ExternalPSA, branches=4):
    return cls(16 * branches, S=branches)


def convolution(kernel, groups=1, *, inplans=16, bias=False, dilation=1, **options):
    padding = options.pop("padding", dilation * (kernel // 2))
    return nn.Conv2d(inplans, 16, kernel, padding=padding, groups=groups, bias=bias,
                     dilation=dilation, **options)  # fmt: skip  # fmt: skip


def convolutions(**options):
    return [convolution(k, g, **options) for k, g in zip((3, 5, 7, 9), GROUPS, strict=True)]


def dilated(**options):
    return [convolution(3, dilation=d, **options) for d in (1, 2, 3, 4)]


def with_norm(*more):
    return [nn.Sequential(conv, nn.BatchNorm2d(16), *more) for conv in convolutions()]


def squeeze(bias=True, channels=16):
    """An SE network, all of it in one Sequential."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(channels, 4, 1, bias=bias),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, channels, 1, bias=bias),
        nn.Sigmoid(),
    )


def recalibrated(maps, weights):
    """The maps times the softmax of their weights across the branches, in their order."""
    scales = torch.stack(weights, 1).softmax(1)
    return torch.cat([m * scales[:, i] for i, m in enumerate(maps)], 1)


class Shared(nn.Module):
    """Branches in a list, and one SE network for all."""

    def __init__(self, branches=None, se=None):
        super().__init__()
        self.conv_branches = nn.ModuleList(branches or convolutions())
        self.se_block = se or squeeze()

    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        return recalibrated(maps, [self.se_block(m) for m in maps])
