"""Near misses: they keep or save more than the tensors of their layers."""

import torch
from support.lookalikes.parts import Shared
from support.lookalikes.variants import Held, Pyramid, Weighed
from torch import nn


class Counting(Shared):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


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
