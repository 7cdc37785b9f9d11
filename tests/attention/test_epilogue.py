"""scale, shift and relu behind the attention step, in the pass that writes the output.

tests/module/test_epilogue.py has the same behind a whole module, and bad arguments of both.
"""

import pytest
import torch
from support.cases import BY_NAME, DTYPES, PLAIN_LAYOUTS, QUICK, make_inputs, name_of
from support.epilogue import EPILOGUES, assert_is_epilogue, factors

pytestmark = pytest.mark.emulated

OP = torch.ops.epsa_fused.psa_attention.default
NAMES = ("stage1", "stage4", pytest.param("odd", marks=QUICK))


def call(name: str, dtype: torch.dtype, layout, device: str, affine: bool = True) -> tuple:
    """The operator's arguments before the branch order, and scale and shift."""
    case = BY_NAME[name]
    channels = case.branches * case.channels
    epilogue = factors(channels, dtype, device) if affine else (None, None)
    return make_inputs(case, dtype, layout, device=device).args, epilogue


@pytest.mark.per_isa
@pytest.mark.parametrize(("affine", "relu"), EPILOGUES)
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", NAMES)
def test_the_output(name, dtype, layout, affine, relu, device):
    args, (scale, shift) = call(name, dtype, layout, device, affine)
    for order in (True, False):
        plain = OP(*args, order)
        out, pooled, attention = OP(*args, order, None, scale, shift, relu)
        assert torch.equal(pooled, plain[1]) and torch.equal(attention, plain[2])
        assert out.stride() == plain[0].stride() and out.dtype == dtype
        assert_is_epilogue(out, args[0], attention, order, scale, shift, relu)


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("name", NAMES)
def test_of_given_means(name, layout, device):
    args, epilogue = call(name, torch.float32, layout, device)
    out, pooled, attention = OP(*args, True, None, *epilogue, True)
    again = OP(*args, True, pooled, *epilogue, True)
    for mine, given in zip((out, pooled, attention), again, strict=True):
        assert torch.equal(mine, given)


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("name", NAMES)
def test_scale_and_shift_may_be_views(name, layout, device):
    args, epilogue = call(name, torch.float32, layout, device)
    views = [torch.stack([v, -v], 1)[:, 0] for v in epilogue]
    assert not views[0].is_contiguous()
    expected, *_ = OP(*args, True, None, *epilogue, False)
    assert torch.equal(OP(*args, True, None, *views, False)[0], expected)


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("name", NAMES)
def test_relu_keeps_nan(name, layout, device):
    (feats, *weights), epilogue = call(name, torch.float32, layout, device)
    with torch.no_grad():
        feats[0][-1, 0, 0, 0] = float("nan")
    out, *_ = OP(feats, *weights, True, None, *epilogue, True)
    assert out[-1].isnan().all() and out[:-1].isfinite().all()
