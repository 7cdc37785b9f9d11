"""PSA modules in a served model: with BatchNorm and ReLU behind them, and as one call."""

import pytest
import torch
from support.inference import DTYPES, Net, Subclass, images, with_statistics
from torch import nn

import epsa_fused
from epsa_fused import optimize_for_inference
from epsa_fused.inference.epilogue import PSAWithEpilogue


@pytest.mark.parametrize("why", ("a hook", "a subclass", "a gradient", "a tracer", "float64"))
@pytest.mark.parametrize("save_output", (False, True))
@pytest.mark.parametrize("relu", (False, True))
def test_an_epilogue_is_never_left_out(why, save_output, relu):
    """It follows by itself where the operator cannot compute it."""
    torch.manual_seed(0)
    psa = epsa_fused.FusedPSAModule(64, 64, save_output=save_output)
    model = with_statistics(nn.Sequential(psa, nn.BatchNorm2d(64), *[nn.ReLU()] * relu))
    module = PSAWithEpilogue(psa, model[1], relu)
    x = torch.randn(2, 64, 9, 9)

    def run(function, given):
        out = function(given)
        return out, torch.autograd.grad(out.sum(), (given, *psa.parameters()))

    if why == "a gradient":
        given = x.requires_grad_()
        (out, grads), (right, expected) = run(module, given), run(model, given)
        for mine, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    else:
        with torch.no_grad():
            right = model(x)
            if why == "a hook":
                psa.conv_2.register_forward_hook(lambda *_: None)
            if why == "a tracer":
                out = torch.fx.symbolic_trace(module)(x)
            elif why == "float64":  # the operator wants scale and shift in float64
                out = module.double()(x.double()).float()
            else:
                out = module(x.as_subclass(Subclass) if why == "a subclass" else x)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), right, rtol=1e-5, atol=1e-5)


def test_an_epilogue_on_another_device():
    model = with_statistics(nn.Sequential(epsa_fused.FusedPSAModule(64, 64), nn.BatchNorm2d(64)))
    module = PSAWithEpilogue(model[0], model[1], relu=True).to("meta")
    with torch.no_grad():
        out = module(torch.randn(2, 64, 9, 9, device="meta"))
    assert out.device.type == "meta" and out.shape == (2, 64, 9, 9)


def test_a_packed_psa_module_is_one_call():
    served = optimize_for_inference(with_statistics(Net()), images(), compile=False)
    (psa,) = (m for m in served.module.modules() if type(m).__name__ == "PackedPSA")
    assert "then BatchNorm and ReLU" in repr(psa) and "prepacked" in repr(psa)


class AsksForAttention(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.psa = kind(64, 64)
        self.norm = nn.BatchNorm2d(64)

    def forward(self, x):
        out, attention = self.psa(x, return_attention=True)
        return torch.relu(self.norm(out)), attention


@pytest.mark.parametrize("kind", (epsa_fused.PSAModule, epsa_fused.FusedPSAModule))
def test_a_model_that_asks_for_attention(kind):
    torch.manual_seed(0)
    model, x = with_statistics(AsksForAttention(kind)), torch.randn(2, 64, 9, 9)
    served = optimize_for_inference(model, x, compile=False)
    with torch.no_grad():
        for mine, right in zip(served(x), model(x), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_epilogue_beside_the_attention(dtype):
    torch.manual_seed(0)
    psa = epsa_fused.FusedPSAModule(64, 64)
    norm = with_statistics(nn.Sequential(nn.BatchNorm2d(64)))[0]
    module = PSAWithEpilogue(psa, norm, True).to(dtype).requires_grad_(False)
    x = torch.randn(2, 64, 9, 9).to(dtype)
    out, attention = module(x, return_attention=True)
    assert torch.equal(out, module(x)) and torch.equal(attention, psa(x, True)[1])
    with epsa_fused.record_attention(module) as record:
        assert torch.equal(module(x), out)
    assert torch.equal(record[""][0], attention)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.psa = module

        def forward(self, x):
            return self.psa(x, return_attention=True)

    traced = torch.fx.symbolic_trace(Outer())(x)
    assert torch.equal(traced[0], out) and torch.equal(traced[1], attention)
