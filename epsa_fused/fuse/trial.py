"""The trial of a module that may be a PSA module, beside its fused counterpart."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import first_line
from ..modules.adopted import AdoptedPSA, PSALayers
from ..modules.layers import existing
from ..reference import BRANCH_ORDERS
from .build import build
from .calls import Calls
from .compare import RECOMPUTES, ROUNDING, FailedCallError, agree, attempt, compare, result
from .contents import Contents, changed, contents_of, equal
from .find import MisfitError
from .inputs import LARGE, Given, are_plain, inplans_of, inputs_of, inputs_of_own_branches, scaled
from .quiet import undisturbed
from .se_calls import ways_to_call
from .tree import copied
from .twin import in_mode, random_values, twin_of

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


class _FirstCallError(MisfitError):
    """What one call of the plain module shows: it fails, or gives something else than PSA.

    Args:
        ran: whether it gives something.
    """

    def __init__(self, why: str, named: bool, ran: bool) -> None:
        super().__init__(why, named)
        self.ran = ran


def run(module: nn.Module, layers: PSALayers) -> Verdict:
    """The verdict from runs of a copy with random weights, in float64 on the CPU.

    Outputs and gradients are compared, in evaluation and in training: a dropout shows in one of
    them only. The copy's branches are cheap ones: the fused module calls or computes the same
    branches. Further runs have the module's own branches, and other dtypes: a forward may look at
    both.

    Raises:
        MisfitError: it computes something else, or cannot be run.
    """
    generator = torch.Generator().manual_seed(0)
    failures: list[_FirstCallError] = []
    with undisturbed(module):
        twin = in_mode(twin_of(module, layers, generator), False)
        before = contents_of(twin)
        for splits_input in (False, True):
            layers = layers._replace(splits_input=splits_input)
            given = inputs_of(twin, layers, generator)
            calls = Calls(twin, layers)
            try:
                order, first = _branch_order(module, twin, layers, calls, given[0].x)
            except _FirstCallError as failure:
                failures.append(failure)
                continue
            calls.check()
            _check_training(twin, layers, given[0].x)
            fused = build(twin, layers, order)
            overwrites = compare(twin, fused, given)
            _check_what_stays(twin, before, given[0].x)
            _compare_large(twin, fused, layers, given[0].x)
            overwrites |= _compare_own_branches(module, layers, order, generator, calls)
            called = _with_calls(twin, layers, order, given[0].x, first)
            _compare_dtypes(module, twin, fused, layers, given[0].x)
            return Verdict(called, order, overwrites)
    ran = [failure for failure in failures if failure.ran]
    why_not = next((failure for failure in failures if failure.named), (ran or failures)[0])
    if not ran:  # it may refuse small maps
        why_not.named = why_not.named or looks_like_psa(module, layers, {})
    raise why_not


def _branch_order(
    module: nn.Module, twin: nn.Module, layers: PSALayers, calls: Calls, x: Tensor
) -> tuple[str, Tensor]:
    """The order in which the fused module gives the same output, and that output.

    Raises:
        _FirstCallError: in no order, or the call fails.
    """
    try:
        with calls.watched():
            expected = attempt(twin, x, backward=False).out
    except FailedCallError as failure:
        raise _FirstCallError(str(failure), calls.weigh_each_map(x), ran=False) from failure
    outs = []
    for order in BRANCH_ORDERS:
        try:
            outs.append(result(build(twin, layers, order).eval(), x, backward=False).out)
        except Exception as error:  # an SE layer of foreign code gives a tuple, say
            failed = f"its layers cannot be called as those of PSA: {first_line(error)}"
            raise MisfitError(failed, calls.weigh_each_map(x)) from error
        if agree(outs[-1:], [expected]):
            return order, expected
    named = calls.weigh_each_map(x)
    if any(agree([out.to(expected.dtype)], [expected], torch.float32) for out in outs):
        raise _FirstCallError(_NEARLY, named, ran=True)
    why = [_difference(expected, outs[0], module, layers), *calls.differences(x)]
    raise _FirstCallError("; ".join(why), named, ran=True)


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
            return _weighs_each_map(with_lists, layers)
    except Exception:
        return False


def _weighs_each_map(module: nn.Module, layers: PSALayers) -> bool:
    generator = torch.Generator().manual_seed(0)
    twin = in_mode(twin_of(module, layers, generator), False)
    whole, in_parts = (layers._replace(splits_input=splits) for splits in (False, True))
    # Any of its convolutions may be the first.
    inputs = {m.in_channels for m in twin.modules() if isinstance(m, nn.Conv2d)}
    for channels in inputs | {inplans_of(twin, whole), inplans_of(twin, in_parts)}:
        calls, of_parts = Calls(twin, whole), Calls(twin, in_parts)
        x = random_values((2, channels, 16, 16), generator)
        with suppress(FailedCallError), calls.watched(), of_parts.watched():
            attempt(twin, x, backward=False)
        if calls.weigh_each_map(x) or of_parts.weigh_each_map(x):  # it may fail after that
            return True
    return False


def _check_what_stays(twin: nn.Module, before: Contents, x: Tensor) -> None:
    """Raise MisfitError unless calls of the module leave all that it holds as it was.

    Args:
        before: what it held before its first call. Its branches change nothing: they are cheap.
    """
    changes = changed(before, contents_of(in_mode(twin, False)))
    with scaled(twin.parameters(), LARGE):  # a forward may bound its weights
        before = contents_of(twin)
        with suppress(Exception), torch.no_grad():
            twin(x.clone())
        changes |= changed(before, contents_of(twin))
    tensors = {name for name, _ in (*twin.named_parameters(), *twin.named_buffers())}
    if changes.keys() & tensors:
        raise MisfitError(f"its forward changes {', '.join(sorted(changes.keys() & tensors))}")
    if changes:
        names = [n for n in changes if n.rpartition(".")[0] not in changes]
        raise MisfitError(f"its forward keeps {', '.join(names)} on the module")


def _compare_large(twin: nn.Module, fused: nn.Module, layers: PSALayers, x: Tensor) -> None:
    """Compare where each sigmoid is 0 or 1, and where maps are large: a clamp shows then."""
    last = {p for n in layers.networks for p in existing(twin, n.fc2).parameters()}
    where = "where its sigmoids are 0 or 1: it clamps or overflows there, say"
    with scaled(last, LARGE):
        compare(twin, fused, [Given(x)], backward=False, where=where)
    where = "where maps are large: it clamps them, say"
    with scaled(last, 1 / LARGE):  # no sigmoid saturates
        compare(twin, fused, [Given(LARGE * (x + 1))], backward=False, where=where)


def _compare_own_branches(
    module: nn.Module, layers: PSALayers, order: str, generator: torch.Generator, calls: Calls
) -> bool:
    """Compare with the module's own branches, without gradients; whether it overwrites its input.

    They may be in place, draw random numbers, keep statistics or have a part in common. So the
    fused module has a copy of them, and what both leave behind is compared, too.
    """
    if are_plain(module, layers):
        twin = twin_of(module, layers, generator, cheap=False)
        given = list(inputs_of_own_branches(twin, layers, generator))
        with torch.no_grad():
            return compare(twin, build(twin, layers, order), given, backward=False)
    try:
        return _compare_called_branches(module, layers, order, generator)
    except MisfitError as why:
        if calls.are_in_order():
            raise
        raise MisfitError(
            f"{why}; it calls its branches in another order than that of their names, in which "
            "the fused module calls them"
        ) from why


def _compare_called_branches(
    module: nn.Module, layers: PSALayers, order: str, generator: torch.Generator
) -> bool:
    twin, given = _with_own_branches(module, layers, generator)
    other = copied(twin, {})
    before, other_before = contents_of(twin), contents_of(other)
    with torch.no_grad():
        fused = build(other, layers, order)
        overwrites = compare(twin, fused, [given], backward=False, may_draw=True)
    changes = changed(before, contents_of(in_mode(twin, False)))
    others = changed(other_before, contents_of(in_mode(other, False)))
    if not equal(changes, others, ROUNDING[given.x.dtype]):
        names = ", ".join(sorted(changes.keys() | others.keys()))
        raise MisfitError(f"its branches leave something else in {names} than when fused")
    return overwrites


def _with_own_branches(
    module: nn.Module, layers: PSALayers, generator: torch.Generator
) -> tuple[nn.Module, Given]:
    """A copy with its own branches, and an input that it takes.

    Raises:
        MisfitError: it takes none.
    """
    failures: list[Exception] = []
    for dtype in (torch.float64, torch.float32):  # a branch may hold constants of a dtype
        twin = twin_of(module, layers, generator, cheap=False, dtype=dtype)
        twin.eval()  # a class's own may return nothing
        for given in inputs_of_own_branches(twin, layers, generator):
            x = given.x.to(dtype)
            try:
                with torch.no_grad():
                    result(copied(twin, {}), x, backward=False)
                return twin, Given(x)
            except Exception as error:
                failures.append(error)
    failed = f"a trial with its own branches on the CPU failed: {first_line(failures[0])}"
    raise MisfitError(failed)


def _compare_dtypes(
    module: nn.Module, twin: nn.Module, fused: nn.Module, layers: PSALayers, x: Tensor
) -> None:
    """Compare in each dtype, which the twin's layers have then.

    People cast a model that is fused, too. A module may refuse dtypes that it does not have.
    """
    own = {torch.float32, *(p.dtype for p in module.parameters())}
    for dtype in ROUNDING:
        given = [Given(x.to(dtype))]
        if dtype == torch.float64:
            continue
        twin.to(dtype)
        if dtype in own:
            compare(twin, fused, given, backward=False)
        else:
            with suppress(FailedCallError):
                compare(twin, fused, given, backward=False, modes=(False,))
        if dtype == torch.float32:
            _compare_autocast(twin, fused, layers, x.to(dtype))


def _compare_autocast(twin: nn.Module, fused: nn.Module, layers: PSALayers, x: Tensor) -> None:
    """Compare under autocast, but not the dtype of outputs, which depends on how they are made."""
    calls, bfloat16 = Calls(twin, layers), torch.bfloat16
    with torch.autocast("cpu", bfloat16):
        try:
            with calls.watched():
                expected = attempt(in_mode(twin, False), x, backward=False).out
        except FailedCallError:
            return
        actual = result(fused.eval(), x, backward=False).out
    if calls.dtypes() != {bfloat16}:
        raise MisfitError("it turns autocast off for its branches, which the fused module does not")
    if not agree([actual.float()], [expected.float()], bfloat16):
        raise MisfitError("its forward computes something else than PSA under autocast")


def _check_training(twin: nn.Module, layers: PSALayers, x: Tensor) -> None:
    """Raise MisfitError unless each branch is called once in training, with the backward pass."""
    forward, both = Calls(twin, layers), Calls(twin, layers)
    for calls in (forward, both):
        modes = [m.training for m in in_mode(twin, True).modules()]
        with calls.watched():
            attempt(twin, x, backward=calls is both)
        if modes != [m.training for m in twin.modules()]:
            raise MisfitError("its forward sets modules to training or to evaluation")
    forward.check()
    if both.count() > forward.count():
        raise MisfitError(RECOMPUTES)


def _with_calls(
    twin: nn.Module, layers: PSALayers, order: str, x: Tensor, expected: Tensor
) -> PSALayers:
    """The layers with the way in which the plain module calls the SE networks."""
    failed = ""
    for tried in ways_to_call(twin, layers, x):
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
