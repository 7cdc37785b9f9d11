"""The convolutions' kernels on a GPU, at real sizes. test_simt_kernels.py runs them without one."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import DEVICES
from support.epilogue import assert_is_epilogue, factors
from torch import nn

from epsa_fused import FusedPSAModule, PSAModule
from epsa_fused.functional import spc_conv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and a build with CUDA kernels"),
]

STAGES = [(64, 56), (128, 28), (256, 14), (512, 7), (1024, 5), (64, 61)]  # planes, H = W
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # an output is rounded once
KERNELS = (3, 5, 7, 9)
GROUPS = (1, 4, 8, 16)


def make_module(planes: int, dtype: torch.dtype = torch.float32) -> FusedPSAModule:
    torch.manual_seed(0)
    module = FusedPSAModule(planes, planes).to("cuda", dtype)
    return module.to(memory_format=torch.channels_last)


def image(n: int, planes: int, size: int, dtype: torch.dtype, layout=torch.channels_last):
    torch.manual_seed(1)
    x = torch.randn(n, planes, size, size, device="cuda", dtype=dtype)
    return x.contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("layout", (torch.channels_last, torch.contiguous_format), ids=str)
@pytest.mark.parametrize(("n", "with_bias"), ((1, False), (5, True), (64, False)))
@pytest.mark.parametrize(("planes", "size"), STAGES)
def test_the_maps(planes, size, n, with_bias, layout, dtype):
    module = make_module(planes, dtype)
    x = image(n, planes, size, dtype, layout)
    weights = [getattr(module, f"conv_{i}").weight.detach() for i in (1, 2, 3, 4)]
    # So large that rounding before it is added would be seen. It lies between other elements.
    bias = 4 * torch.randn(planes, 2, device="cuda").to(dtype)[:, 0] if with_bias else None
    feats, _ = spc_conv(x, weights, groups=GROUPS, padding=[k // 2 for k in KERNELS], bias=bias)
    biases = bias.double().chunk(4) if with_bias else [None] * 4
    for f, w, b, k, g in zip(feats, weights, biases, KERNELS, GROUPS, strict=True):
        exact = nn.functional.conv2d(x.double(), w.double(), b, 1, k // 2, 1, g)
        assert f.dtype == dtype and f.is_contiguous(memory_format=layout)
        bound = BOUNDS[dtype] * (exact.abs() + 1)
        if with_bias and k == 3:  # cuDNN's may be rounded before the bias is added, too
            bound += BOUNDS[dtype] * (exact - b[:, None, None]).abs()
        assert ((f.double() - exact).abs() < bound).all(), k


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("layout", (torch.channels_last, torch.contiguous_format), ids=str)
@pytest.mark.parametrize(("planes", "size"), STAGES)
def test_the_gradients_of_the_maps(planes, size, layout, dtype):
    """cuDNN computes them, in fewer groups. Those of x are summed over the branches in `dtype`."""
    module, x = make_module(planes, dtype), image(5, planes, size, dtype, layout)
    leaves = [x, *(getattr(module, f"conv_{i}").weight.detach() for i in (1, 2, 3, 4))]
    exact = [t.double().requires_grad_() for t in leaves]
    leaves = [t.requires_grad_() for t in leaves]
    feats, _ = spc_conv(*leaves[:1], leaves[1:], groups=GROUPS, padding=[k // 2 for k in KERNELS])
    expected = [
        nn.functional.conv2d(exact[0], w, None, 1, k // 2, 1, g)
        for w, k, g in zip(exact[1:], KERNELS, GROUPS, strict=True)
    ]
    grads = [torch.randn_like(f) for f in feats]
    torch.autograd.backward(feats, grads)
    torch.autograd.backward(expected, [g.double() for g in grads])
    for t, e, roundings in zip(leaves, exact, (4, 1, 1, 1, 1), strict=True):
        assert t.grad.dtype == dtype
        error = (t.grad.double() - e.grad).abs().max() / e.grad.abs().max()
        assert error.item() < roundings * BOUNDS[dtype], t.shape


@pytest.mark.parametrize(("planes", "size"), STAGES)
def test_every_run_is_the_same(planes, size):
    module, x = make_module(planes, torch.bfloat16), image(9, planes, size, torch.bfloat16)
    with torch.no_grad():
        expected = module(x)
        assert all(torch.equal(module(x), expected) for _ in range(10))


def test_training_under_autocast():
    module = make_module(64)
    plain = PSAModule(64, 64).double().cuda()
    plain.load_state_dict(module.state_dict())
    x = image(4, 64, 28, torch.float32).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        out = module(x)
    exact = plain(exact_x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)
    grad = torch.randn_like(exact)
    out.backward(grad.to(out.dtype))
    exact.backward(grad)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, atol=6e-2, rtol=6e-2)
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() < 3e-2 * q.grad.abs().max() + 1e-3


def test_a_graph_captures_it():
    module, x = make_module(128, torch.float16), image(3, 128, 28, torch.float16)
    with torch.no_grad():
        expected = module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)


def test_a_graph_holds_several_plans():
    """A kernel's limit of shared memory must serve all of them, when they are replayed, too."""
    modules = [make_module(planes, torch.bfloat16) for planes, _ in STAGES]
    images = [image(8, planes, size, torch.bfloat16) for planes, size in STAGES]
    with torch.no_grad():
        expected = [module(x) for module, x in zip(modules, images, strict=True)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [module(x) for module, x in zip(modules, images, strict=True)]
    graph.replay()
    for out, exact in zip(outs, expected, strict=True):
        assert torch.equal(out, exact)


def test_threads_with_different_plans():
    def work(stage: tuple[int, int]) -> bool:
        module, x = make_module(stage[0], torch.bfloat16), image(4, *stage, torch.bfloat16)
        with torch.no_grad():
            expected = module(x)
            return all(torch.equal(module(x), expected) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, STAGES[:4]))


@pytest.mark.parametrize("n", (1, 8, 64))
def test_an_odd_number_of_groups(n):
    groups = (1, 6, 12, 24)
    torch.manual_seed(0)
    module = FusedPSAModule(96, 96, conv_groups=groups).to("cuda", torch.bfloat16)
    x = image(n, 96, 56, torch.bfloat16)
    weights = [getattr(module, f"conv_{i}").weight.detach() for i in (1, 2, 3, 4)]
    feats, _ = spc_conv(x, weights, groups=groups, padding=[k // 2 for k in KERNELS])
    for f, w, k, g in zip(feats, weights, KERNELS, groups, strict=True):
        exact = nn.functional.conv2d(x.double(), w.double(), None, 1, k // 2, 1, g)
        assert ((f.double() - exact).abs() / (exact.abs() + 1)).max().item() < 4e-3, k


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("planes", "size"), STAGES)
def test_an_epilogue(planes, size, dtype):
    module, x = make_module(planes, dtype), image(5, planes, size, dtype)
    convs = [getattr(module, f"conv_{i}") for i in (1, 2, 3, 4)]
    with torch.no_grad():
        arguments, _ = module._arguments(x, convs)
        scale, shift = factors(planes, dtype, "cuda")
        call = torch.ops.epsa_fused.psa_forward.default
        out = call(*arguments, None, True, scale, shift, True)
        feats, _ = spc_conv(x, [c.weight for c in convs], groups=GROUPS,
                            padding=[k // 2 for k in KERNELS])  # fmt: skip
        se = arguments[6:-1]
        _, _, attention = torch.ops.epsa_fused.psa_attention.default(feats, *se, True)
    assert_is_epilogue(out, feats, attention, True, scale, shift, True)


def test_compiled():
    module, x = make_module(256, torch.bfloat16), image(3, 256, 14, torch.bfloat16)
    with torch.no_grad():
        out = torch.compile(copy.deepcopy(module), fullgraph=True)(x)
        assert torch.equal(out, module(x))
    out = torch.compile(copy.deepcopy(module), fullgraph=True)(x.requires_grad_())
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_other_dtypes_call_the_layers():
    module = make_module(64)
    plain = PSAModule(64, 64).double().cuda()
    plain.load_state_dict(module.state_dict())
    x = image(2, 64, 14, torch.float32)
    torch.testing.assert_close(module(x).double(), plain(x.double()), atol=1e-3, rtol=1e-3)
