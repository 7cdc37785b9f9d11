"""Parametrised weights: the fused modules compute each once a call, as a layer's call does."""

import contextlib

import pytest
import torch
from support.lookalikes.parts import external_psa
from support.tolerance import assert_near
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from epsa_fused import FusedPSAModule, FusedSplitPSA, PSAModule, SplitPSA, why_not_fused

ROUNDING = 1e-10  # between two formulations in float64, after some steps


class Count(nn.Module):
    """Counts how often the tensor is computed."""

    reads = 0

    def forward(self, tensor):
        self.reads += 1
        return 1 * tensor


class Noise(nn.Module):
    def forward(self, weight):
        return weight + 0.1 * torch.randn_like(weight)


def psa(fused):
    torch.manual_seed(0)
    kind = FusedPSAModule if fused else PSAModule
    module = kind(16, 64, conv_groups=(1, 2, 4, 8), reduction=4).double()
    return module, torch.randn(2, 16, 6, 5, dtype=torch.float64)


def split(fused):
    torch.manual_seed(0)
    theirs = external_psa(branches=3).double()
    for se in theirs.se_blocks:
        se[1], se[3] = nn.Conv2d(16, 4, 1).double(), nn.Conv2d(4, 16, 1).double()
    kind = FusedSplitPSA if fused else SplitPSA
    module = kind(theirs.convs, theirs.se_blocks)
    return module, torch.randn(2, 48, 6, 5, dtype=torch.float64)


MAKE = {"psa": psa, "split": split}


def convolutions(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("save_output", (False, True))
@pytest.mark.parametrize("make", MAKE)
def test_each_parameter_is_read_once(make, save_output, grad):
    module, x = MAKE[make](fused=True)
    module.save_output = save_output
    counts = []
    for layer in convolutions(module):
        for name in ("weight", "bias"):
            if getattr(layer, name) is not None:
                parametrize.register_parametrization(layer, name, Count())
                counts.append(layer.parametrizations[name][0])
    assert len(counts) == (8 if make == "psa" else 18)
    for count in counts:
        count.reads = 0
    assert why_not_fused(module) is None
    assert {count.reads for count in counts} == {0}
    with torch.set_grad_enabled(grad):
        module(x)
    assert {count.reads for count in counts} == {1}


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm_of_two_iterations": lambda c: parametrizations.spectral_norm(
        c, n_power_iterations=2
    ),
    "orthogonal": parametrizations.orthogonal,
    "noise": lambda c: parametrize.register_parametrization(c, "weight", Noise()),
}


def trained(make, fused, parametrization):
    """Outputs and gradients of some steps of training, then the output in evaluation."""
    module, x = MAKE[make](fused)
    for layer in convolutions(module):
        PARAMETRIZATIONS[parametrization](layer)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    # The reference calls the shared SE for each branch; `cached` computes its weights once.
    once = contextlib.nullcontext if fused else parametrize.cached
    torch.manual_seed(1)
    results = []
    for _ in range(4):
        optimizer.zero_grad()
        with once():
            out = module(x)
        out.square().mean().backward()
        results += [out.detach(), *(p.grad.clone() for p in module.parameters())]
        optimizer.step()
    with once(), torch.no_grad():
        results.append(module.eval()(x))
    if fused:
        assert why_not_fused(module) is None
    return results


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("make", MAKE)
def test_training_with_parametrized_weights(make, parametrization):
    """State and random numbers advance as in the reference."""
    got, expected = (trained(make, fused, parametrization) for fused in (True, False))
    for ours, theirs in zip(got, expected, strict=True):
        assert_near(ours, theirs, ROUNDING)


def test_a_second_read_would_show():
    """The reference without the cache computes the shared SE's weights for each branch."""
    module, x = psa(fused=False)
    parametrizations.spectral_norm(module.se.fc1)
    reads = Count()
    parametrize.register_parametrization(module.se.fc1, "weight", reads)
    reads.reads = 0
    module(x)
    assert reads.reads == 4
