"""Modules that look like a PSA module: what people made of the published one."""

import warnings

import torch
from support import published
from torch import nn

GROUPS = (1, 2, 4, 8)


def published_psa(cls=published.PSAModule):
    return cls(16, 64, conv_groups=GROUPS)


def external_psa(cls=published.ExternalPSA, branches=4):
    return cls(16 * branches, S=branches)


class InOrder(published.PSAModule):
    """The paper's equation: branches in their order."""

    def forward(self, x):
        return torch.cat(super().forward(x).chunk(4, 1)[::-1], 1)


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


def description(model):
    """All that fuse() must leave alone in a model that it does not change."""
    modules = [(name, type(m), id(m), m.training) for name, m in model.named_modules()]
    tensors = [(k, id(v), v._version) for k, v in [*model.named_parameters()]]
    return modules, tensors, [*model.state_dict()]


def without_warning(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **options)
