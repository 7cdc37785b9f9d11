"""Near misses: what they compute, or how, depends on inputs, layers or settings."""

import torch
from support.lookalikes.parts import Shared, recalibrated
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint


class LooksAtValues(Shared):
    def forward(self, x):
        out = super().forward(x)
        return out if x.mean() < 0.5 else out * 2


class LooksAtSizes(Shared):
    def forward(self, x):
        return super().forward(x if x.shape[2] < x.shape[3] + 2 else x.flip(2))


class TurnsSquares(Shared):
    def forward(self, x):
        return super().forward(x.transpose(2, 3) if x.shape[2] == x.shape[3] else x)


class LooksAtKernels(Shared):
    def forward(self, x):
        maps = [branch(x) / branch.kernel_size[0] for branch in self.conv_branches]
        return recalibrated(maps, [self.se_block(m) for m in maps])


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


class LooksAtNames(Shared):
    """Its child without weights tells by its name alone what it does."""

    def __init__(self, factor):
        super().__init__()
        self.factors = nn.ModuleDict({f"times_{factor}": nn.Identity()})

    def forward(self, x):
        return super().forward(x) * (2 if "times_2" in self.factors else 1)


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


class WithoutAutocast(Shared):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class DoubledUnderAutocast(Shared):
    def forward(self, x):
        return super().forward(x) * (2 if torch.is_autocast_enabled("cpu") else 1)


class Checkpointed(Shared):
    reentrant = False

    def forward(self, x):
        if self.training:
            return checkpoint(super().forward, x, use_reentrant=self.reentrant)
        return super().forward(x)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class OnlyWithGradients(Shared):
    def forward(self, x):
        out = super().forward(x)
        return out if torch.is_grad_enabled() else 2 * out


class WithFlag(Shared):
    def forward(self, x, return_weights=False):
        out = super().forward(x)
        return (out, "weights") if return_weights else out


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
