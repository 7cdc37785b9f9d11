"""Modules whose branches and SE networks are given, or give, values of any shape and dtype."""

import torch
import torch.nn.functional as F
from support.lookalikes.blocks import SE
from torch import nn


class CastLinear(nn.Linear):
    """It takes any dtype, as layers for autocast by hand do."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class CastConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Wider(nn.Module):
    """Three branches of 32 channels, whose weighed maps are doubled: no PSA."""

    def __init__(self, conv=nn.Conv2d, layer=nn.Linear):
        super().__init__()
        self.convs = nn.ModuleList(conv(32, 16, k, padding=k // 2) for k in (3, 5, 7))
        size = () if issubclass(layer, nn.Linear) else (1,)
        self.fc1, self.fc2 = layer(16, 4, *size), layer(4, 16, *size)

    def weigh(self, means):
        return self.fc2(self.fc1(means).relu()).sigmoid()

    def weighed(self, maps):
        means = torch.stack([m.mean((2, 3)) for m in maps], 1)
        weights = self.weigh(means).softmax(1)[..., None, None]
        return 2 * torch.cat([m * weights[:, i] for i, m in enumerate(maps)], 1)

    def forward(self, x):
        return self.weighed([conv(x) for conv in self.convs])


class OneByOne(Wider):
    """Its branches are called on maps [C, H, W]."""

    def forward(self, x):
        return torch.cat([self.weighed([conv(one)[None] for conv in self.convs]) for one in x])


class OnlyTheFirst(Wider):
    def forward(self, x):
        return self.weighed([conv(x[0])[None] for conv in self.convs])


class MeansIn(Wider):
    """The SE is given means of another dtype than the maps."""

    def __init__(self, dtype):
        super().__init__(layer=CastLinear)
        self.dtype = dtype

    def weigh(self, means):
        return super().weigh(means.to(self.dtype))


class AllIn(Wider):
    """Maps and weights are computed in one dtype, whatever the input's."""

    def __init__(self, dtype):
        super().__init__(CastConv, CastConv)
        self.dtype = dtype

    def weigh(self, means):
        return super().weigh(means.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)

    def forward(self, x):
        return super().forward(x.to(self.dtype)).to(x.dtype)


class FewChannels(nn.Module):
    """A chain of branches that take one channel each: fewer than there are branches."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(1, 8, k, padding=k // 2) for k in (3, 5, 7))
        self.se = SE(8)

    def forward(self, x):
        first, *parts = x.tensor_split(3, 1)
        out = self.convs[0](first)
        for conv, part in zip(self.convs[1:], parts, strict=True):
            out = conv(part + out.mean(1, keepdim=True))
        return self.se(out)


class TupleLinear(nn.Linear):
    """It gives its bias beside its result, as layers of Megatron do."""

    def forward(self, x):
        return super().forward(x), self.bias


class OfTuples(Wider):
    def __init__(self):
        super().__init__(layer=TupleLinear)

    def weigh(self, means):
        return self.fc2(self.fc1(means)[0].relu())[0].sigmoid()


class Mask(Wider):
    def forward(self, x):
        return super().forward(x) > 0


class Sparse(Wider):
    def forward(self, x):
        return super().forward(x).to_sparse()


class OnMeta(Wider):
    def forward(self, x):
        return super().forward(x).to("meta")


class Nested(Wider):
    def forward(self, x):
        return torch.nested.nested_tensor([*super().forward(x)])


class WithoutTextError(Exception):
    def __str__(self):
        raise ValueError("no text")


class RaisesWithoutText(Wider):
    def forward(self, x):
        raise WithoutTextError


class WeightsRead(Wider):
    """It never calls its SE network."""

    def weigh(self, means):
        hidden = F.linear(means, self.fc1.weight, self.fc1.bias).relu()
        return F.linear(hidden, self.fc2.weight, self.fc2.bias).sigmoid()


class MeansInAMap(Wider):
    """The SE's convolutions are given the means of all maps as one map [N, C, S, 1]."""

    def __init__(self):
        super().__init__(layer=nn.Conv2d)

    def weigh(self, means):
        return super().weigh(means.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)


# With whether they are named: only what calls all its branches and SE networks is.
ODD_CALLS = {
    "one_by_one": (OneByOne, False),
    "only_the_first": (OnlyTheFirst, False),
    "means_in_float32": (lambda: MeansIn(torch.float32), True),
    "means_in_bfloat16": (lambda: MeansIn(torch.bfloat16), True),
    "means_in_half": (lambda: MeansIn(torch.half), True),
    "all_in_bfloat16": (lambda: AllIn(torch.bfloat16), True),
    "all_in_half": (lambda: AllIn(torch.half), True),
    "of_tuples": (OfTuples, True),
    "mask": (Mask, True),
    "few_channels": (FewChannels, False),
    "sparse": (Sparse, True),
    "on_meta": (OnMeta, True),
    "nested": (Nested, True),
    "raises_without_text": (RaisesWithoutText, False),
    "weights_read": (WeightsRead, False),
    "means_as_rows": (Wider, True),
    "means_in_a_map": (MeansInAMap, True),
}
