"""The operators in standard ones (_decompositions.py), and the ONNX models that this gives:
plain torch.onnx.export(dynamo=True), run by onnxruntime."""

import copy

import pytest
import torch
from support import published
from support.cases import (
    BY_NAME,
    DTYPES,
    LAYOUTS,
    ORDERS,
    PLAIN_LAYOUTS,
    SMALL,
    WEIGHT_KINDS,
    make_inputs,
    name_of,
)
from support.optional import optional
from support.tolerance import accumulation_type, assert_close, assert_no_worse
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import epsa_fused
from epsa_fused import FusedPSAModule

OP = torch.ops.epsa_fused.psa_attention.default
TERMS = 9 * 512  # products in the longest sum of a network's layers
DECOMPOSED = torch._decomp.decomposition_table[OP]

# ---- the decomposition ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", WEIGHT_KINDS, ids=name_of)
@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_the_decomposition_is_the_operator(case, kind, order):
    inputs = make_inputs(case, torch.float64, kind=kind)
    for actual, expected in zip(
        DECOMPOSED(*inputs.args, order == "reversed"),
        OP(*inputs.args, order == "reversed"),
        strict=True,
    ):
        assert_close(actual, expected, torch.float64)


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_decomposition_rounds_once_too(dtype, layout):
    """Half-precision maps beside float32 weights: computed in float32, `out` in the maps' dtype."""
    acc = accumulation_type(dtype)
    inputs = make_inputs(BY_NAME["stage4"], dtype, layout, weight_dtype=acc)
    actual, expected = DECOMPOSED(*inputs.args, True), OP(*inputs.double().args, True)
    for a, b, likewise in zip(actual, expected, OP(*inputs.args, True), strict=True):
        assert (a.dtype, a.stride()) == (likewise.dtype, likewise.stride())
        assert_close(a, b, acc)


def test_the_decomposition_takes_what_was_pooled():
    case = BY_NAME["stage4"]
    inputs = make_inputs(case, torch.float64)
    pooled = torch.randn(case.attention_shape, dtype=torch.float64)
    actual, expected = (f(*inputs.args, True, pooled) for f in (DECOMPOSED, OP))
    assert torch.equal(actual[1], pooled)
    assert_close(actual[0], expected[0], torch.float64)
    assert_close(actual[2], expected[2], torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_symbolic_sizes_take_the_fake_kernels_strides(layout):
    """The decomposition's strides differ in mixed layouts."""
    inputs = make_inputs(BY_NAME["stage4"], layout=layout)
    expected = [t.stride() for t in OP(*inputs.args, True)]
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = inputs.map(mode.from_tensor)
        assert any(isinstance(s, torch.SymInt) for s in fake.feats[0].shape)
        actual = [t.stride() for t in OP(*fake.args, True)]
    assert actual == expected


# ---- ONNX ----


@pytest.fixture
def onnxruntime():
    optional("onnx")
    optional("onnxscript")
    return optional("onnxruntime")


def assert_runs_alike(onnxruntime, model, example, shapes, path, **options):
    """Export `model`, eval, at `example`; onnxruntime must give what PyTorch gives at `shapes`."""
    model = model.eval()
    program = torch.onnx.export(model, (example,), dynamo=True, verbose=False, **options)
    domains = {node.domain for node in program.model.graph}
    assert domains == {""}, f"operators outside of ONNX's own: {domains}"
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for shape in shapes:
        x = torch.randn(shape, dtype=example.dtype)
        actual = torch.from_numpy(session.run(None, {name: x.numpy()})[0])
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            assert_no_worse(actual, model(x), exact, terms=TERMS)


def small_model():
    """A block of each kind of module, and what stands around it."""
    stem = nn.Conv2d(3, 16, 3)
    return nn.Sequential(
        stem,
        nn.ReLU(),
        FusedPSAModule(16, 64, conv_groups=(1, 2, 4, 8)),
        epsa_fused.fuse(nn.Sequential(published.ExternalPSA(64))),
        FusedPSAModule(64, 64, stride=2, branch_order="forward"),
    )


def test_modules_of_any_batch_and_size(onnxruntime, tmp_path):
    assert_runs_alike(
        onnxruntime,
        small_model(),
        torch.randn(2, 3, 16, 17),
        ((2, 3, 16, 17), (1, 3, 9, 30), (5, 3, 33, 8)),
        tmp_path / "modules.onnx",
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
    )


def test_an_exported_program_can_be_translated(onnxruntime, tmp_path):
    """Its graph holds the operator, which the table of decompositions translates."""
    model, x = small_model().eval(), torch.randn(2, 3, 16, 17)
    program = torch.export.export(model, (x,))
    assert any(node.target is OP for node in program.graph.nodes)
    onnx_program = torch.onnx.export(program, verbose=False)
    onnx_program.save(tmp_path / "program.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "program.onnx", providers=["CPUExecutionProvider"]
    )
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    exact = copy.deepcopy(model).double()(x.double())
    assert_no_worse(torch.from_numpy(actual), model(x), exact, terms=TERMS)


@pytest.mark.slow
@pytest.mark.parametrize("build", (epsa_fused.epsanet50, epsa_fused.epsanet50_large))
def test_the_networks(build, onnxruntime, tmp_path):
    assert_runs_alike(
        onnxruntime,
        build(),
        torch.randn(2, 3, 64, 64),
        ((2, 3, 64, 64), (1, 3, 224, 224), (3, 3, 97, 65)),
        tmp_path / "network.onnx",
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
    )
