"""The attention without data or ahead of time: opcheck, fake tensors, torch.compile, torch.export,
autocast and FLOP counts."""

import textwrap

import pytest
import torch
from support.cases import (
    BY_NAME,
    CHANNELS_LAST,
    CONTIGUOUS,
    DTYPES,
    FORMATS,
    LAYOUTS,
    PLAIN_LAYOUTS,
    WEIGHT_KINDS,
    Inputs,
    make_inputs,
    name_of,
)
from support.compiling import (
    SIZES,
    _no_caches,  # noqa: F401  (the fixture)
    assert_fakes_look_real,
    assert_one_graph_serves_every_size,
    describe,
)
from support.paths import ROOT, TESTS
from support.processes import python
from support.tolerance import accumulation_type, assert_close, make_cotangents
from torch.utils.flop_counter import FlopCounterMode

from epsa_fused import FusedPSAModule, PSAModule, psa_attention, psa_attention_reference

OP = torch.ops.epsa_fused.psa_attention.default
BACKWARD = torch.ops.epsa_fused.psa_attention_backward.default


# ---- torch.library.opcheck: schema, autograd registration, fake kernels, AOT dispatch ----

KINDS = {kind.name: kind for kind in WEIGHT_KINDS}


@pytest.mark.parametrize("requires_grad", (False, True), ids=("no_grad", "grad"))
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize(
    "kind", [KINDS[k] for k in ("matrices", "no_bias", "per_branch_conv")], ids=name_of
)
def test_opcheck_forward(kind, layout, requires_grad, device):
    inputs = make_inputs(BY_NAME["odd"], layout=layout, kind=kind, device=device)
    torch.library.opcheck(OP, (*(inputs.leaves() if requires_grad else inputs).args, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_opcheck_forward_of_every_dtype(dtype, device):
    inputs = make_inputs(BY_NAME["odd"], dtype, weight_dtype=accumulation_type(dtype))
    torch.library.opcheck(OP, (*inputs.leaves().args, False))


@pytest.mark.parametrize("case", ("empty_batch", "one_pixel", "one_channel", "branches_8"))
def test_opcheck_forward_of_shapes_on_the_edge(case, device):
    torch.library.opcheck(OP, (*make_inputs(BY_NAME[case], device=device).args, True))


def test_opcheck_forward_with_pooled(device):
    case = BY_NAME["odd"]
    pooled = torch.randn(case.attention_shape, device=device)
    torch.library.opcheck(OP, (*make_inputs(case, device=device).leaves().args, True, pooled))


def backward_arguments(inputs: Inputs, grad_out, grad_attention, mask) -> tuple:
    _, pooled, attention = OP(*(inputs.map(torch.Tensor.detach)).args, True)
    return grad_out, grad_attention, *inputs.args, pooled, attention, True, mask


MASKS = {
    "all": [True] * 7,
    "features": [True] * 3 + [False] * 4,
    "weights": [False] * 3 + [True] * 4,
    "one_feature": [False, True, False] + [False] * 4,
    "none": [False] * 7,
}


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("mask", MASKS)
def test_opcheck_backward(mask, layout, device):
    case = BY_NAME["odd"]
    inputs = make_inputs(case, layout=layout, device=device)
    cotangents = make_cotangents(case, torch.float32, layout.out_format, device)
    torch.library.opcheck(BACKWARD, backward_arguments(inputs, *cotangents, MASKS[mask]))


@pytest.mark.parametrize("kind", ("matrices", "no_bias", "per_branch"))
@pytest.mark.parametrize("given", ("out", "attention", "both", "neither"))
def test_opcheck_backward_of_every_cotangent(given, kind, device):
    case = BY_NAME["odd"]
    inputs = make_inputs(case, kind=KINDS[kind], device=device)
    grad_out, grad_attention = make_cotangents(case, torch.float32, device=device)
    cotangents = (
        grad_out if given in ("out", "both") else None,
        grad_attention if given in ("attention", "both") else None,
    )
    torch.library.opcheck(BACKWARD, backward_arguments(inputs, *cotangents, MASKS["all"]))


@pytest.mark.parametrize(
    ("kind", "layout"),
    (("matrices", CONTIGUOUS), ("per_branch", CHANNELS_LAST), ("no_bias", CONTIGUOUS)),
    ids=name_of,
)
def test_opcheck_double_backward(kind, layout, device):
    """The backward op of inputs that require grad, with static and with symbolic sizes."""
    case = BY_NAME["odd"]
    inputs = make_inputs(case, layout=layout, kind=KINDS[kind], device=device).leaves()
    cotangents = make_cotangents(case, torch.float32, layout.out_format, device)
    cotangents = [g.requires_grad_() for g in cotangents]
    torch.library.opcheck(BACKWARD, backward_arguments(inputs, *cotangents, MASKS["all"]))


# ---- shapes without data ----


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("case", ("not_square", "one_pixel", "one_channel", "row", "empty_batch"))
def test_fake_and_meta_tensors_look_like_real_ones(case, layout, dtype):
    """Forward and backward."""
    case = BY_NAME[case]
    inputs = make_inputs(case, dtype, layout)
    grad_out, grad_attention = make_cotangents(case, dtype, layout.out_format)
    mask = [True] * (case.branches - 1) + [False, True, True, False, True]

    def outputs(change):
        given, *cotangents = inputs.map(change), change(grad_out), change(grad_attention)
        out, pooled, attention = OP(*given.args, True)
        grads, *weights = BACKWARD(*cotangents, *given.args, pooled, attention, True, mask)
        return [out, pooled, attention, *grads, *weights]

    assert_fakes_look_real(outputs)


def test_a_module_without_data():
    """Large models are built like this before their weights are loaded."""
    with torch.device("meta"):
        module = FusedPSAModule(64, 64)
        out = module(torch.empty(2, 64, 8, 8))
    out.sum().backward()
    assert out.device.type == "meta" and out.shape == (2, 64, 8, 8)
    assert module.se.fc1.weight.grad.shape == module.se.fc1.weight.shape


# ---- torch.compile ----


def gradients_of(results, inputs: Inputs, cotangents):
    return [*results, *torch.autograd.grad(results, inputs.tensors(), cotangents)]


def small_module(cls=FusedPSAModule) -> FusedPSAModule:
    return cls(16, 64, conv_groups=(1, 2, 4, 8))


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dynamic", (None, True), ids=("static_first", "dynamic"))
def test_compiled_module(dynamic, memory_format, device):
    """In float64, where Inductor's convolutions differ little from eager ones."""
    module = small_module().to(device, torch.float64, memory_format=memory_format)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    for n, h, w in SIZES:
        x = torch.randn(n, 16, h, w, dtype=torch.float64, device=device)
        x = x.to(memory_format=memory_format).requires_grad_()
        wanted = [x, *module.parameters()]
        results = []
        for function in (module, compiled):
            out = function(x)
            grads = torch.autograd.grad(out.sin().sum(), wanted)
            results.append([out.detach(), *grads])
        assert describe(results[0])[0] == describe(results[1])[0]
        for expected, actual in zip(*results, strict=True):
            # a convolution sums up to 16 * 9 * 9 products, its weight's gradient n * h * w
            size = 16 * 81 * expected.abs().max().clamp(min=1.0)
            assert_close(actual, expected, torch.float64, magnitude=size)


def test_one_dynamic_graph_serves_every_size(device):
    module = small_module().to(device)
    assert_one_graph_serves_every_size(lambda x: [module(x)], 16, device)


def test_a_compiled_training_step(device):
    module = small_module().to(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 16, 8, 8, device=device)
    losses = []
    for _ in range(3):
        loss = compiled(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


def test_compiled_autograd(device):
    """The whole backward as one graph, the fused operator's node among others."""
    module = small_module().to(device)
    x = torch.randn(2, 16, 8, 8, device=device)
    module(x).square().sum().backward()
    expected = [p.grad for p in module.parameters()]
    module.zero_grad()
    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled = torch.compile(lambda x: module(x).square().sum().backward(), backend="aot_eager")
        compiled(x)
    for p, grad in zip(module.parameters(), expected, strict=True):
        assert torch.equal(p.grad, grad)


# ---- torch.export, AOTInductor ----


def test_export(tmp_path):
    module = small_module().eval()
    x = torch.randn(2, 16, 8, 9)
    size = torch.export.Dim.DYNAMIC
    program = torch.export.export(module, (x,), dynamic_shapes=({0: size, 2: size, 3: size},))
    targets = [node.target for node in program.graph.nodes if "epsa" in str(node.target)]
    assert targets == [torch.ops.epsa_fused.psa_forward.default]
    torch.export.save(program, tmp_path / "module.pt2")
    loaded = torch.export.load(tmp_path / "module.pt2").module()
    for n, h, w in SIZES:
        x = torch.randn(n, 16, h, w)
        assert torch.equal(loaded(x), module(x))


# ---- autocast ----


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)
def test_autocast_casts_nothing_here(dtype):
    """The convolutions give half-precision maps, and `out` has their dtype. The SE weights and
    their gradients stay float32."""
    module = small_module()
    x = torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", dtype=dtype):
        feats = [getattr(module, f"conv_{i}")(x) for i in (1, 2, 3, 4)]
        out = module(x)
    assert {f.dtype for f in feats} == {dtype}
    assert out.dtype == dtype
    fc1, fc2 = module.se.fc1, module.se.fc2
    exact = [f.detach().double() for f in feats]
    weights = [w.detach().double() for w in (fc1.weight, fc1.bias, fc2.weight, fc2.bias)]
    assert_close(out, psa_attention_reference(exact, *weights), torch.float32)
    out.sum().backward()
    assert fc1.weight.grad.dtype == torch.float32 and fc1.weight.grad.abs().max() > 0


def test_a_compiled_module_under_autocast():
    module = small_module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = compiled(x), module(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


# ---- floating-point operations ----


@pytest.mark.parametrize("kind", ("matrices", "conv", "per_branch", "per_branch_conv"))
def test_flop_count(kind):
    """Two per multiply-add of the SE's two matrices. Backward twice that: the gradients of the
    inputs and of the weights."""
    case = BY_NAME["stage2"]
    inputs = make_inputs(case, layout=CONTIGUOUS, kind=KINDS[kind]).leaves()
    with FlopCounterMode(display=False) as counter:
        out = psa_attention(*inputs.args)
    forward = 2 * 2 * case.batch * case.branches * case.channels * case.hidden
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * forward


def test_flop_count_is_that_of_the_reference():
    """Backward is twice the forward. The reference is counted forward alone: PyTorch counts the
    gradients of grouped weights as if there were no groups."""
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    totals = []
    for cls in (PSAModule, FusedPSAModule):
        with FlopCounterMode(display=False) as counter:
            out = small_module(cls)(x)
        totals.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    totals.append(counter.get_total_flops() // 2)
    assert totals[0] == totals[1] == totals[2] > 0


def test_inductor_where_continuous_integration_runs():
    """Where CI is set, Inductor refuses operators whose decomposition is left unused."""
    code = textwrap.dedent("""
        import torch, epsa_fused
        from support.tolerance import assert_near
        for training in (True, False):
            module = epsa_fused.FusedPSAModule(64, 64).train(training).double()
            x = torch.randn(2, 64, 8, 8, dtype=torch.float64)
            with torch.set_grad_enabled(training):
                assert_near(torch.compile(module, fullgraph=True)(x), module(x))
    """)
    environment = {
        "PYTHONPATH": f"{ROOT}:{TESTS}",
        "CI": "1",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    python("-c", code, **environment)
