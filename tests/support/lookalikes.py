"""Modules that look like a PSA module: what people make of the published one."""

import random
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from support import published
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

GROUPS = (1, 2, 4, 8)


def published_psa(cls=published.PSAModule):
    return cls(16, 64, conv_groups=GROUPS)


def external_psa(cls=published.ExternalPSA, branches=4):
    return cls(16 * branches, S=branches)


# ---- variants that compute PSA ----


def convolution(kernel, groups=1, *, inplans=16, bias=False, dilation=1, **options):
    padding = options.pop("padding", dilation * (kernel // 2))
    return nn.Conv2d(inplans, 16, kernel, padding=padding, groups=groups, bias=bias,
                     dilation=dilation, **options)  # fmt: skip


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
    "parts_in_a_sequential": Variant(lambda: in_a_sequential(external_psa()),
        in_part=True, channels=64),
}  # fmt: skip


# ---- near misses: their layers are those of PSA, and they compute something else ----


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


class LooksAtValues(Shared):
    def forward(self, x):
        out = super().forward(x)
        return out if x.mean() < 0.5 else out * 2


class LooksAtSizes(Shared):
    def forward(self, x):
        return super().forward(x if x.shape[2] < x.shape[3] + 2 else x.flip(2))


class LooksAtKernels(Shared):
    def forward(self, x):
        maps = [branch(x) / branch.kernel_size[0] for branch in self.conv_branches]
        return recalibrated(maps, [self.se_block(m) for m in maps])


class Cascade(Shared):
    """Each branch adds the map of the one before it to its input."""

    def forward(self, x):
        maps = [self.conv_branches[0](x)]
        for branch in self.conv_branches[1:]:
            maps.append(branch(x + maps[-1]))
        return recalibrated(maps, [self.se_block(m) for m in maps])


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


class Uneven(nn.Module):
    """Branches of different channels."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, k + 1, k, padding=k // 2) for k in (3, 5, 7))
        self.ses = nn.ModuleList(squeeze(channels=k + 1) for k in (3, 5, 7))

    def forward(self, x):
        maps = [conv(x) for conv in self.convs]
        return torch.cat([m * se(m) for m, se in zip(maps, self.ses, strict=True)], 1)


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


class LooksAtClasses(Shared):
    def forward(self, x):
        maps = [b(x) * (1 + isinstance(b, nn.Sequential)) for b in self.conv_branches]
        return recalibrated(maps, [self.se_block(m) for m in maps])


class LooksAtAttributes(Shared):
    def __init__(self, branches, factor):
        super().__init__(branches)
        for branch in self.conv_branches:
            branch.factor = factor

    def forward(self, x):
        maps = [b(x) * getattr(b, "factor", 1) for b in self.conv_branches]
        return recalibrated(maps, [self.se_block(m) for m in maps])


class LooksAtBuffers(Shared):
    def __init__(self, factor):
        super().__init__()
        for branch in self.conv_branches:
            branch.register_buffer("factor", torch.tensor(factor))

    def forward(self, x):
        maps = [b(x) * getattr(b, "factor", 1) for b in self.conv_branches]
        return recalibrated(maps, [self.se_block(m) for m in maps])


class CallsWithMore(Shared):
    def forward(self, x):
        maps = [branch(x, None) for branch in self.conv_branches]
        return recalibrated(maps, [self.se_block(m) for m in maps])


class WithOption(nn.Sequential):
    def forward(self, x, more):
        return super().forward(x)


class LooksAtParametrizations(Shared):
    def __init__(self):
        super().__init__()
        for branch in self.conv_branches:
            weight_norm(branch)

    def forward(self, x):
        maps = [b(x) * (1 + is_parametrized(b)) for b in self.conv_branches]
        return recalibrated(maps, [self.se_block(m) for m in maps])


class LooksAtDtypes(Shared):
    dtype = torch.float32

    def forward(self, x):
        return super().forward(x) * (1 + (x.dtype == self.dtype))


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


class Checkpointed(Shared):
    reentrant = False

    def forward(self, x):
        if self.training:
            return checkpoint(super().forward, x, use_reentrant=self.reentrant)
        return super().forward(x)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class TwoNames(Shared):
    """The list holds what is there by other names, too."""

    def __init__(self):
        super().__init__()
        self.first, self.second, *_ = self.conv_branches


class OnlyWithGradients(Shared):
    def forward(self, x):
        out = super().forward(x)
        return out if torch.is_grad_enabled() else 2 * out


class Counting(Shared):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class WithFlag(Shared):
    def forward(self, x, return_weights=False):
        out = super().forward(x)
        return (out, "weights") if return_weights else out


class WithExtraState(Shared):
    def get_extra_state(self):
        return 3

    def set_extra_state(self, state):
        pass


class ExtraState(nn.Module):
    def get_extra_state(self):
        return 3

    def set_extra_state(self, state):
        pass


class WeighedWithExtraState(ExtraState, Weighed):
    pass


class WeighedWithKeys(Weighed):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "version"] = torch.ones(1)


class WithOwnStateDict(Shared):
    def state_dict(self, *args, **options):
        return {**super().state_dict(*args, **options), "version": torch.ones(1)}


class PyramidWithExtraState(ExtraState, Pyramid):
    pass


class HeldWithExtraState(Held):
    def __init__(self):
        super().__init__()
        self.spc = PyramidWithExtraState()


class WithParameters(Shared):
    def __init__(self):
        super().__init__(convolutions(inplans=32))
        self.factors = nn.ParameterList([torch.ones(1)])

    def forward(self, x):
        return super().forward(x) * self.factors[0]


class PlainList(nn.Module):
    """Its branches hold their SE networks and norms, and PyTorch does not know of them."""

    def __init__(self):
        super().__init__()
        self.branches = [Weighed(c, nn.BatchNorm2d(16)) for c in convolutions()]

    def forward(self, x):
        return recalibrated(*zip(*(branch(x) for branch in self.branches), strict=True))


def with_hidden_scale():
    module = Shared()
    module.scale = torch.ones(1, requires_grad=True)
    return module


class RefusesSmallMaps(Shared):
    def forward(self, x):
        assert min(x.shape[2:]) > 5
        return super().forward(x)


class RefusesLargeBatches(Shared):
    def forward(self, x):
        if len(x) > 3:
            raise RuntimeError("no checkpoint for this size")
        return super().forward(x)


class RefusesOddSizes(Shared):
    def forward(self, x):
        assert x.shape[-1] != 5
        return super().forward(x)


def squeeze_with(activation):
    layers = squeeze()
    layers[2] = activation
    return layers


SOMETHING_ELSE = r"something else than PSA"
NEAR_MISSES = {
    "softmax_of_channels": (SoftmaxOfChannels, SOMETHING_ELSE),
    "softmax_of_the_batch": (SoftmaxOfTheBatch, SOMETHING_ELSE),
    "without_softmax": (WithoutSoftmax, SOMETHING_ELSE),
    "without_sigmoid": (lambda: Shared(se=squeeze()[:4]), SOMETHING_ELSE),
    "with_tanh": (lambda: Shared(se=nn.Sequential(*squeeze()[:4], nn.Tanh())),
        r"something else than PSA.*se_block\.4 is a Tanh"),
    "two_sigmoids": (lambda: Shared(se=squeeze().append(nn.Sigmoid())), SOMETHING_ELSE),
    "without_relu": (lambda: Shared(se=nn.Sequential(*squeeze()[:2], *squeeze()[3:])),
        SOMETHING_ELSE),
    "scaled": (ScaledUp, SOMETHING_ELSE),
    "added": (AddedUp, r"something else than PSA.*may add its branches, which PSA concatenates"),
    "weights_of_another": (OthersWeights, SOMETHING_ELSE),
    "called_twice": (TwiceCalled, r"calls conv_branches\.0 2 times, expected once"),
    "dropout": (DropoutBetween, r"draws random numbers in training, as a dropout does"),
    "detached": (Detached, r"its gradients are not those of PSA"),
    "values": (LooksAtValues, SOMETHING_ELSE),
    "sizes": (LooksAtSizes, SOMETHING_ELSE),
    "kernels": (LooksAtKernels, SOMETHING_ELSE),
    "another_order": (AnotherOrder, SOMETHING_ELSE),
    "interleaved": (Interleaved, SOMETHING_ELSE),
    "max": (MaxPooled, rf"{SOMETHING_ELSE}.*SE networks are not given the mean of each map"),
    "input_changed": (InputChanged, rf"{SOMETHING_ELSE}.*not called on its input itself"),
    "sigmoid_clamped": (ClampedWeights, rf"{SOMETHING_ELSE} where its sigmoids are 0 or 1"),
    "weights_halved": (lambda: HalvedWeights(convolutions(inplans=32)),
        rf"{SOMETHING_ELSE}.*does not call all of its branches"),
    "norms_beside_their_se": (
        lambda: OfWeighed(Weighed(c, nn.BatchNorm2d(16)) for c in convolutions()),
        r"other children too: branches\.0\.norm, .*it may fuse .* in one nn\.Sequential"),
    "plain_list_of_branches_and_norms": (PlainList,
        r"in plain Python lists \(branches\).*; it has other children too: branches\.0\.norm"),
    "parameters_in_a_list": (WithParameters, r"other children too: factors"),
    "own_state_dict": (WithOwnStateDict, r"saves or loads its state_dict in a way of its own"),
    "extra_state_of_a_branch": (lambda: OfWeighed(map(WeighedWithExtraState, convolutions())),
        r"branches\.0, .*branches\.3 saves or loads its state_dict in a way of its own"),
    "keys_of_a_branch": (lambda: OfWeighed(map(WeighedWithKeys, convolutions())),
        r"branches\.0, .*branches\.3 saves or loads its state_dict in a way of its own"),
    "extra_state_of_a_holder": (HeldWithExtraState,
        r"spc saves or loads its state_dict in a way of its own"),
    "names_of_attributes": (lambda: Named("winograd", "branch_order"),
        r"attribute by the name of its child winograd, branch_order; it fuses with another name"),
    "weights_read": (ReadWeights, r"calls conv_branches\.0 0 times, expected once"),
    "plain_lists": (PlainLists, r"in plain Python lists \(convs, se_blocks\).*nn\.ModuleList"),
    "an_se_too_few": (lambda: with_ses(squeeze(), squeeze(), squeeze()),
        r"4 branches and 3 SE networks"),
    "an_se_of_another_width": (lambda: with_ses(squeeze(), squeeze(), squeeze(), Layers()),
        r"the channels of the SE networks are .*\(16, 5\)"),
    "uneven": (Uneven, r"the channels of the SE networks are \[\(4, 4\), \(6, 4\), \(8, 4\)\]"),
    "an_se_without_bias": (lambda: with_ses(squeeze(), squeeze(), squeeze(), squeeze(bias=False)),
        r"the biases of the SE networks are .*expected equal"),
    "norms_beside": (AndNorms, r"other children too: norms\.0, .*without them"),
    "bottleneck": (Bottleneck, r"the channels of the SE networks .*; what is more .*: bn1, bn2"),
    "block": (Block, r"other children too: norm"),
    "layer_drop": (LayerDrop, r"its forward draws random numbers"),
    "random_of_python": (DrawsFromPython, r"its forward draws random numbers"),
    "relu6": (lambda: Shared(se=squeeze_with(nn.ReLU6())), SOMETHING_ELSE),
    "hardtanh": (lambda: Shared(se=squeeze_with(nn.Hardtanh(0, 20))), SOMETHING_ELSE),
    "clamped": (Clamped, SOMETHING_ELSE),
    "without_gradients": (OnlyWithGradients, SOMETHING_ELSE),
    "counting": (Counting, r"its forward keeps calls on the module"),
    "a_flag": (WithFlag, r"takes more than the input: return_weights"),
    "extra_state": (WithExtraState, r"saves or loads its state_dict in a way of its own"),
    "hidden_scale": (with_hidden_scale, r"tensors that train and are no parameters: scale"),
    "classes": (lambda: LooksAtClasses(with_norm()), SOMETHING_ELSE),
    "attributes": (lambda: LooksAtAttributes(convolutions(), 2), SOMETHING_ELSE),
    "buffers": (lambda: LooksAtBuffers(2), SOMETHING_ELSE),
    "more_for_a_branch": (lambda: CallsWithMore([WithOption(*b) for b in with_norm()]),
        r"it calls a branch with 2 inputs, expected one map"),
    "parametrizations": (LooksAtParametrizations, SOMETHING_ELSE),
    "dtypes": (LooksAtDtypes, rf"{SOMETHING_ELSE} for an input .* of torch\.float32"),
    "in_float32": (SoftmaxInFloat32, r"a part in float32.*; it may fuse without"),
    "epsilon": (WithEpsilon, r"or adds a small number to a denominator; it may fuse without that"),
    "checkpoint": (Checkpointed, r"as torch\.utils\.checkpoint does.*; fuse it without that"),
    "checkpoint_reentrant": (CheckpointedReentrant,
        r"as torch\.utils\.checkpoint does.*; fuse it without that"),
    "two_names": (TwoNames,
        rf"{SOMETHING_ELSE}.*first is conv_branches\.0, second is conv_branches\.1: .* one name"),
    "small_maps": (RefusesSmallMaps,
        r"a trial on \[4, 16, 3, 2\] failed: .*must take one map of any height, width and"),
    "large_batches": (RefusesLargeBatches, r"a trial on .* failed: no checkpoint for this size"),
    "odd_sizes": (RefusesOddSizes, r"a trial on \[2, 16, 7, 5\] failed: AssertionError"),
}  # fmt: skip


class FailingCascade(Cascade):
    def forward(self, x):
        super().forward(x)
        raise NotImplementedError


class TwoInputs(Added):
    """As the fusion modules of BiSeNet."""

    def forward(self, x, y):
        out = self.wide(x) + self.narrow(y)
        return out * self.se(out)


# Blocks of other kinds, which nobody wants a word about.
OTHERS = {
    "cascade": Cascade,
    "failing": FailingCascade,
    "chain": Chain,
    "added": Added,
    "two_inputs": TwoInputs,
}

# ---- what is left alone for other reasons ----


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


def description(model):
    """All that fuse() must leave alone in a model that it does not change."""
    modules = [(name, type(m), id(m), m.training) for name, m in model.named_modules()]
    tensors = [(k, id(v), v._version) for k, v in [*model.named_parameters()]]
    return modules, tensors, [*model.state_dict()]


def without_warning(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **options)
