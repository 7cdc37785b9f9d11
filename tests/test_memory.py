"""What the operators do with memory that is not theirs."""

import torch
from support.cases import memory_of
from support.operators import for_each_layout


@for_each_layout
def test_inputs_are_never_written(operator, layout):
    """The memory between their elements is not written either."""
    leaves = operator.leaves(torch.float32, layout)
    results = operator.call(*leaves)
    cotangents = [torch.randn(*r.shape, 2)[..., 0] for r in results]
    given = [*leaves, *cotangents]
    before = [memory_of(t).clone() for t in given]
    torch.autograd.grad(operator.call(*leaves), leaves, cotangents)
    assert all(torch.equal(memory_of(t), old) for t, old in zip(given, before, strict=True))
