"""Bad input of every operator: the exception, and a message that names the argument and states what
was expected and what was given."""

from __future__ import annotations

import pytest
import torch
from support.bad import attention, conv, epilogue, module
from support.cases import memory_of
from support.errors import Arguments, Refusals, on_meta, tensors, tensors_of
from torch import Tensor

SUITES = attention.SUITES | conv.SUITES | module.SUITES | epilogue.SUITES
ROWS = [(suite, row) for suite, refusals in SUITES.items() for row in refusals.bad]
WITH_GRAD = [(*row, grad) for row in ROWS for grad in (False, True)]
WITH_GRAD = [row for row in WITH_GRAD if SUITES[row[0]].differentiable or not row[2]]
OF_ONE_DEVICE = [(suite, row) for suite, row in ROWS if SUITES[suite].bad[row].of_one_device]


def results(refusals: Refusals, arguments: Arguments) -> list[Tensor]:
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(refusals.operator(*arguments.values()))


@pytest.mark.parametrize(("suite", "row", "requires_grad"), WITH_GRAD)
def test_bad_arguments(suite, row, requires_grad, device):
    """No input is written, and the next good call gives what it gave before."""
    refusals = SUITES[suite]
    if device not in refusals.devices:
        pytest.skip(f"{suite} is not given good arguments on {device}")
    bad = refusals.bad[row]
    expected = results(refusals, refusals.good(device))
    wrong = bad.change(refusals.good(device))
    given = [t for t in tensors_of(wrong) if not t.is_meta]
    before = [memory_of(t).clone() for t in given]
    for t in given:
        t.requires_grad_(requires_grad and t.is_floating_point())
    with pytest.raises(bad.error, match=f"^{refusals.name}: {bad.words}"):
        refusals.operator(*wrong.values())
    assert all(torch.equal(memory_of(t), old) for t, old in zip(given, before, strict=True))
    again = results(refusals, refusals.good(device))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize(("suite", "row"), OF_ONE_DEVICE)
def test_meta_tensors_are_refused_with_the_same_words(suite, row):
    """torch.compile would meet the same input without data first."""
    refusals = SUITES[suite]
    wrong = refusals.bad[row].change(refusals.good("cpu"))
    words = []
    for given in (wrong, tensors(on_meta)(wrong)):
        with pytest.raises(refusals.bad[row].error) as raised:
            refusals.operator(*given.values())
        words.append(str(raised.value))
    assert words[0] == words[1]


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("suite", SUITES)
def test_a_compiled_call_is_refused_while_it_is_traced(suite, dynamic):
    """The first row. Sizes in its words may be symbols."""
    refusals = SUITES[suite]
    bad = next(iter(refusals.bad.values()))
    argument = bad.words.split()[0]
    operator = refusals.operator
    compiled = torch.compile(
        lambda *a: operator(*a), backend="eager", fullgraph=True, dynamic=dynamic
    )
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=f"{refusals.name}: {argument}"):
        compiled(*bad.change(refusals.good("cpu")).values())


@pytest.mark.parametrize("suite", SUITES)
def test_every_tensor_of_a_good_call_is_given(suite):
    """A row that changes an absent one would test nothing."""
    good = SUITES[suite].good("cpu")
    for name, bad in SUITES[suite].bad.items():
        changed = bad.change(good)
        same = (good.get(key) is value for key, value in changed.items())
        assert not all(same), name
