"""Modules that compute PSA, as people write them: fuse() takes each of them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from support import published
from support.lookalikes.in_branches import strided
from support.lookalikes.parts import (
    GROUPS,
    Shared,
    convolution,
    convolutions,
    dilated,
    external_psa,
    published_psa,
    recalibrated,
    squeeze,
    with_norm,
)
from torch import nn


class Gate(nn.Module):
    """An SE network with Linear layers, of a class of its own."""

    def __init__(self):
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        layers = (nn.Linear(16, 4, bias=False), nn.ReLU(), nn.Linear(4, 16, bias=False))
        self.excite = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, x):
        return self.excite(self.squeeze(x).flatten(1)).view(x.shape[0], -1, 1, 1)


class Layers(nn.Module):
    """An SE network whose layers are in a list."""

    def __init__(self):
        super().__init__()
        self.fcs = nn.ModuleList((nn.Conv2d(16, 5, 1), nn.Conv2d(5, 16, 1)))

    def forward(self, x):
        return self.fcs[1](self.fcs[0](x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Own(nn.Module):
    """An SE network for each branch, beside a list of convolutions of the whole input."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(convolutions())
        self.ses = nn.ModuleList(squeeze(bias=False) for _ in range(4))

    def forward(self, x):
        maps = [conv(x) for conv in self.convs]
        return recalibrated(maps, [self.ses[i % len(self.ses)](m) for i, m in enumerate(maps)])


class Numbered(nn.Module):
    """conv1 ... se4, the last branch first; pooling and sigmoid are functions."""

    def __init__(self):
        super().__init__()
        for i, conv in enumerate(convolutions(bias=True), 1):
            setattr(self, f"conv{i}", conv)
            setattr(
                self, f"se{i}", nn.Sequential(nn.Conv2d(16, 2, 1), nn.ReLU(), nn.Conv2d(2, 16, 1))
            )

    def forward(self, x):
        maps = [getattr(self, f"conv{i}")(input=x) for i in (4, 3, 2, 1)]
        pooled = [F.adaptive_avg_pool2d(m, 1) for m in maps]
        weights = [getattr(self, f"se{4 - i}")(p).sigmoid() for i, p in enumerate(pooled)]
        return recalibrated(maps, weights)


class Flat(nn.Module):
    """The SE's layers are children of the module itself."""

    def __init__(self, layer=nn.Conv2d):
        super().__init__()
        self.pyramid = nn.ModuleList(convolutions())
        size = (1,) if layer is nn.Conv2d else ()
        self.down, self.up = layer(16, 4, *size), layer(4, 16, *size)
        self.act, self.gate = nn.ReLU(), nn.Sigmoid()

    def forward(self, x):
        maps = [conv(x) for conv in self.pyramid]
        pooled = [m.mean((2, 3), keepdim=isinstance(self.up, nn.Conv2d)) for m in maps]
        weights = [self.gate(self.up(self.act(self.down(p)))) for p in pooled]
        return recalibrated(maps, [w.reshape(*w.shape[:2], 1, 1) for w in weights])


class TwoLists(nn.Module):
    """First layers and second layers of the SE networks in a list each."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(convolutions())
        self.fc1 = nn.ModuleList(nn.Linear(16, 3) for _ in range(4))
        self.fc2 = nn.ModuleList(nn.Linear(3, 16) for _ in range(4))

    def forward(self, x):
        maps = [conv(x) for conv in self.convs]
        weights = [
            b(F.relu(a(m.mean((2, 3))))).sigmoid()[..., None, None]
            for a, b, m in zip(self.fc1, self.fc2, maps, strict=True)
        ]
        return recalibrated(maps, weights)


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.wide = convolution(3), convolution(7, 4)
        self.pixel = convolution(1)

    def forward(self, x):
        return self.small(x), self.wide(x), self.pixel(x)


class Weighed(nn.Module):
    """A branch that holds its SE network, and gives its map and its weights."""

    def __init__(self, conv, norm=None):
        super().__init__()
        self.conv, self.norm, self.se = conv, norm or nn.Identity(), squeeze()

    def forward(self, x):
        out = self.norm(self.conv(x))
        return out, self.se(out)


class OfWeighed(nn.Module):
    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return recalibrated(*zip(*(branch(x) for branch in self.branches), strict=True))


def weighed(**options):
    return [Weighed(conv) for conv in convolutions(**options)]


class Named(nn.Module):
    """Its children have the names of an attribute and of a method of the fused module."""

    def __init__(self, branches="branches", se="attention"):
        super().__init__()
        self.names = branches, se
        setattr(self, branches, nn.ModuleList(convolutions()))
        setattr(self, se, squeeze())

    def forward(self, x):
        branches, se = (self._modules[name] for name in self.names)
        maps = [branch(x) for branch in branches]
        return recalibrated(maps, [se(m) for m in maps])


class AndUnused(Shared):
    """A norm without tensors, whose class in torch loads old files in a way of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm2d(16)


class AtOnce(nn.Module):
    """One call of the SE network for all maps, and the output written in slices."""

    def __init__(self):
        super().__init__()
        self.few, self.many = convolution(3, bias=True), convolution(5, 4)  # one bias
        self.excite = nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU(True), nn.Linear(8, 16))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        maps = torch.stack((self.few(x), self.many(x)), 1)
        n, s, c, h, w = maps.shape
        weights = torch.sigmoid(self.excite(maps.mean(dim=[3, 4]).view(n * s, c)))
        weights = self.softmax(weights.view(n, s, c).permute(0, 2, 1)).permute(0, 2, 1)
        out = x.new_empty(n, s * c, h, w)
        for i in range(s):
            out[:, i * c : (i + 1) * c] = maps[:, i] * weights[:, i, :, None, None]
        return out


def squeeze_and_flatten():
    ends = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()), nn.Unflatten(1, (16, 1, 1))
    layers = (nn.Linear(16, 4), nn.ReLU(inplace=True), nn.Linear(4, 16), nn.Sigmoid())
    return nn.Sequential(ends[0], *layers, ends[1])


class Joined(nn.Module):
    """The maps come as one tensor; the softmax is written out."""

    def __init__(self):
        super().__init__()
        self.spc = JoinedPyramid()
        self.weighting = nn.ModuleList(squeeze() for _ in range(4))

    def forward(self, x):
        maps = self.spc(x).chunk(4, 1)
        powers = [se(m).exp() for se, m in zip(self.weighting, maps, strict=True)]
        return torch.cat([m * (p / sum(powers)) for m, p in zip(maps, powers, strict=True)], 1)


class JoinedPyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(convolutions(inplans=32))

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], 1)


class Held(nn.Module):
    """The paper's parts as classes: the convolutions of three branches are in one module."""

    def __init__(self):
        super().__init__()
        self.spc, self.se_weight = Pyramid(), Gate()

    def forward(self, x):
        maps = self.spc(x)
        return recalibrated(maps, [self.se_weight(m) for m in maps])


class Parts(nn.Module):
    """Each branch takes its own part of the input; other names than External-Attention's."""

    def __init__(self):
        super().__init__()
        self.paths = nn.ModuleList(convolutions(bias=True))
        self.weighers = nn.ModuleList(Gate() for _ in range(4))

    def forward(self, x):
        maps = [path(part) for path, part in zip(self.paths, x.chunk(4, 1), strict=True)]
        return recalibrated(maps, [w(m) for w, m in zip(self.weighers, maps, strict=True)])


class PartsInOrder(Shared):
    """It takes as many parts of the input as there are."""

    def forward(self, x):
        maps = [branch(p) for branch, p in zip(self.conv_branches, x.split(16, 1), strict=False)]
        return recalibrated(maps, [self.se_block(m) for m in maps])


class Adapted(nn.Module):
    """As low-rank adapters wrap a layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def separable():
    """Each branch a depthwise convolution and a grouped 1x1 convolution."""
    deep = (nn.Conv2d(16, 16, k, padding=k // 2, groups=16) for k in (3, 5, 7, 9))
    return [nn.Sequential(conv, convolution(1, g)) for conv, g in zip(deep, GROUPS, strict=True)]


def with_convs(convs, module=None):
    """The published module with other convolutions."""
    module = module or published_psa()
    for i, conv in enumerate(convs, 1):
        setattr(module, f"conv_{i}", conv)
    return module


def with_adapter():
    module = published_psa()
    module.conv_4 = Adapted(module.conv_4)
    return module


def in_a_sequential(module):
    """The list of convolutions as a Sequential, which forward takes apart."""
    module.convs = nn.Sequential(*module.convs)
    return module


class InOrder(published.PSAModule):
    """The paper's equation: branches in their order."""

    def forward(self, x):
        return torch.cat(super().forward(x).chunk(4, 1)[::-1], 1)


class LooksIntoBranches(Shared):
    def forward(self, x):
        assert all(type(branch[1]) is nn.BatchNorm2d for branch in self.conv_branches)
        return super().forward(x)


@dataclass(frozen=True)
class Variant:
    """A module that fuse() takes.

    Attributes:
        make: builds it.
        kind: the name of the class that comes in its place.
        order: the order of the branches.
        in_part: whether its convolutions are called, and the attention step alone is fused.
        channels: of the input.
    """

    make: object
    kind: str = "FusedAdoptedPSA"
    order: str = "forward"
    in_part: bool = False
    channels: int = 16


PUBLISHED = {"kind": "FusedPSAModule", "order": "reversed"}
VARIANTS = {
    "published": Variant(published_psa, **PUBLISHED),
    "published_in_order": Variant(lambda: published_psa(InOrder), "FusedPSAModule"),
    "bias": Variant(lambda: with_convs(convolutions(bias=True)), **PUBLISHED),
    "dilation": Variant(lambda: with_convs(dilated()), **PUBLISHED),
    "dilation_and_bias": Variant(lambda: with_convs(dilated(bias=True)), **PUBLISHED),
    "dilation_and_a_pixel": Variant(lambda: with_convs([*dilated()[:3], convolution(1)]),
        **PUBLISHED),
    "separable": Variant(lambda: with_convs(separable()), order="reversed", in_part=True),
    "stride": Variant(lambda: with_convs(convolutions(stride=2)), **PUBLISHED),
    "padding_mode": Variant(lambda: with_convs(convolutions(padding_mode="reflect")),
        **PUBLISHED, in_part=True),
    "padding_same": Variant(lambda: with_convs(convolutions(padding="same")),
        **PUBLISHED, in_part=True),
    "adapter": Variant(with_adapter, order="reversed", in_part=True),
    "list_and_sequential_se": Variant(Shared),
    "list_and_own_class_of_se": Variant(lambda: Shared(se=Gate())),
    "list_and_published_se": Variant(lambda: Shared(se=published.SEWeightModule(16, 8))),
    "two_branches": Variant(lambda: Shared([convolution(1), convolution(3, 4)])),
    "a_list_of_two_layers": Variant(lambda: Shared(se=Layers())),
    "padded_by_a_layer": Variant(lambda: Shared([convolution(1),
        nn.Sequential(nn.ReflectionPad2d(1), convolution(3, padding=0))]), in_part=True),
    "strided_and_one_with_a_norm": Variant(lambda: Shared(strided()), in_part=True),
    "list_of_dilated": Variant(lambda: Shared(dilated(bias=True))),
    "norm": Variant(lambda: Shared(with_norm()), in_part=True),
    "branches_are_looked_into": Variant(lambda: LooksIntoBranches(with_norm()), in_part=True),
    "norm_and_relu": Variant(lambda: Shared(with_norm(nn.ReLU(inplace=True))), in_part=True),
    "one_se_for_each_branch": Variant(Own),
    "numbered": Variant(Numbered, order="reversed"),
    "se_without_a_module": Variant(Flat),
    "se_of_linear_layers": Variant(lambda: Flat(nn.Linear)),
    "se_in_two_lists": Variant(TwoLists),
    "branches_in_a_module": Variant(Held),
    "branches_hold_their_se": Variant(lambda: OfWeighed(weighed())),
    "branches_hold_their_se_and_norms": Variant(lambda: OfWeighed(map(Weighed, with_norm())),
        in_part=True),
    "names_of_ours": Variant(Named),
    "names_of_methods": Variant(lambda: Named("unpack", "prepack")),
    "an_unused_norm": Variant(AndUnused),
    "at_once": Variant(AtOnce),
    "se_between_flatten_and_unflatten": Variant(lambda: Shared(se=squeeze_and_flatten())),
    "joined_maps": Variant(Joined, channels=32),
    "external": Variant(external_psa, "FusedSplitPSA", channels=64),
    "parts": Variant(Parts, in_part=True, channels=64),
    "parts_in_order": Variant(PartsInOrder, in_part=True, channels=64),
    "parts_in_a_sequential": Variant(lambda: in_a_sequential(external_psa()),
        in_part=True, channels=64),
}  # fmt: skip  # fmt: skip
