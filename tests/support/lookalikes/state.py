"""Near misses: they keep or save more than the tensors of their layers."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import torch
from support.lookalikes.parts import Shared
from support.lookalikes.variants import Held, Pyramid, Weighed
from torch import nn


class Counting(Shared):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class CountingOnItsClass(Shared):
    calls = 0

    def forward(self, x):
        CountingOnItsClass.calls += 1
        return super().forward(x)


class KeepsIn(Shared):
    """It keeps something in an object that it holds."""

    def __init__(self, kept, keep):
        super().__init__()
        self.kept, self.keep = kept, keep

    def forward(self, x):
        out = super().forward(x)
        self.keep(self.kept, out.detach())
        return out


KEEPERS = {
    "namespace": lambda: KeepsIn(SimpleNamespace(n=0), lambda kept, out: vars(kept).update(n=1)),
    "object_in_a_list": lambda: KeepsIn([SimpleNamespace(n=0)],
        lambda kept, out: vars(kept[0]).update(n=1)),
    "deque": lambda: KeepsIn(deque(maxlen=3), lambda kept, out: kept.append(out)),
    "dict": lambda: KeepsIn({"n": 0}, lambda kept, out: kept.update(n=1)),
    "set": lambda: KeepsIn(set(), lambda kept, out: kept.add(out.shape)),
    "array": lambda: KeepsIn(np.zeros(1), lambda kept, out: np.add(kept, 1, out=kept)),
    "tensor": lambda: KeepsIn(torch.zeros(1), lambda kept, out: kept.add_(1)),
}  # fmt: skip  # fmt: skip


class Clips(Shared):
    """It bounds its weights, which a bound of 1 seldom changes."""

    def forward(self, x):
        with torch.no_grad():
            for branch in self.conv_branches:
                branch.weight.clamp_(-1, 1)
        return super().forward(x)


class Decays(Shared):
    def forward(self, x):
        self.se_block[1].weight.data.mul_(0.9)
        return super().forward(x)


class SetsItsMode(Shared):
    def forward(self, x):
        return super().forward(self.eval() and x)


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


def with_hidden_scale():
    module = Shared()
    module.scale = torch.ones(1, requires_grad=True)
    return module
