"""Tracers other than Dynamo: torch.fx, torch.jit, and the TorchScript-based ONNX exporter."""

import copy
import io
import warnings

import pytest
import torch
from support.lookalikes.parts import external_psa
from support.optional import optional
from support.tolerance import assert_near
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_hook

from epsa_fused import FusedPSAModule, FusedSplitPSA, PSAModule, SplitPSA, epsanet50, why_not_fused

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Fused.* calls layers .* looks into the module"),
]
ROUNDING = 1e-12


def psa():
    module = FusedPSAModule(16, 64, conv_groups=(1, 2, 4, 8), reduction=4)
    return module.double().eval(), torch.randn(2, 16, 6, 5, dtype=torch.float64)


def split():
    theirs = external_psa(branches=3).double()
    module = FusedSplitPSA(theirs.convs, theirs.se_blocks)
    return module.eval(), torch.randn(2, 48, 6, 5, dtype=torch.float64)


def plain_split():
    theirs = external_psa(branches=3).double()
    return SplitPSA(theirs.convs, theirs.se_blocks), torch.randn(2, 48, 6, 5, dtype=torch.float64)


MAKE = {"psa": psa, "split": split}


def targets(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_module"]


# ---- torch.fx ----


@pytest.mark.parametrize("make", MAKE)
def test_inside_a_model_it_is_a_leaf(make):
    """The node calls the module, so it stays fused and a later hook is seen."""
    module, x = MAKE[make]()
    model = nn.Sequential(nn.Identity(), module)
    traced = fx.symbolic_trace(model)
    assert targets(traced) == ["0", "1"]
    assert torch.equal(traced(x), model(x))
    seen = []
    handle = traced.get_submodule("1").register_forward_hook(lambda *args: seen.append(1))
    traced(x)
    handle.remove()
    assert seen == [1] and why_not_fused(traced.get_submodule("1")) is None


@pytest.mark.parametrize("make", (psa, split, plain_split))
def test_as_the_traced_module_it_has_its_layers_as_nodes(make):
    module, x = make()
    traced = fx.symbolic_trace(module)
    convs = [name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)]
    convs = [name for name in convs if name.startswith("conv")]
    assert [name for name in targets(traced) if name in convs] == convs
    assert_near(traced(x), module(x), ROUNDING)


def hook_itself(module):
    return module.register_forward_hook(lambda m, x, y: 2 * y)


def hook_its_input(module):
    return module.register_forward_pre_hook(lambda m, x: (2 * x[0],))


def hook_all_of_its_kind(module):
    kind = type(module)
    return register_module_forward_hook(lambda m, x, y: 2 * y if type(m) is kind else None)


@pytest.mark.parametrize("hook", (hook_itself, hook_its_input, hook_all_of_its_kind))
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.filterwarnings("ignore:Fused.* calls layers .* are registered for all modules")
def test_hooks_of_the_module_act_once(make, hook):
    """torch.fx runs them on the proxy. A node would run them again."""
    module, x = MAKE[make]()
    model = nn.Sequential(nn.Identity(), module)
    before = model(x)
    with hook(module):
        expected = model(x)
        with pytest.warns(UserWarning, match=r"calls layers .* records the module's hooks"):
            traced = fx.symbolic_trace(model)
        assert_near(traced(x), expected, ROUNDING)
    assert not torch.allclose(expected, before) and "1" not in targets(traced)


def test_a_hooked_layer_of_the_traced_module_is_a_node():
    module, x = psa()
    module.se.fc1.register_forward_hook(lambda m, x, y: 2 * y)
    with pytest.warns(UserWarning, match=r"se\.fc1 has hooks"):
        expected = module(x)
    traced = fx.symbolic_trace(module)
    assert targets(traced).count("se.fc1") == 4
    assert_near(traced(x), expected, ROUNDING)


def test_a_network_is_traced():
    model, x = epsanet50(num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    traced = fx.symbolic_trace(model)
    names = [name for name, m in model.named_modules() if isinstance(m, FusedPSAModule)]
    assert len(names) == 16 and [t for t in targets(traced) if t in names] == names
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))


def test_feature_extractor():
    optional("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = epsanet50(num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    extractor = create_feature_extractor(model, {"layer1.0.conv2": "map"})
    with torch.no_grad():
        assert extractor(x)["map"].shape == (1, 64, 8, 8)


def test_quantisation_by_fx():
    """The module stays whole and in float between quantised layers, with the reference's values."""
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    torch.manual_seed(0)
    fused = FusedPSAModule(16, 64, conv_groups=(1, 2, 4, 8))
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), fused, nn.Conv2d(64, 4, 1)).eval()
    x = torch.randn(2, 3, 12, 12)
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (x,))
    prepared(x)
    quantised = quantize_fx.convert_fx(prepared)
    assert type(quantised.get_submodule("2")) is FusedPSAModule
    expected = model(x)
    got = quantised(x)
    error = (got - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.1, error


# ---- torch.jit ----


@pytest.mark.parametrize("make", MAKE)
def test_jit_trace_keeps_the_operator(make):
    module, x = MAKE[make]()
    traced = torch.jit.trace(module, (x,))
    assert "epsa_fused::psa_" in str(traced.inlined_graph)
    assert torch.equal(traced(x), module(x))
    other = torch.randn(3, x.shape[1], 7, 4, dtype=x.dtype)
    assert torch.equal(traced(other), module(other))


@pytest.mark.parametrize("inside", (False, True))
@pytest.mark.parametrize("make", MAKE)
def test_jit_script_says_what_to_use(make, inside):
    module, _ = MAKE[make]()
    model = nn.Sequential(module) if inside else module
    message = rf"cannot compile {type(module).__name__}.*use torch\.jit\.trace, torch\.export"
    with pytest.raises(RuntimeError, match=message):
        torch.jit.script(model)


# ---- ONNX by TorchScript ----


@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("make", MAKE)
def test_onnx_by_torchscript(make, grad):
    """The layers are exported: this exporter knows no operator of the package."""
    optional("onnx")
    runtime = optional("onnxruntime")
    module, x = MAKE[make]()
    module, x = module.float(), x.float()
    file = io.BytesIO()
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), file, dynamo=False)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = [given.name for given in session.get_inputs()]
    (out,) = session.run(None, {name: x.numpy()})
    assert_near(torch.tensor(out), module(x).detach(), 1e-5)
    assert why_not_fused(module) is None


def test_onnx_by_torchscript_with_the_attention():
    optional("onnx")
    runtime = optional("onnxruntime")
    module, x = psa()
    module, x = module.float().requires_grad_(False), x.float()
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x, True), file, dynamo=False)
        expected = module(x, return_attention=True)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    results = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for mine, right in zip(results, expected, strict=True):
        assert_near(torch.tensor(mine), right, 1e-5)


def test_onnx_by_torchscript_warns():
    optional("onnx")
    module, x = psa()
    with pytest.warns(UserWarning, match=r"calls layers .*onnx\.export\(dynamo=False\) has no"):
        torch.onnx.export(module.float(), (x.float(),), io.BytesIO(), dynamo=False)


def test_the_reference_is_traced_too():
    module = PSAModule(16, 64, conv_groups=(1, 2, 4, 8)).double()
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    assert torch.equal(fx.symbolic_trace(module)(x), module(x))
