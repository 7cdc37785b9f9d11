"""scale, shift and relu behind a module, in the pass that writes the output.

tests/attention/test_epilogue.py has the same behind the attention step alone.
"""

import itertools
from functools import partial

import pytest
import torch
from support.cases import BY_NAME, DTYPES, FORMATS, ORDERS, make_inputs, name_of
from support.epilogue import EPILOGUES, assert_is_epilogue, factors
from support.errors import Change, assert_raises, assert_same_words_on_meta, raising
from support.modules import CASES, arguments, build, image
from torch import Tensor

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

NAMES = (
    "feats",
    "fc1",
    "fc1_bias",
    "fc2",
    "fc2_bias",
    "reversed",
    "pooled",
    "scale",
    "shift",
    "relu",
)


def attention_call(device: str = "cpu") -> dict:
    feats, *weights = make_inputs(BY_NAME["odd"], torch.float32, device=device).args
    values = (feats, *weights, True, None, *factors(15, torch.float32, device), True)
    return dict(zip(NAMES, values, strict=True))


def module_call() -> dict:
    values = (*call(), True)
    names = [f"argument_{i}" for i in range(len(values) - 3)]
    return dict(zip((*names, *NAMES[-3:]), values, strict=True))


def changed(name: str, change) -> Change:
    return lambda given: given | {name: change(given[name])}


BAD = raising(
    ValueError,
    {
        "scale alone": (
            changed("shift", lambda t: None),
            r"scale is given and shift is not, expected both or none",
        ),
        "shift alone": (
            changed("scale", lambda t: None),
            r"shift is given and scale is not, expected both or none",
        ),
        "length": (
            changed("scale", lambda t: t[1:]),
            r"scale has shape \[\d+\], expected \[\d+\] \(\[S\*C\]\)",
        ),
        "rank": (
            changed("shift", lambda t: t[:, None]),
            r"shift has shape \[\d+, 1\], expected \[\d+\] \(\[S\*C\]\)",
        ),
    },
) | raising(
    TypeError,
    {
        "dtype": (
            changed("shift", Tensor.double),
            r"shift has dtype Double, expected Float, the accumulation type of Float features",
        ),
        "half": (changed("scale", Tensor.bfloat16), r"scale has dtype BFloat16, expected Float"),
    },
)
CALLS = {"attention": (ATTENTION, attention_call), "module": (OP, module_call)}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_of_the_attention_step(bad, device):
    good = partial(attention_call, device)
    assert_raises(ATTENTION, BAD[bad], good)
    assert_same_words_on_meta(ATTENTION, BAD[bad], good)


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_of_a_module(bad):
    assert_raises(OP, BAD[bad], module_call)
    assert_same_words_on_meta(OP, BAD[bad], module_call)


@pytest.mark.parametrize("operator", CALLS)
@pytest.mark.parametrize("name", ("scale", "shift"))
def test_another_device(name, operator):
    op, good = CALLS[operator]
    wrong = changed(name, lambda t: t.to("meta"))(good())
    with pytest.raises(RuntimeError, match=f"{name} is on meta, expected cpu, the device of"):
        op(*wrong.values())


@pytest.mark.parametrize("operator", CALLS)
@pytest.mark.parametrize("wanting", ("scale", "shift", "an input"))
def test_a_gradient_is_refused(wanting, operator):
    op, good = CALLS[operator]
    given = good()
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
    given = good()
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        value = given[name]
        given[name] = torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            op(*given.values())
