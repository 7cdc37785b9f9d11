"""The trial of a module that may be a PSA module, beside its fused counterpart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .._checks import first_line
from ..modules.adopted import AdoptedPSA, PSALayers
from ..modules.layers import STATE, Point, existing
from ..reference import BRANCH_ORDERS
from .build import build
from .find import MisfitError
from .parts import channels_of
from .quiet import random_state, undisturbed
from .se_calls import ways_to_call
from .twin import random_values, twin_of

# The largest relative difference between two formulations of the same function.
_ROUNDING = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-5,
    torch.float16: 2**-8,
}
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
_RECOMPUTES = (
    "it computes layers again in the backward pass, as torch.utils.checkpoint does, and the fused "
    "module would not; fuse it without that, and checkpoint what calls it"
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


class _Result(NamedTuple):
    """Of one call: the output, and the gradients of the input and of all parameters."""

    out: Tensor
    grads: dict[str, Tensor] | None  # by name; None without any, empty where autograd fails
    overwrites_input: bool
    draws: bool  # random numbers


def key_of(module: nn.Module, layers: PSALayers) -> tuple[Any, ...]:
    """Classes, settings and shapes: modules with equal ones compute the same function."""
    settings = [
        (name, key, _value_key(value))
        for name, m in module.named_modules()
        for key, value in sorted(vars(m).items())
        if key not in STATE
    ]
    shapes = [(name, p.shape, p.dtype) for name, p in module.named_parameters()]
    kept = [  # a trial has other values of floating point, and these as they are
        (name, repr(t) if t.numel() == 1 else id(t))
        for name, t in module.named_buffers()
        if not t.is_floating_point()
    ]
    return (layers, *(type(m) for m in module.modules()), *settings, *shapes, *kept)


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
        if key not in STATE
    }


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
        twin = twin_of(module, layers, generator)
        twin.eval()  # a class's own may return nothing
        attributes = _attributes(twin)
        for splits_input in (False, True):
            layers = layers._replace(splits_input=splits_input)
            inputs = _inputs(twin, layers, generator)
            calls = _Calls(twin, layers)
            try:
                with calls.watched():
                    first = _attempt(twin, inputs[0], backward=False)
            except MisfitError as failure:
                failure.named = calls.weigh_each_map(inputs[0])
                failures.append(failure)
                continue
            outs = []
            for order in BRANCH_ORDERS:
                fused = build(twin, layers, order).eval()
                try:
                    outs.append(_result(fused, inputs[0], backward=False).out)
                except Exception as error:  # an SE layer of foreign code gives a tuple, say
                    failed = f"its layers cannot be called as those of PSA: {first_line(error)}"
                    raise MisfitError(failed, calls.weigh_each_map(inputs[0])) from error
                if _agree(outs[-1:], [first.out]):
                    calls.check()
                    _check_training(twin, layers, inputs[0])
                    overwrites = _compare(twin, fused, inputs)
                    changed = dict(_attributes(twin).items() ^ attributes.items())
                    if changed:
                        kept = sorted({key for _, key in changed})
                        raise MisfitError(f"its forward keeps {', '.join(kept)} on the module")
                    _compare_saturated(twin, fused, layers, inputs[0])
                    _compare_settings(module, layers, order, generator)
                    called = _with_calls(twin, layers, order, inputs[0], first.out)
                    _compare_dtypes(module, twin, fused, inputs[0])
                    return Verdict(called, order, overwrites)
            named = calls.weigh_each_map(inputs[0])
            if any(_agree([out], [first.out], torch.float32) for out in outs):
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
    twin = twin_of(module, layers, generator)
    twin.eval()
    for t in twin.buffers():
        if t.is_floating_point():
            t.abs_()  # it may be the variance of a BatchNorm
    # Any of its convolutions may be the first.
    inputs = [m.in_channels for m in twin.modules() if isinstance(m, nn.Conv2d)]
    for channels in {*inputs, _inplans(twin, layers)}:
        calls = _Calls(twin, layers)
        x = random_values((2, channels, 16, 16), generator)
        with suppress(MisfitError), calls.watched():
            _attempt(twin, x, backward=False)
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


def _result(module: nn.Module, x: Tensor, backward: bool = True) -> _Result:
    leaf = x.clone().requires_grad_()
    given = leaf.clone()
    torch.default_generator.manual_seed(0)  # that of GPUs stays
    before = random_state()
    out = module(given)
    draws = random_state() != before
    if not isinstance(out, Tensor):
        raise TypeError(f"its forward returns a {type(out).__name__}, expected a Tensor")
    if not out.is_floating_point() or out.layout is not torch.strided:
        raise TypeError(f"its forward returns {out.dtype} as {out.layout}, expected a map")
    overwrites = not torch.equal(given, leaf)
    grads = None
    if backward and out.requires_grad:
        cotangent = torch.arange(out.numel(), dtype=out.dtype, device=out.device).cos().view_as(out)
        named = {"": leaf, **dict(module.named_parameters())}
        try:
            found = torch.autograd.grad(
                out, list(named.values()), cotangent, materialize_grads=True
            )
        except RuntimeError:
            if not overwrites:
                raise
            found = ()  # it has overwritten what its gradient needs
        grads = dict(zip(named, found, strict=False))
    return _Result(out.detach(), grads, overwrites, draws)


def _attempt(module: nn.Module, x: Tensor, backward: bool = True) -> _Result:
    """The result of foreign code, whose owner is told what fails.

    Raises:
        MisfitError: it raises an exception.
    """
    try:
        return _result(module, x, backward)
    except Exception as error:
        why = (
            f"a trial on {list(x.shape)} failed: {first_line(error)}; to fuse, its forward must "
            "take one map of any height, width and floating-point dtype"
        )
        checkpoints = "torch.utils.checkpoint" in str(error)
        raise MisfitError(_RECOMPUTES if checkpoints else why) from error


def _compare(
    twin: nn.Module,
    fused: nn.Module,
    inputs: Sequence[Tensor],
    backward: bool = True,
    where: str | None = None,
) -> bool:
    """Compare with the fused module of the same layers; whether the other one overwrites its input.

    Args:
        where: what a reason says of these inputs, in place of their shapes.

    Raises:
        MisfitError: they differ, or the other one fails or draws random numbers.
    """
    overwrites = False
    for training in (False, True):
        for m in (twin, fused):
            m.train(training)
        for x in inputs:
            expected, actual = (_attempt(m, x, backward) for m in (twin, fused))
            if expected.draws:  # one seed shows one of the things that it does
                raise MisfitError(
                    f"its forward draws random numbers{' in training' if training else ''}, as a "
                    "dropout does; it may fuse without that, which may go before or behind it"
                )
            if not _agree([actual.out], [expected.out], x.dtype):
                seen = "in training" if training else f"for an input {list(x.shape)}"
                if x.dtype != torch.float64:
                    seen += f" of {x.dtype}"
                raise MisfitError(f"its forward computes something else than PSA {where or seen}")
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


def _compare_saturated(twin: nn.Module, fused: nn.Module, layers: PSALayers, x: Tensor) -> None:
    """Compare where each sigmoid is 0 or 1: one whose results are clamped shows then."""
    last = {p for n in layers.networks for p in existing(twin, n.fc2).parameters()}
    for p in last:
        p.data *= _SATURATING
    where = "where its sigmoids are 0 or 1: it clamps or overflows there, say"
    with torch.no_grad():
        _compare(twin, fused, [x], backward=False, where=where)
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
        _compare(real, build(real, layers, order), [_LARGE * (x / x.std() + 1)], backward=False)


def _compare_dtypes(module: nn.Module, twin: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Compare in float32 and in the module's own dtypes, which the twin's layers have then."""
    for dtype in {torch.float32, *(p.dtype for p in module.parameters())}:
        if dtype in _ROUNDING and dtype != torch.float64:
            _compare(twin.to(dtype), fused, [x.to(dtype)], backward=False)


def _check_training(twin: nn.Module, layers: PSALayers, x: Tensor) -> None:
    """Raise MisfitError unless each branch is called once in training, with the backward pass."""
    forward, both = _Calls(twin, layers), _Calls(twin, layers)
    twin.train()
    for calls in (forward, both):
        with calls.watched():
            _attempt(twin, x, backward=calls is both)
    forward.check()
    if both.count() > forward.count():
        raise MisfitError(_RECOMPUTES)


class _Calls:
    """The calls of branches and of SE networks in one call of a module."""

    def __init__(self, twin: nn.Module, layers: PSALayers) -> None:
        self._layers = layers
        self._branches = [existing(twin, name) for name in layers.branches]
        first = {existing(twin, network.fc1): None for network in layers.networks}
        self._fc1 = {fc1: channels_of(cast(Point, fc1))[0] for fc1 in first}  # its inputs
        self._inputs: dict[nn.Module, list[Tensor]] = {}
        self._maps: list[Tensor] = []
        self._most = 0  # inputs of one call of a layer

    @contextmanager
    def watched(self) -> Iterator[None]:
        def keep(layer: nn.Module, args: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
            x, *more = (*args, *options.values())
            self._inputs.setdefault(layer, []).append(x.detach().clone())
            self._most = max(self._most, 1 + len(more))

        def keep_map(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self._maps.append(out.detach().clone())

        branches = set(self._branches)
        layers = {*branches, *self._fc1}
        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
        handles += [branch.register_forward_hook(keep_map) for branch in branches]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check(self) -> None:
        """Raise MisfitError unless each branch is called once, and with one map.

        It may hold a BatchNorm or a dropout. The weights of one that is not called are read, with
        settings that nothing tells.
        """
        for name, branch in zip(self._layers.branches, self._branches, strict=True):
            calls = len(self._inputs.get(branch, ()))
            if calls != self._branches.count(branch):
                raise MisfitError(f"it calls {name} {calls} times, expected once")
        if self._most > 1:
            raise MisfitError(f"it calls a branch with {self._most} inputs, expected one map")

    def count(self) -> int:
        return sum(map(len, self._inputs.values()))

    def _are_parallel(self, x: Tensor) -> bool:
        """Whether each branch was called on x, or on its part of x, or all on another input."""
        others = () if self._layers.splits_input else self._inputs.get(self._branches[0], ())
        return any(map(self._were_called_on, (x, *others)))

    def _were_called_on(self, x: Tensor) -> bool:
        return all(
            any(torch.equal(part, given) for given in self._inputs.get(branch, ()))
            for branch, part in self._parts(x)
        )

    def differences(self, x: Tensor) -> list[str]:
        """What the branches and SE networks were given in place of what PSA gives them.

        They come from foreign code, in any shape and dtype. Nothing is said of what cannot be read.
        """
        try:
            return self._differences(x)
        except Exception:
            return []

    def _differences(self, x: Tensor) -> list[str]:
        if any(branch not in self._inputs for branch in self._branches):
            return ["it does not call all of its branches"]
        found = []
        if not self._were_called_on(x):
            found.append("its branches are not called on its input itself")
        vectors = [
            (given.movedim(-3, -1) if isinstance(fc1, nn.Conv2d) else given).reshape(-1, channels)
            for fc1, channels in self._fc1.items()
            for given in self._inputs.get(fc1, ())
        ]
        means = [m.mean((-2, -1)).reshape(-1, m.shape[-3]) for m in self._maps]
        if not vectors:
            found.append("it does not call the layers of its SE networks")
        elif not _hold_the_same_rows(means, vectors):
            found.append("its SE networks are not given the mean of each map")
        return found

    def _parts(self, x: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        count = len(self._branches)
        # tensor_split gives as many parts of a few channels, too
        parts = x.tensor_split(count, 1) if self._layers.splits_input else [x] * count
        return zip(self._branches, parts, strict=True)

    def weigh_each_map(self, x: Tensor) -> bool:
        """Whether branches in parallel gave maps, and SE networks saw a vector for each of them.

        The maps of branches that are not called come from their weights.
        """
        maps = sum(len(self._inputs.get(branch, ())) for branch in set(self._branches))
        if maps > 0 and not self._are_parallel(x):
            return False
        vectors = sum(
            given.numel() / channels
            for fc1, channels in self._fc1.items()
            for given in self._inputs.get(fc1, ())
        )
        return vectors == (maps or len(self._branches)) * len(x)


def _hold_the_same_rows(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether the rows [*, C] of both are the same in any order, as their dtypes round."""
    shapes = {t.shape[1:] for t in (*some, *others)}
    if not some or not others or len(shapes) > 1:
        return False
    rounding = max(_ROUNDING[t.dtype] for t in (*some, *others))
    rows, other_rows = (torch.cat([t.double() for t in rows]) for rows in (some, others))
    distances = torch.cdist(rows, other_rows, p=float("inf"))
    near = distances <= max(rounding, _ROUNDING[torch.float32]) * rows.abs().max()
    return rows.shape == other_rows.shape and bool(near.any(1).all() and near.any(0).all())


def _with_calls(
    twin: nn.Module, layers: PSALayers, order: str, x: Tensor, expected: Tensor
) -> PSALayers:
    """The layers with the way in which the plain module calls the SE networks."""
    failed = ""
    for tried in ways_to_call(twin, layers, x):
        try:
            out = _result(AdoptedPSA(twin, tried, branch_order=order).eval(), x, backward=False).out
        except Exception as error:  # a network of foreign code may take one kind of input alone
            failed = f": {first_line(error)}"
            continue
        if _agree([out], [expected]):
            return tried
    raise MisfitError(f"its SE networks compute something else when they are called{failed}")


def _agree(
    actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype = torch.float64
) -> bool:
    """Whether all differences are small beside the largest entry of all, as `dtype` rounds."""
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return False
    largest = max(t.abs().max() for t in expected)
    pairs = zip(actual, expected, strict=True)
    return all((a - b).abs().max() <= _ROUNDING[dtype] * largest for a, b in pairs)


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
