"""EPSANet with huggingface_hub's PyTorchModelHubMixin, in a folder: nothing here needs the hub."""

import inspect
import json

import pytest
import torch
from support.optional import optional
from torch import nn

from epsa_fused import EPSANet

SMALL = {
    "num_classes": 7,
    "planes": (16, 32, 64, 128),
    "expansion": 2,
    "conv_kernels": (3, 5),
    "conv_groups": (1, 2),
    "reduction": 4,
    "fused": False,
    "in_chans": 1,
    "drop_rate": 0.25,
}


@pytest.fixture(scope="module")
def hub_class():
    optional("safetensors")

    class HubEPSANet(EPSANet, optional("huggingface_hub").PyTorchModelHubMixin):
        pass

    return HubEPSANet


def test_arguments_and_weights_come_back(hub_class, tmp_path):
    model = hub_class([1, 2, 1, 1], **SMALL).eval()
    model.save_pretrained(tmp_path)
    again = hub_class.from_pretrained(tmp_path, strict=True)
    assert str(again) == str(model) and again.drop_rate == 0.25
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    x = torch.randn(2, 1, 40, 40)
    assert torch.equal(again(x), model(x))


def test_every_argument_that_is_no_code_is_in_config_json(hub_class, tmp_path):
    hub_class([1, 1, 1, 1], **SMALL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    parameters = inspect.signature(EPSANet).parameters.values()
    assert config.keys() == {
        p.name for p in parameters if p.name == "layers" or not callable(p.default)
    }
    for name, value in SMALL.items():
        assert config[name] == (list(value) if isinstance(value, tuple) else value), name


def test_a_normalisation_layer_is_given_again(hub_class, tmp_path):
    """It is code, which no config.json holds. strict refuses another one's weights."""

    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(4, channels)

    model = hub_class([1, 1, 1, 1], **SMALL, norm_layer=norm).eval()
    model.save_pretrained(tmp_path)
    again = hub_class.from_pretrained(tmp_path, strict=True, norm_layer=norm)
    x = torch.randn(2, 1, 40, 40)
    assert torch.equal(again(x), model(x))
    with pytest.raises(RuntimeError, match="running_mean"):
        hub_class.from_pretrained(tmp_path, strict=True)


def test_another_classifier_than_the_constructors_is_refused(hub_class, tmp_path):
    model = hub_class([1, 1, 1, 1], **SMALL)
    model.reset_classifier(5)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"fc\.weight \[5, 256\], expected \[7, 256\]"):
        hub_class.from_pretrained(tmp_path)


def test_an_activation_is_given_again(hub_class, tmp_path):
    """It is code without weights, so nothing would notice another one."""
    model = hub_class([1, 1, 1, 1], **SMALL, act_layer=nn.SiLU).eval()
    model.save_pretrained(tmp_path)
    again = hub_class.from_pretrained(tmp_path, strict=True, act_layer=nn.SiLU)
    x = torch.randn(2, 1, 40, 40)
    assert torch.equal(again(x), model(x))
