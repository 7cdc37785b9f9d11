"""Subclasses of the published modules whose forward is another."""

import torch
import torch.nn.functional as F
from support import published
from torch import nn


class Overwriting(published.ExternalPSA):
    """Some copies write each convolution's result over the part that it came from."""

    def forward(self, x):
        n, c, h, w = x.shape
        maps = x.view(n, self.S, c // self.S, h, w)
        for i, conv in enumerate(self.convs):
            maps[:, i] = conv(maps[:, i])
        weights = torch.stack([se(maps[:, i]) for i, se in enumerate(self.se_blocks)], dim=1)
        return (maps * self.softmax(weights.expand_as(maps))).view(n, c, h, w)


class WithShortcut(published.PSAModule):
    def forward(self, x):
        return super().forward(x) + self.conv_1(x).repeat(1, 4, 1, 1)


class WithoutSigmoid(published.PSAModule):
    def forward(self, x):
        self.se.sigmoid.forward = lambda x: x
        out = super().forward(x)
        del self.se.sigmoid.forward
        return out


class ReadsSE(published.PSAModule):
    """It computes something else with the weights of its SE network, which it does not call."""

    def forward(self, x):
        maps = [getattr(self, f"conv_{i}")(x) for i in (1, 2, 3, 4)]
        weights = [F.conv2d(m.mean((2, 3), keepdim=True), self.se.fc1.weight) for m in maps]
        return torch.cat([m * w for m, w in zip(maps, weights, strict=True)], 1)


class WithoutReLU(published.PSAModule):
    def forward(self, x):
        self.se.relu.forward = lambda x: x
        out = super().forward(x)
        del self.se.relu.forward
        return out


class Sum(published.PSAModule):
    """Another shape."""

    def forward(self, x):
        return sum(super().forward(x).chunk(4, 1))


class WithDropout(published.PSAModule):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Keeping(published.PSAModule):
    """As visualisations of the attention do."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Failing(published.PSAModule):
    def forward(self, x):
        raise NotImplementedError("of no use")
