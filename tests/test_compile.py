"""torch.compile of the attention and of the convolutions."""

import pytest
import torch
from support.compiling import (
    _no_caches,  # noqa: F401  (the fixture)
    describe,
)
from support.operators import CONVOLUTIONS, PLAIN, SIZES, for_each_operator


def results_of(function, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs and gradients of fixed cotangents."""
    outputs = function(*tensors)
    cotangents = [torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, tensors, cotangents)]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Bits and strides."""
    assert describe(actual) == describe(expected)
    assert all(map(torch.equal, actual, expected))


@for_each_operator
@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_function(backend, dynamic, layout, operator, device):
    """At a second size too."""
    if device == "cuda" and operator is CONVOLUTIONS:
        pytest.skip("cuda/test_gpu_conv.py has it")
    compiled = torch.compile(operator.call, fullgraph=True, backend=backend, dynamic=dynamic)
    for size in SIZES:
        tensors = [t.to(device) for t in operator.tensors(torch.float32, layout, size)]
        leaves = [t.requires_grad_() for t in tensors]
        assert_same(results_of(compiled, leaves), results_of(operator.call, leaves))


@for_each_operator
def test_compiled_under_autocast(operator):
    leaves = operator.leaves()
    compiled = torch.compile(operator.call, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = compiled(*leaves), operator.call(*leaves)
    assert_same(actual, expected)
