"""Linear layers in a served model: those of bfloat16 have weights packed by oneDNN."""

import pytest
import torch
from support.inference import assert_as_good_as_the_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from epsa_fused import optimize_for_inference
from epsa_fused.inference import optimize
from epsa_fused.inference.linear import PackedLinear
from epsa_fused.inference.pointwise import why_not_available

BFLOAT16 = torch.bfloat16
WHY_NOT = why_not_available(BFLOAT16)
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def served_in_bfloat16(model: nn.Module, x: torch.Tensor):
    return optimize_for_inference(model, x, dtype=BFLOAT16, compile=False)


def data(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 80).eval()


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(
    ("example", "later"),
    (
        ((2, 96), ((1, 96), (33, 96), (0, 96))),
        ((1, 96), ((8, 96),)),
        ((96,), ()),
        ((2, 5, 96), ((1, 1, 96), (3, 9, 96), (0, 5, 96), (2, 0, 96))),
        ((2, 3, 4, 96), ((1, 7, 5, 96),)),
    ),
    ids=str,
)
def test_any_batch_and_rank(example, later, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 80, bias=bias), nn.ReLU()).eval()
    served = served_in_bfloat16(model, data(*example))
    assert served.report.linear == 1
    assert "1 linear layers with weights packed by oneDNN" in str(served.report)
    assert any(isinstance(m, PackedLinear) for m in served.module.modules())
    for shape in (example, *later):
        x = data(*shape)
        if x.numel():
            assert_as_good_as_the_model(served, model, x, BFLOAT16)
        else:
            assert served(x).shape == model(x).shape


def test_features_that_are_strided(linear):
    class OfPixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x.permute(0, 2, 3, 1)[:, ::2])

    model, x = OfPixels().eval(), data(2, 96, 5, 4)
    served = served_in_bfloat16(model, x)
    assert served.report.linear == 1
    assert_as_good_as_the_model(served, model, x, BFLOAT16)


def test_a_layer_that_is_called_twice():
    torch.manual_seed(0)
    square = nn.Linear(96, 96)
    model = nn.Sequential(square, nn.ReLU(), square).eval()
    served = served_in_bfloat16(model, data(2, 96))
    assert served.report.linear == 2
    assert_as_good_as_the_model(served, model, data(2, 96), BFLOAT16)


def test_a_model_that_needs_contiguous_maps(linear):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 6, 3), linear

        def forward(self, x):
            return self.linear(self.conv(x).view(x.shape[0], -1))

    model, x = Flat().eval(), data(2, 3, 6, 6)
    served = served_in_bfloat16(model, x)
    assert served.report.linear == 1 and served.report.pointwise == 0
    assert_as_good_as_the_model(served, model, x, BFLOAT16)
    with pytest.raises(RuntimeError, match=r"expected x of 96 features, got \[2, 150\]"):
        served(data(2, 3, 7, 7))


def test_later_changes_of_the_weights_have_no_effect(linear):
    served = served_in_bfloat16(nn.Sequential(linear).eval(), data(2, 96))
    expected = served(data(2, 96))
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert torch.equal(served(data(2, 96)), expected)


# ---- layers that are left alone ----


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_hooked_layer_is_called(linear):
    linear.register_forward_hook(lambda _, args, out: out * 2)
    assert_left_alone(linear)


def test_a_forward_set_on_the_layer_is_called(linear):
    linear.forward = lambda x: x[..., :80] * 2
    assert_left_alone(linear)


def test_another_class_is_called():
    assert_left_alone(Doubled(96, 80))


def test_a_parametrised_layer_is_called(linear):
    assert_left_alone(weight_norm(linear))


def test_few_products_are_left_to_pytorch():
    assert_left_alone(nn.Linear(64, 8))


def test_float32_is_left_to_pytorch(linear):
    assert_left_alone(linear, torch.float32)


def test_without_onednn(linear, monkeypatch):
    monkeypatch.setattr(optimize, "why_not_available", lambda dtype: "this PyTorch lacks oneDNN")
    assert_left_alone(linear)


def assert_left_alone(layer: nn.Linear, dtype: torch.dtype = BFLOAT16) -> None:
    model, x = nn.Sequential(layer).eval(), data(8, layer.in_features)
    served = optimize_for_inference(model, x, dtype=dtype, compile=False)
    assert served.report.linear == 0 and "linear layers" not in str(served.report)
    assert_as_good_as_the_model(served, model, x, dtype)
