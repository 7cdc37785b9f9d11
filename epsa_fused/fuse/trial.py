"""The trial of a module that may be a PSA module, beside its fused counterpart."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from .._checks import first_line
from ..modules.adopted import AdoptedPSA, PSALayers, SECall
from ..modules.layers import existing
from ..reference import BRANCH_ORDERS
from .build import build
from .calls import Calls
from .compare import RECOMPUTES, ROUNDING, agree, attempt, compare, result
from .find import MisfitError
from .kinds import attributes
from .quiet import undisturbed
from .twin import random_values, twin_of

# N, H, W and the mean of the trial's inputs: a forward may look at sizes and values.
_INPUTS = ((4, 3, 2, 0.0), (2, 7, 5, 1.0), (1, 4, 9, -2.0))
# How much larger the maps and hidden units of one run are: a ReLU6 or a clamp shows then.
_LARGE = 100
# What multiplies the last layers of SE networks in one run; a power of two is undone exactly.
_SATURATING = 2**12
# What SE networks are made of.
_USUAL = (
    *(nn.Conv2d, nn.Linear, nn.ReLU, nn.Sigmoid, nn.AdaptiveAvgPool2d),
    *(nn.Flatten, nn.Sequential, nn.ModuleList, nn.Softmax),
)
_NEARLY = (
    "its forward differs from PSA by less than 1e-5 of the largest output: it computes a part in "
    "float32 also where the input is float64, say, or adds a small number to a denominator; it "
    "may fuse without that; the operators keep the attention of 16-bit maps in float32 themselves"
)


class Verdict(NamedTuple):
    """What a trial shows of a PSA module."""

    layers: PSALayers
    branch_order: str
    overwrites_input: bool = False


def run(module: nn.Module, layers: PSALayers) -> Verdict:
    """The verdict from runs of a copy with random weights, in float64 on the CPU.

    Outputs and gradients are compared, in evaluation and in training: a dropout shows in one of
    them only. The copy's branches are cheap ones: the fused module calls or computes the same
    branches. In further runs they have their settings, and the copy has other dtypes: a forward may
    look at both.

    Raises:
        MisfitError: it computes something else, or cannot be run.
    """
    generator = torch.Generator().manual_seed(0)
    failures: list[MisfitError] = []
    with undisturbed(module):
        twin = twin_of(module, layers, generator).eval()
        before = attributes(twin)
        for splits_input in (False, True):
            layers = layers._replace(splits_input=splits_input)
            inputs = _inputs(twin, layers, generator)
            calls = Calls(twin, layers)
            try:
                with calls.watched():
                    first = attempt(twin, inputs[0], backward=False)
            except MisfitError as failure:
                failure.named = calls.weigh_each_map(inputs[0])
                failures.append(failure)
                continue
            outs = []
            for order in BRANCH_ORDERS:
                fused = build(twin, layers, order).eval()
                try:
                    outs.append(result(fused, inputs[0], backward=False).out)
                except Exception as error:  # an SE layer of foreign code gives a tuple, say
                    failed = f"its layers cannot be called as those of PSA: {first_line(error)}"
                    raise MisfitError(failed, calls.weigh_each_map(inputs[0])) from error
                if agree(outs[-1:], [first.out]):
                    calls.check()
                    _check_training(twin, layers, inputs[0])
                    overwrites = compare(twin, fused, inputs)
                    changed = dict(attributes(twin).items() ^ before.items())
                    if changed:
                        kept = sorted({key for _, key in changed})
                        raise MisfitError(f"its forward keeps {', '.join(kept)} on the module")
                    _compare_saturated(twin, fused, layers, inputs[0])
                    _compare_settings(module, layers, order, generator)
                    called = _with_calls(twin, layers, order, inputs[0], first.out)
                    _compare_dtypes(module, twin, fused, inputs[0])
                    return Verdict(called, order, overwrites)
            named = calls.weigh_each_map(inputs[0])
            if any(agree([out], [first.out], torch.float32) for out in outs):
                raise MisfitError(_NEARLY, named)
            why = [_difference(first.out, outs[0], module, layers), *calls.differences(inputs[0])]
            raise MisfitError("; ".join(why), named)
    why_not = next((failure for failure in failures if failure.named), failures[0])
    why_not.named = why_not.named or looks_like_psa(module, layers, {})  # it may refuse small maps
    raise why_not


def looks_like_psa(
    module: nn.Module, layers: PSALayers, hidden: Mapping[str, nn.ModuleList]
) -> bool:
    """Whether a module that cannot be fused weighs the maps of parallel branches, in one call.

    Args:
        module: it stays as it is.
        layers: its branches, and the SE networks of their channels.
        hidden: its plain Python lists that hold some of them, by attribute.
    """
    try:  # it is foreign code, in a state that forbids to fuse it; a reason is not worth an error
        with_lists = object.__new__(type(module))
        vars(with_lists).update(vars(module), _modules={**module._modules, **hidden})
        with undisturbed(with_lists):
            return any(_weighs_each_map(with_lists, layers, splits) for splits in (False, True))
    except Exception:
        return False


def _weighs_each_map(module: nn.Module, layers: PSALayers, splits_input: bool) -> bool:
    layers = layers._replace(splits_input=splits_input)
    generator = torch.Generator().manual_seed(0)
    twin = twin_of(module, layers, generator).eval()
    for t in twin.buffers():
        if t.is_floating_point():
            t.abs_()  # it may be the variance of a BatchNorm
    # Any of its convolutions may be the first.
    inputs = [m.in_channels for m in twin.modules() if isinstance(m, nn.Conv2d)]
    for channels in {*inputs, _inplans(twin, layers)}:
        calls = Calls(twin, layers)
        x = random_values((2, channels, 16, 16), generator)
        with suppress(MisfitError), calls.watched():
            attempt(twin, x, backward=False)
        if calls.weigh_each_map(x):  # it may fail after that
            return True
    return False


def _inputs(twin: nn.Module, layers: PSALayers, generator: torch.Generator) -> list[Tensor]:
    inputs: list[Tensor] = []
    for n, h, w, mean in _INPUTS:
        x = random_values((n, _inplans(twin, layers), h, w), generator)
        inputs.append(x / x.std() + mean)
    return inputs


def _inplans(twin: nn.Module, layers: PSALayers) -> int:
    branch = existing(twin, layers.branches[0])
    first = next(m for m in branch.modules() if isinstance(m, nn.Conv2d))
    return first.in_channels * (len(layers.branches) if layers.splits_input else 1)


def _compare_saturated(twin: nn.Module, fused: nn.Module, layers: PSALayers, x: Tensor) -> None:
    """Compare where each sigmoid is 0 or 1: one whose results are clamped shows then."""
    last = {p for n in layers.networks for p in existing(twin, n.fc2).parameters()}
    for p in last:
        p.data *= _SATURATING
    where = "where its sigmoids are 0 or 1: it clamps or overflows there, say"
    with torch.no_grad():
        compare(twin, fused, [x], backward=False, where=where)
    for p in last:
        p.data /= _SATURATING


def _compare_settings(
    module: nn.Module, layers: PSALayers, order: str, generator: torch.Generator
) -> None:
    """Compare with the settings of the convolutions, at large values and without gradients."""
    real = twin_of(module, layers, generator, cheap=False)
    for network in layers.networks:  # no sigmoid saturates
        for p in existing(real, network.fc2).parameters():
            p.data /= _LARGE
    branches = [existing(real, name) for name in layers.branches]
    reach = [
        d * (k - 1)
        for conv in branches
        if isinstance(conv, nn.Conv2d)
        for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
    ]
    size = max(reach, default=0)
    x = random_values((1, _inplans(real, layers), size + 2, size + 1), generator)
    with torch.no_grad():
        compare(real, build(real, layers, order), [_LARGE * (x / x.std() + 1)], backward=False)


def _compare_dtypes(module: nn.Module, twin: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Compare in each dtype, which the twin's layers have then.

    People cast a model that is fused, too. A module may refuse dtypes that it does not have.
    """
    own = {torch.float32, *(p.dtype for p in module.parameters())}
    for dtype in ROUNDING:
        if dtype == torch.float64:
            continue
        twin.to(dtype).eval()
        if dtype not in own:
            try:
                result(twin, x.to(dtype), backward=False)
            except Exception:
                continue
        compare(twin, fused, [x.to(dtype)], backward=False)


def _check_training(twin: nn.Module, layers: PSALayers, x: Tensor) -> None:
    """Raise MisfitError unless each branch is called once in training, with the backward pass."""
    forward, both = Calls(twin, layers), Calls(twin, layers)
    for calls in (forward, both):
        with calls.watched():
            attempt(twin.train(), x, backward=calls is both)
    forward.check()
    if both.count() > forward.count():
        raise MisfitError(RECOMPUTES)


def _with_calls(
    twin: nn.Module, layers: PSALayers, order: str, x: Tensor, expected: Tensor
) -> PSALayers:
    """The layers with the way in which the plain module calls the SE networks."""
    failed = ""
    for call in get_args(SECall):
        if call != "layers" and any(network.network is None for network in layers.networks):
            continue
        networks = tuple(network._replace(call=call) for network in layers.networks)
        tried = layers._replace(networks=networks)
        try:
            out = result(AdoptedPSA(twin, tried, branch_order=order).eval(), x, backward=False).out
        except Exception as error:  # a network of foreign code may take one kind of input alone
            failed = f": {first_line(error)}"
            continue
        if agree([out], [expected]):
            return tried
    raise MisfitError(f"its SE networks compute something else when they are called{failed}")


def _difference(out: Tensor, fused: Tensor, module: nn.Module, layers: PSALayers) -> str:
    """What a user may want to know of a forward that computes something else."""
    why = (
        "its forward computes something else than PSA, in either branch order: expected "
        "map * softmax(sigmoid(fc2(relu(fc1(mean)))) across the branches), concatenated"
    )
    if out.shape != fused.shape:
        why += f"; its output is {list(out.shape)}, that of PSA {list(fused.shape)}"
        if out.shape[1:2] == (fused.shape[1] // len(layers.branches),):
            why += ": it may add its branches, which PSA concatenates"
    first: dict[nn.Module, str] = {}
    names = {name: first.setdefault(existing(module, name), name) for name in layers.branches}
    again = [f"{name} is {other}" for name, other in names.items() if name != other]
    if again:
        why += f"; {', '.join(again)}: each layer needs one name alone, unless it is called twice"
    odd = [
        f"{name} is a {type(m).__name__}"
        for network in layers.networks
        if network.network is not None
        for name, m in existing(module, network.network).named_modules(prefix=network.network)
        if name != network.network and not isinstance(m, _USUAL)
    ]
    return "; ".join([why, *odd])
