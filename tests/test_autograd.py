"""Autograd's rules, which the attention and the convolutions keep alike."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support.gradients import CHECK, NOT_SUPPORTED
from support.operators import for_each_input, for_each_operator


def gradients(operator, tensors, results, **options):
    return torch.autograd.grad(sum(r.sin().sum() for r in results), tensors, **options)


@for_each_input
def test_derivatives_of_one_input_alone(operator, which):
    tensors = operator.tensors(torch.float64)
    tensors[which].requires_grad_()
    assert torch.autograd.gradcheck(operator.call, tensors, **CHECK)
    assert torch.autograd.gradgradcheck(operator.call, tensors, **CHECK)


@for_each_operator
def test_backward_twice_through_a_retained_graph(operator):
    leaves = operator.leaves()
    results = operator.call(*leaves)
    first = gradients(operator, leaves, results, retain_graph=True)
    second = gradients(operator, leaves, results)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        gradients(operator, leaves, results)


@for_each_operator
def test_inputs_that_are_results_of_other_operators(operator):
    leaves = operator.leaves(torch.float64)
    expected = gradients(operator, leaves, operator.call(*leaves))
    actual = gradients(operator, leaves, operator.call(*(2 * (t / 2) for t in leaves)))
    assert all(map(torch.equal, actual, expected))


@for_each_operator
@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode))
def test_without_a_graph(operator, context):
    leaves = operator.leaves()
    expected = operator.call(*leaves)
    with context():
        results = operator.call(*leaves)
        again = operator.call(*(t.clone() for t in leaves))
    assert all(map(torch.equal, results, expected)) and all(map(torch.equal, again, expected))
    assert not any(r.requires_grad for r in results)
    assert all(r.is_inference() == (context is torch.inference_mode) for r in results)


@for_each_operator
def test_nothing_requires_grad(operator):
    results = operator.call(*operator.tensors(torch.float32))
    assert all(r.grad_fn is None and not r.requires_grad for r in results)


@for_each_input
def test_an_input_changed_before_backward_is_an_error(operator, which):
    """Autograd's version counters notice it. A wrong gradient would not."""
    tensors = [t.clone() for t in operator.leaves()]
    results = operator.call(*tensors)
    with torch.no_grad():
        tensors[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(r.sum() for r in results).backward()


@for_each_operator
def test_checkpointing(operator):
    leaves = operator.leaves()
    expected = gradients(operator, leaves, operator.call(*leaves))
    results = torch.utils.checkpoint.checkpoint(operator.call, *leaves, use_reentrant=False)
    assert all(map(torch.equal, gradients(operator, leaves, results), expected))


@for_each_input
@pytest.mark.parametrize("transform", NOT_SUPPORTED)
def test_function_transforms_raise(transform, operator, which):
    """The operators refuse them, and the error names the operator or its kind. No result is wrong.

    module/test_transforms.py has what psa_attention and the modules do instead.
    """
    tensors = operator.tensors(torch.float64)

    def function(t):
        return operator.bare(*(t if i == which else u for i, u in enumerate(tensors)))[-1]

    with pytest.raises(RuntimeError, match=rf"{operator.name}|autograd::Function"):
        NOT_SUPPORTED[transform](function, tensors[which])


@for_each_input
@pytest.mark.parametrize("requires_grad", (False, True))
def test_forward_mode_raises(requires_grad, operator, which):
    """A tangent is never dropped silently."""
    tensors = operator.leaves(torch.float64) if requires_grad else operator.tensors(torch.float64)
    with forward_ad.dual_level():
        tensors[which] = forward_ad.make_dual(tensors[which], torch.ones_like(tensors[which]))
        with pytest.raises(
            RuntimeError, match=rf"{operator.name}: forward-mode.*expected|custom Function"
        ):
            operator.bare(*tensors)


@for_each_operator
def test_batched_gradients_raise(operator):
    leaves = operator.leaves(torch.float64)
    results = operator.call(*leaves)
    grads = [torch.stack([r.detach()] * 3) for r in results]
    with pytest.raises(RuntimeError, match=f"{operator.name}_backward"):
        torch.autograd.grad(results, leaves, grads, is_grads_batched=True)
