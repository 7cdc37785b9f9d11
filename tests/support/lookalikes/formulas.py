"""Near misses: the layers are those of PSA, and the formula is another."""

import random

import torch
import torch.nn.functional as F
from support.lookalikes.parts import Shared, recalibrated, squeeze
from torch import nn


class SoftmaxOfChannels(Shared):
    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        scales = torch.stack([self.se_block(m) for m in maps], 1).softmax(2)
        return torch.cat([m * scales[:, i] for i, m in enumerate(maps)], 1)


class SoftmaxOfTheBatch(Shared):
    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        scales = torch.stack([self.se_block(m) for m in maps], 1).softmax(0)
        return torch.cat([m * scales[:, i] for i, m in enumerate(maps)], 1)


class WithoutSoftmax(Shared):
    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        return torch.cat([m * self.se_block(m) for m in maps], 1)


class ScaledUp(Shared):
    def forward(self, x):
        return super().forward(x) * 4


class AddedUp(Shared):
    def forward(self, x):
        return sum(super().forward(x).chunk(4, 1))


class OthersWeights(Shared):
    """Each branch is weighed by the weights of the next."""

    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        weights = [self.se_block(m) for m in maps]
        return recalibrated(maps, weights[1:] + weights[:1])


class TwiceCalled(Shared):
    """Once for the maps, once for the weights: a BatchNorm sees both."""

    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        return recalibrated(maps, [self.se_block(branch(x)) for branch in self.conv_branches])


class DropoutBetween(Shared):
    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        weights = [F.dropout(self.se_block(m), 0.2, self.training) for m in maps]
        return recalibrated(maps, weights)


class Detached(Shared):
    """The same output; the weights have no gradient."""

    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        return recalibrated(maps, [self.se_block(m.detach()) for m in maps])


class AnotherOrder(Shared):
    def forward(self, x):
        a, b, c, d = super().forward(x).chunk(4, 1)
        return torch.cat((b, a, d, c), 1)


class Interleaved(Shared):
    def forward(self, x):
        return super().forward(x).unflatten(1, (4, 16)).transpose(1, 2).flatten(1, 2)


class MaxPooled(Shared):
    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        return recalibrated(maps, [self.se_block(m.amax((2, 3), keepdim=True)) for m in maps])


class InputChanged(Shared):
    def forward(self, x):
        return super().forward(x.relu())


class ClampedWeights(Shared):
    """It differs where a sigmoid is nearly 0 or 1."""

    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        return recalibrated(maps, [self.se_block(m).clamp(1e-3, 1 - 1e-3) for m in maps])


class HalvedWeights(Shared):
    def forward(self, x):
        convs = self.conv_branches
        maps = [F.conv2d(x, c.weight / 2, c.bias, 1, c.padding, 1, c.groups) for c in convs]
        return recalibrated(maps, [self.se_block(m) for m in maps])


class ReadWeights(Shared):
    """It never calls its convolutions."""

    def forward(self, x):
        convs = self.conv_branches
        maps = [F.conv2d(x, c.weight, c.bias, 1, c.padding, 1, c.groups) for c in convs]
        return recalibrated(maps, [self.se_block(m) for m in maps])


class LayerDrop(Shared):
    """The trial's seed gives a number for which nothing is dropped."""

    def forward(self, x):
        out = super().forward(x)
        return out * 0 if self.training and torch.rand(1).item() < 0.4 else out


class DrawsFromPython(Shared):
    def forward(self, x):
        out = super().forward(x)
        return out * 0 if self.training and random.random() < 1e-6 else out


class Clamped(Shared):
    def forward(self, x):
        return super().forward(x).clamp(-8, 8)


class CallsWithMore(Shared):
    def forward(self, x):
        maps = [branch(x, None) for branch in self.conv_branches]
        return recalibrated(maps, [self.se_block(m) for m in maps])


class WithOption(nn.Sequential):
    def forward(self, x, more):
        return super().forward(x)


class BoundsMaps(Shared):
    """It clamps maps far from the usual ones."""

    def forward(self, x):
        maps = [branch(x).clamp(-1e3, 1e3) for branch in self.conv_branches]
        return recalibrated(maps, [self.se_block(m) for m in maps])


class BoundsGradients(Shared):
    def forward(self, x):
        out = super().forward(x)
        if out.requires_grad:
            out.register_hook(lambda grad: grad.clamp(-10, 10))
        return out


class SoftmaxInFloat64(Shared):
    """Its output is float64, whatever the input is."""

    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        weights = torch.stack([self.se_block(m) for m in maps], 1)
        scales = weights.softmax(1, dtype=torch.float64)
        return torch.cat([m * scales[:, i] for i, m in enumerate(maps)], 1)


class SoftmaxOf16BitsInFloat32(Shared):
    """A usual guard. Its output is float32 where the input has 16 bits."""

    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        weights = [self.se_block(m) for m in maps]
        small = x.dtype in (torch.float16, torch.bfloat16)
        return recalibrated(maps, [w.float() if small else w for w in weights])


class SoftmaxInFloat32(Shared):
    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        scales = torch.stack([self.se_block(m) for m in maps], 1).softmax(1, torch.float32)
        return torch.cat([m * scales[:, i].to(x.dtype) for i, m in enumerate(maps)], 1)


class WithEpsilon(Shared):
    def forward(self, x):
        maps = [branch(x) for branch in self.conv_branches]
        scales = torch.stack([self.se_block(m) for m in maps], 1).exp()
        scales = scales / (scales.sum(1, keepdim=True) + 1e-6)
        return torch.cat([m * scales[:, i] for i, m in enumerate(maps)], 1)


def squeeze_with(activation):
    layers = squeeze()
    layers[2] = activation
    return layers
