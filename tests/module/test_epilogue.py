"""scale, shift and relu behind a module, in the pass that writes the output.

tests/attention/test_epilogue.py has the same behind the attention step alone.
"""

import itertools

import pytest
import torch
from support.bad.epilogue import SUITES
from support.cases import BY_NAME, DTYPES, FORMATS, ORDERS, make_inputs, name_of
from support.epilogue import EPILOGUES, assert_is_epilogue, factors
from support.modules import CASES, arguments, build, image

from epsa_fused import PSAModule
from epsa_fused._decompositions import _psa_attention, _psa_forward

OP = torch.ops.epsa_fused.psa_forward.default
CONV = torch.ops.epsa_fused.spc_conv.default
ATTENTION = torch.ops.epsa_fused.psa_attention.default


@pytest.mark.per_isa
@pytest.mark.parametrize(("affine", "relu"), EPILOGUES)
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CASES)
def test_of_a_module(name, order, dtype, memory_format, affine, relu):
    module = build(name, PSAModule, dtype, branch_order=order)
    args = arguments(module, image(name, dtype, memory_format))
    planes = CASES[name].planes
    scale, shift = factors(planes, dtype) if affine else (None, None)
    out = OP(*args, None, True, scale, shift, relu)
    feats, pooled = CONV(*args[:6])
    plain, _, attention = ATTENTION(feats, *args[6:], pooled)
    assert out.shape == plain.shape and out.stride() == plain.stride() and out.dtype == dtype
    assert_is_epilogue(out, feats, attention, args[-1], scale, shift, relu)


def call(batch: int = 3) -> tuple:
    module = build("stage3", PSAModule)
    return (*arguments(module, image("stage3")[:batch]), None, True, *factors(256, torch.float32))


def test_the_same_for_any_number_of_threads():
    outs = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        outs.append([OP(*call(batch), True) for batch in (1, 2, 3)])
    for a, b in itertools.pairwise(outs):
        assert all(map(torch.equal, a, b))


def test_relu_keeps_nan():
    args = list(call())
    args[0] = args[0].clone()
    args[0][1, 7, 3, 3] = float("nan")
    out = OP(*args, True)
    assert out[1].isnan().all() and not out[0].isnan().any() and not out[2].isnan().any()


def test_packed_weights():
    args = list(call())
    args[11] = torch.ops.epsa_fused.spc_prepack(*args[:6], True)
    assert torch.equal(OP(*args, True), OP(*call(), True))


def test_autocast_casts_the_convolutions_alone():
    args = call()
    with torch.autocast("cpu", torch.bfloat16):
        out = OP(*args, True)
    cast = [args[0].bfloat16(), [w.bfloat16() for w in args[1]], *args[2:]]
    assert out.dtype == torch.bfloat16 and torch.equal(out, OP(*cast, True))


def test_decompositions():
    args = call()
    torch.testing.assert_close(_psa_forward(*args, True), OP(*args, True), rtol=1e-4, atol=1e-5)
    feats, *weights = make_inputs(BY_NAME["odd"], torch.float32).args
    epilogue = (*factors(15, torch.float32), True)
    torch.testing.assert_close(
        _psa_attention(feats, *weights, False, None, *epilogue),
        ATTENTION(feats, *weights, False, None, *epilogue),
    )


@pytest.mark.parametrize("relu", (False, True))
def test_opcheck(relu):
    torch.library.opcheck(OP, (*call(), relu))
    feats, *weights = make_inputs(BY_NAME["odd"], torch.float32).args
    arguments_ = (feats, *weights, True, None, *factors(15, torch.float32), relu)
    torch.library.opcheck(ATTENTION, arguments_)


def test_compiled():
    args = call()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: OP(*a) * 2, fullgraph=True)
    assert torch.equal(compiled(*args, True), OP(*args, True) * 2)


# ---- bad input ----

# test_errors.py has what the operators refuse of scale and shift alone
CALLS = {
    "attention": (ATTENTION, SUITES["psa_attention_epilogue"].good),
    "module": (OP, SUITES["psa_forward_epilogue"].good),
}


@pytest.mark.parametrize("operator", CALLS)
@pytest.mark.parametrize("wanting", ("scale", "shift", "an input"))
def test_a_gradient_is_refused(wanting, operator):
    op, good = CALLS[operator]
    given = good("cpu")
    if wanting == "an input":
        first = next(iter(given.values()))
        (first[0] if isinstance(first, list) else first).requires_grad_()
    else:
        given[wanting].requires_grad_()
    with pytest.raises(NotImplementedError, match="scale, shift and relu are for inference"):
        op(*given.values())
    with torch.no_grad():
        assert not (op(*given.values())[0]).requires_grad


@pytest.mark.parametrize("operator", CALLS)
@pytest.mark.parametrize("name", ("scale", "shift"))
def test_a_tangent_is_refused(name, operator):
    op, good = CALLS[operator]
    given = good("cpu")
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        value = given[name]
        given[name] = torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            op(*given.values())
