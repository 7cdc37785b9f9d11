"""epsa_fused::psa_forward: a whole module as one operator, where no gradient is asked for."""

import itertools

import pytest
import torch
from support.cases import DTYPES, FORMATS, ORDERS, name_of
from support.modules import CASES, arguments, build, image
from support.tolerance import assert_near, assert_no_worse
from torch import nn

from epsa_fused import FusedPSAModule, PSAModule

OP = torch.ops.epsa_fused.psa_forward.default
CONV = torch.ops.epsa_fused.spc_conv.default
ATTENTION = torch.ops.epsa_fused.psa_attention.default


def make(name, dtype=torch.float32, memory_format=torch.contiguous_format, order="reversed"):
    """A reference module, and the arguments of one call."""
    module = build(name, PSAModule, dtype, branch_order=order)
    return module, arguments(module, image(name, dtype, memory_format))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_convolutions_and_the_attention(name, dtype, memory_format, order):
    """Bit for bit. Both round half-precision maps before they weigh them."""
    _, args = make(name, dtype, memory_format, order)
    out = OP(*args)
    feats, pooled = CONV(*args[:6])
    expected = ATTENTION(feats, *args[6:], pooled)[0]
    assert out.dtype == dtype and out.stride() == expected.stride()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", [n for n in CASES if n != "empty"])
def test_it_is_the_reference(name):
    module, args = make(name)
    x, weights = args[:2]
    eager = module(x)
    exact = module.double()(x.double())
    assert_no_worse(OP(*args), eager, exact, terms=weights[0][0].numel())


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_it_makes_no_views(memory_format):
    """The convolutions need addresses of the output alone."""
    _, args = make("stage1", memory_format=memory_format)
    with torch.autograd.profiler.profile() as profiled:
        OP(*args)
    names = {event.name for event in profiled.function_events}
    assert "epsa_fused::psa_forward" in names
    assert not names & {"aten::chunk", "aten::split", "aten::slice", "aten::narrow", "aten::select"}


def test_epsanets_modules_are_computed_in_place():
    for name in ("stage1", "stage2", "stage2_first", "stage3", "stage4", "large"):
        assert CASES[name].computed_in_place(), name


def test_the_same_for_any_number_of_threads():
    """PyTorch's library promises no equal bits, so its cases stay out."""
    names = [name for name, case in CASES.items() if case.computed_in_place()]
    outs = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        outs.append([OP(*make(name)[1]) for name in names])
    for a, b in itertools.pairwise(outs):
        assert all(map(torch.equal, a, b))


@pytest.mark.parametrize(
    ("planes", "stride", "size"),
    ((128, 1, (14, 13)), (128, 2, (14, 13)), (64, 1, (56, 30))),
    ids=("stride_1", "stride_2", "several_waves_of_samples"),
)
def test_the_same_gradients_for_any_number_of_threads(planes, stride, size):
    torch.manual_seed(0)
    module = FusedPSAModule(planes, planes, stride=stride)
    x = torch.randn(5, planes, *size, requires_grad=True)
    grads = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        grads.append(torch.autograd.grad(module(x).sin().sum(), [x, *module.parameters()]))
    for a, b in itertools.pairwise(grads):
        assert all(map(torch.equal, a, b))


def test_many_samples_that_share_heavy_weights():
    """The samples need more than one wave."""
    _, (_, *rest) = make("stage4")
    x = torch.randn(21, 512, 7, 7)
    assert torch.equal(OP(x, *rest), torch.cat([OP(sample[None], *rest) for sample in x]))


@pytest.mark.parametrize("name", ("stage3", "a_branch_for_the_library", "empty"))
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_opcheck(name, memory_format):
    _, args = make(name, memory_format=memory_format)
    torch.library.opcheck(OP, args)
    args[0].requires_grad_(name != "empty")
    torch.library.opcheck(OP, args)


def test_gradients_flow_through_the_two_steps():
    module, args = make("two_branches", torch.float64)
    leaves = [args[0].requires_grad_(), *(w.requires_grad_() for w in args[1])]
    out = OP(*args)
    grads = torch.autograd.grad(out.sin().sum(), leaves)
    module_leaves = [args[0], module.conv_1.weight, module.conv_2.weight]
    expected = torch.autograd.grad(module(args[0]).sin().sum(), module_leaves)
    for a, b in zip(grads, expected, strict=True):
        assert_near(a, b)


def test_under_autocast():
    """Autocast lowers the convolutions, as it does conv2d, and leaves the SE weights."""
    _, args = make("stage3")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = OP(*args)
    low = [w.bfloat16() for w in args[1]]
    expected = OP(args[0].bfloat16(), low, *args[2:])
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_the_module_in_evaluation_equals_training():
    """The means come out of one epilogue in both."""
    module = FusedPSAModule(64, 64)
    x = torch.randn(2, 64, 9, 8)
    with torch.no_grad():
        alone = module(x)
    assert torch.equal(alone, module(x).detach())


def test_a_module_with_a_biased_convolution_calls_its_layers():
    fused, plain = FusedPSAModule(64, 64).double(), PSAModule(64, 64).double()
    for module in (fused, plain):
        module.conv_2 = nn.Conv2d(64, 16, 5, padding=2, groups=4).double()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 64, 9, 8, dtype=torch.float64)
    assert_near(fused(x), plain(x))
