"""Published PSA code, retyped from its description, to compare the package with.

PSAModule, EPSABlock and EPSANet are murufeng/EPSANet's; ExternalPSA is what
External-Attention-pytorch calls PSA, with nn.ModuleLists in place of its plain lists.
"""

import math

import torch
from torch import nn


class SEWeightModule(nn.Module):
    def __init__(self, channels, reduction=16):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // reduction, kernel_size=1, padding=0)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, kernel_size=1, padding=0)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        x = self.relu(self.fc1(self.avg_pool(x)))
        return self.sigmoid(self.fc2(x))


class PSAModule(nn.Module):
    """Four branches, each put before the earlier ones."""

    def __init__(
        self, inplans, planes, conv_kernels=(3, 5, 7, 9), stride=1, conv_groups=(1, 4, 8, 16)
    ):
        super().__init__()
        for i, (k, g) in enumerate(zip(conv_kernels, conv_groups, strict=True), 1):
            conv = nn.Conv2d(
                inplans, planes // 4, k, stride=stride, padding=k // 2, groups=g, bias=False
            )
            setattr(self, f"conv_{i}", conv)
        self.se = SEWeightModule(planes // 4)
        self.split_channel = planes // 4
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x):
        batch_size = x.shape[0]
        x1, x2, x3, x4 = self.conv_1(x), self.conv_2(x), self.conv_3(x), self.conv_4(x)
        feats = torch.cat((x1, x2, x3, x4), dim=1)
        feats = feats.view(batch_size, 4, self.split_channel, feats.shape[2], feats.shape[3])

        x_se = torch.cat((self.se(x1), self.se(x2), self.se(x3), self.se(x4)), dim=1)
        attention_vectors = x_se.view(batch_size, 4, self.split_channel, 1, 1)
        attention_vectors = self.softmax(attention_vectors)
        feats_weight = feats * attention_vectors
        out = feats_weight[:, 0]
        for i in (1, 2, 3):
            out = torch.cat((feats_weight[:, i], out), 1)
        return out


class EPSABlock(nn.Module):
    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = PSAModule(planes, planes, stride=stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class EPSANet(nn.Module):
    def __init__(self, block, layers, num_classes=1000):
        super().__init__()
        self.inplanes = 64
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layers(block, 64, layers[0])
        self.layer2 = self._make_layers(block, 128, layers[1], stride=2)
        self.layer3 = self._make_layers(block, 256, layers[2], stride=2)
        self.layer4 = self._make_layers(block, 512, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                n = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
                m.weight.data.normal_(0, math.sqrt(2.0 / n))
            elif isinstance(m, nn.BatchNorm2d):
                m.weight.data.fill_(1)
                m.bias.data.zero_()

    def _make_layers(self, block, planes, num_blocks, stride=1):
        downsample = None
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, planes * block.expansion, 1, stride=stride, bias=False),
                nn.BatchNorm2d(planes * block.expansion),
            )
        layers = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes * block.expansion
        for _ in range(1, num_blocks):
            layers.append(block(self.inplanes, planes))
        return nn.Sequential(*layers)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.avgpool(x)
        x = x.view(x.size(0), -1)
        return self.fc(x)


def epsanet50():
    return EPSANet(EPSABlock, [3, 4, 6, 3], num_classes=1000)


def epsanet101():
    return EPSANet(EPSABlock, [3, 4, 23, 3], num_classes=1000)


class ExternalPSA(nn.Module):
    """One SE per branch, without biases; the branches stay in their order."""

    def __init__(self, channel=512, reduction=4, S=4):  # noqa: N803
        super().__init__()
        c = channel // S
        self.S = S
        self.convs = nn.ModuleList(
            nn.Conv2d(c, c, kernel_size=2 * i + 3, padding=i + 1) for i in range(S)
        )
        self.se_blocks = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(c, c // reduction, kernel_size=1, bias=False),
                nn.ReLU(inplace=True),
                nn.Conv2d(c // reduction, c, kernel_size=1, bias=False),
                nn.Sigmoid(),
            )
            for _ in range(S)
        )
        self.softmax = nn.Softmax(dim=1)

    def branch_maps(self, x):
        parts = x.chunk(self.S, dim=1)
        return [conv(part) for conv, part in zip(self.convs, parts, strict=True)]

    def forward(self, x):
        maps = torch.stack(self.branch_maps(x), dim=1)  # [N, S, C, H, W]
        weights = torch.stack([se(maps[:, i]) for i, se in enumerate(self.se_blocks)], dim=1)
        product = maps * self.softmax(weights.expand_as(maps))
        return product.view(x.shape)
