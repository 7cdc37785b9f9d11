"""The trial of a module that may be a PSA module, beside its fused counterpart."""

from __future__ import annotations

import copy
import math
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from .._checks import first_line
from ..modules.adopted import AdoptedPSA, PSALayers, SECall
from ..modules.layers import has_bias
from ..reference import BRANCH_ORDERS
from .build import build
from .find import MisfitError
from .hooks import CALL_HOOKS

# Every module has these attributes; the others are settings of its class.
_STATE = vars(nn.Module()).keys()
# The largest relative difference in float64 between two formulations of the same function.
_ROUNDING = 1e-9
# N, H, W and the mean of the trial's inputs: a forward may look at sizes and values.
_INPUTS = ((4, 3, 2, 0.0), (2, 7, 5, 1.0), (1, 4, 9, -2.0))
# How much larger the maps and hidden units of one run are: a ReLU6 or a clamp shows then.
_LARGE = 100
# What SE networks are made of.
_USUAL = (
    *(nn.Conv2d, nn.Linear, nn.ReLU, nn.Sigmoid, nn.AdaptiveAvgPool2d),
    *(nn.Flatten, nn.Sequential, nn.ModuleList, nn.Softmax),
)


_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class Verdict(NamedTuple):
    """What a trial shows of a PSA module."""

    layers: PSALayers
    branch_order: str
    overwrites_input: bool = False


class _Result(NamedTuple):
    """Of one call: the output, and the gradients of the input and of all parameters."""

    out: Tensor
    grads: dict[str, Tensor] | None  # by name; None without any, empty where autograd fails
    overwrites_input: bool
    draws: bool  # random numbers


def key_of(module: nn.Module, layers: PSALayers) -> tuple[Any, ...]:
    """Classes, settings and shapes: modules with equal ones compute the same function."""
    inside = {m: None for name in layers.branches for m in module.get_submodule(name).modules()}
    settings = [
        (name, key, _value_key(value))
        for name, m in module.named_modules()
        if m not in inside  # it is called, whatever it computes
        for key, value in sorted(vars(m).items())
        if key not in _STATE
    ]
    shapes = [p.shape for m in module.modules() if m not in inside for p in m.parameters(False)]
    convs = [m.extra_repr() for m in inside if isinstance(m, nn.Conv2d)]
    return (layers, *(type(m) for m in module.modules()), *convs, *settings, *shapes)


def _value_key(value: Any) -> Any:
    """Equal for equal settings; an object may hide from its repr what it does."""
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), *map(_value_key, value)
    if isinstance(value, dict):
        return tuple((_value_key(k), _value_key(v)) for k, v in value.items())
    return id(value)


def _attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    """What a forward may keep on its modules."""
    return {
        (name, key): _value_key(value)
        for name, m in module.named_modules()
        for key, value in vars(m).items()
        if key not in _STATE
    }


def run(module: nn.Module, layers: PSALayers) -> Verdict:
    """The verdict from runs of a copy with random weights, in float64 on the CPU.

    Outputs and gradients are compared, in evaluation and in training: a dropout shows in one of
    them only. The copy's branches are cheap ones: the fused module calls or computes the same
    branches. In one run more they have their settings, at which a forward may look.

    Raises:
        MisfitError: it computes something else, or cannot be run.
    """
    generator = torch.Generator().manual_seed(0)
    twin = _twin(module, layers, generator).eval()
    attributes = _attributes(twin)
    failed = None
    with _undisturbed():
        for splits_input in (False, True):
            layers = layers._replace(splits_input=splits_input)
            inputs = _inputs(twin, layers, generator)
            calls = _Calls(twin, layers)
            try:
                with calls.watched():
                    first = _result(twin, inputs[0])
            except Exception as error:
                why = f"a trial on {list(inputs[0].shape)} failed: {first_line(error)}"
                failed = failed or MisfitError(why, calls.are_parallel(inputs[0]))
                continue
            for order in BRANCH_ORDERS:
                fused = _result(build(twin, layers, order).eval(), inputs[0])
                if _agree([fused.out], [first.out]):
                    calls.check()
                    overwrites = _compare(twin, layers, order, inputs)
                    changed = dict(_attributes(twin).items() ^ attributes.items())
                    if changed:
                        kept = sorted({key for _, key in changed})
                        raise MisfitError(f"its forward keeps {', '.join(kept)} on the module")
                    _compare_settings(module, layers, order, generator)
                    layers = _with_calls(twin, layers, order, inputs[0])
                    return Verdict(layers, order, overwrites)
            named = calls.are_parallel(inputs[0]) and calls.weigh_each_map(inputs[0])
            raise MisfitError(_difference(first.out, fused.out, module, layers), named)
    raise cast(MisfitError, failed)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Around a trial: neither it nor the caller's settings change the other."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numpy = sys.modules["numpy"]
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def _random(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random float64 weights or maps.

    Weights give outputs of about one, so no sigmoid saturates. Biases are small beside those: each
    hidden unit is then alive in some branches and samples and dead in others.
    """
    scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
    return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator) * scale


def _random_state() -> tuple[Any, ...]:
    """Of the generators that a forward may draw from."""
    numpy = sys.modules.get("numpy")
    drawn = () if numpy is None else numpy.random.get_state()
    own = tuple(v.tobytes() if hasattr(v, "tobytes") else v for v in drawn)
    return bytes(torch.default_generator.get_state().tolist()), random.getstate(), own


def _inputs(twin: nn.Module, layers: PSALayers, generator: torch.Generator) -> list[Tensor]:
    first = cast(nn.Conv2d, twin.get_submodule(layers.branches[0]))
    channels = first.in_channels * (len(layers.branches) if layers.splits_input else 1)
    inputs: list[Tensor] = []
    for n, h, w, mean in _INPUTS:
        x = _random((n, channels, h, w), generator)
        inputs.append(x / x.std() + mean)
    return inputs


def _twin(
    module: nn.Module, layers: PSALayers, generator: torch.Generator, *, cheap: bool = True
) -> nn.Module:
    """A copy with random weights on the CPU, without hooks, and with convolutions as branches.

    They are 1x1 convolutions where `cheap`, and where a branch is more than a convolution.
    """
    memo: dict[int, Any] = {}
    for name in layers.branches:
        branch = module.get_submodule(name)
        memo[id(branch)] = _stand_in(branch, cheap)
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as error:  # for example, it keeps a result with an autograd graph
        raise MisfitError(f"it cannot be copied for a trial: {error}") from None
    for m in twin.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(_random(p.shape, generator))
        for name, t in m._buffers.items():
            if t is not None and t.is_floating_point():
                m._buffers[name] = _random(t.shape, generator)
        for hooks in CALL_HOOKS:
            getattr(m, hooks).clear()
    return twin


def _stand_in(branch: nn.Module, cheap: bool) -> nn.Conv2d:
    convs = [m for m in branch.modules() if isinstance(m, nn.Conv2d)]
    channels = (convs[0].in_channels, convs[-1].out_channels)
    if cheap or convs[0] is not branch:
        return nn.Conv2d(*channels, 1, device="meta")
    settings: dict[str, Any] = {name: getattr(convs[0], name) for name in _SETTINGS}
    return nn.Conv2d(*channels, **settings, bias=has_bias(convs[0]), device="meta")


def _result(module: nn.Module, x: Tensor, backward: bool = True) -> _Result:
    leaf = x.clone().requires_grad_()
    given = leaf.clone()
    torch.default_generator.manual_seed(0)  # that of GPUs stays
    before = _random_state()
    out = module(given)
    draws = _random_state() != before
    if not isinstance(out, Tensor):
        raise TypeError(f"its forward returns a {type(out).__name__}, expected a Tensor")
    overwrites = not torch.equal(given, leaf)
    grads = None
    if backward and out.requires_grad:
        cotangent = torch.arange(out.numel(), dtype=out.dtype, device=out.device).cos().view_as(out)
        named = {"": leaf, **dict(module.named_parameters())}
        try:
            found = torch.autograd.grad(
                out, list(named.values()), cotangent, materialize_grads=True
            )
        except RuntimeError:  # it has overwritten what its gradient needs
            found = ()
        grads = dict(zip(named, found, strict=False))
    return _Result(out.detach(), grads, overwrites, draws)


def _compare(
    twin: nn.Module,
    layers: PSALayers,
    order: str,
    inputs: Sequence[Tensor],
    backward: bool = True,
) -> bool:
    """Compare with the fused module; whether the other one overwrites its input.

    Raises:
        MisfitError: they differ, or the other one fails or draws random numbers.
    """
    fused = build(twin, layers, order)
    overwrites = False
    for training in (False, True):
        for x in inputs:
            try:
                expected = _result(twin.train(training), x, backward)
                actual = _result(fused.train(training), x, backward)
            except Exception as error:  # of foreign code; the model's owner is told
                why = f"a trial on {list(x.shape)} failed: {first_line(error)}"
                raise MisfitError(why) from error
            if not _agree([actual.out], [expected.out]):
                where = "in training" if training else f"for an input {list(x.shape)}"
                raise MisfitError(f"its forward computes something else than PSA {where}")
            if expected.draws:  # one seed shows one of the things that it does
                raise MisfitError("its forward draws random numbers")
            if expected.grads != {} and not _same_grads(actual.grads, expected.grads):
                raise MisfitError("its gradients are not those of PSA: a tensor is detached, say")
            overwrites |= expected.overwrites_input
    return overwrites


def _same_grads(actual: dict[str, Tensor] | None, expected: dict[str, Tensor] | None) -> bool:
    if actual is None or expected is None:
        return actual is expected
    if actual.keys() != expected.keys():
        return False
    return _agree([actual[name] for name in expected], list(expected.values()))


def _compare_settings(
    module: nn.Module, layers: PSALayers, order: str, generator: torch.Generator
) -> None:
    """Compare with the settings of the convolutions, at large values and without gradients."""
    real = _twin(module, layers, generator, cheap=False)
    for network in layers.networks:  # no sigmoid saturates
        for p in real.get_submodule(network.fc2).parameters():
            p.data /= _LARGE
    convs = [cast(nn.Conv2d, real.get_submodule(name)) for name in layers.branches]
    reach = [
        d * (k - 1) for conv in convs for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
    ]
    channels = convs[0].in_channels * (len(convs) if layers.splits_input else 1)
    x = _random((2, channels, max(reach) + 7, max(reach) + 5), generator)
    with torch.no_grad():
        _compare(real, layers, order, [_LARGE * (x / x.std() + 1)], backward=False)


class _Calls:
    """The calls of branches and of SE networks in one call of a module."""

    def __init__(self, twin: nn.Module, layers: PSALayers) -> None:
        self._layers = layers
        self._branches = [cast(nn.Conv2d, twin.get_submodule(n)) for n in layers.branches]
        self._fc1 = {twin.get_submodule(network.fc1) for network in layers.networks}
        self._inputs: dict[nn.Module, list[Tensor]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        def keep(layer: nn.Module, args: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
            (x,) = (*args, *options.values())
            self._inputs.setdefault(layer, []).append(x.detach().clone())

        layers = {*self._branches, *self._fc1}
        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check(self) -> None:
        """Raise MisfitError unless each branch is called once.

        It may hold a BatchNorm or a dropout. The weights of one that is not called are read, with
        settings that nothing tells.
        """
        for name, branch in zip(self._layers.branches, self._branches, strict=True):
            calls = len(self._inputs.get(branch, ()))
            if calls != self._branches.count(branch):
                raise MisfitError(f"it calls {name} {calls} times, expected once")

    def are_parallel(self, x: Tensor) -> bool:
        """Whether each branch was called on x, or on its part of x."""
        count = len(self._branches)
        parts = x.chunk(count, 1) if self._layers.splits_input else [x] * count
        return all(
            any(torch.equal(part, given) for given in self._inputs.get(branch, ()))
            for branch, part in zip(self._branches, parts, strict=True)
        )

    def weigh_each_map(self, x: Tensor) -> bool:
        """Whether the SE networks saw as many vectors as there are maps, of all samples."""
        inputs = [given for fc1 in self._fc1 for given in self._inputs.get(fc1, ())]
        channels = self._branches[0].out_channels
        return sum(t.numel() for t in inputs) == len(self._branches) * len(x) * channels


def _with_calls(twin: nn.Module, layers: PSALayers, order: str, x: Tensor) -> PSALayers:
    """The layers with the way in which the plain module calls the SE networks."""
    expected, failed = _result(twin.eval(), x).out, ""
    for call in get_args(SECall):
        if call != "layers" and any(network.network is None for network in layers.networks):
            continue
        networks = tuple(network._replace(call=call) for network in layers.networks)
        tried = layers._replace(networks=networks)
        try:
            out = _result(AdoptedPSA(twin, tried, branch_order=order).eval(), x).out
        except Exception as error:  # a network of foreign code may take one kind of input alone
            failed = f": {first_line(error)}"
            continue
        if _agree([out], [expected]):
            return tried
    raise MisfitError(f"its SE networks compute something else when they are called{failed}")


def _agree(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether all differences are small beside the largest entry of all."""
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return False
    largest = max(t.abs().max() for t in expected)
    pairs = zip(actual, expected, strict=True)
    return all((a - b).abs().max() <= _ROUNDING * largest for a, b in pairs)


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
    odd = [
        f"{name} is a {type(m).__name__}"
        for network in layers.networks
        if network.network is not None
        for name, m in module.get_submodule(network.network).named_modules(prefix=network.network)
        if name != network.network and not isinstance(m, _USUAL)
    ]
    return "; ".join([why, *odd])
