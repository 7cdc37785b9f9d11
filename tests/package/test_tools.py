"""Tools that look into models: their results for fused modules are those for the reference's.

`make compat` installs all of the tools and runs this file, `make test` the light ones.
docs/compatibility.md lists them.
"""

import contextlib
import importlib
import io
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.optional import optional
from support.paths import ROOT
from support.tolerance import assert_near
from torch import nn
from torch.nn.utils import prune

from epsa_fused import FusedPSAModule, PSAModule, why_not_fused

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the tools
ROUNDING = 1e-5  # between two formulations in float32, after some layers


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.psa = kind(16, 64, conv_groups=(1, 2, 4, 8), reduction=4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.pool(self.psa(self.stem(x))).flatten(1))


def nets():
    fused, plain = Net(FusedPSAModule), Net(PSAModule)
    plain.load_state_dict(fused.state_dict())
    return fused.eval(), plain.eval()


SHAPE = (3, 12, 10)


def images():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))


# ---- the tools themselves ----

# The files by which the Makefile knows what .venv holds, and the extras of pyproject.toml.
INSTALLED = {"packages-dev": "tools", "packages-compat": "compat"}


@pytest.mark.parametrize("mark", INSTALLED)
def test_the_tools_that_make_installed_can_be_imported(mark):
    """Else the tests below would all be skipped, and pass."""
    if not (Path(sys.prefix) / mark).exists():
        pytest.skip(f"this environment is not one of make with {mark}")
    pyproject = (ROOT / "pyproject.toml").read_text()
    listed = re.search(rf"^{INSTALLED[mark]} = \[(.*?)\]", pyproject, re.MULTILINE | re.DOTALL)[1]
    tools = re.findall(r'"([\w-]+)"', listed)
    assert len(tools) >= 3
    for tool in tools:
        importlib.import_module(tool.replace("-", "_"))


# ---- summaries and counts ----


def torchinfo(net):
    summary = optional("torchinfo").summary(net, input_size=(2, *SHAPE), verbose=0)
    return summary.total_params, summary.total_mult_adds, len(summary.summary_list)


def torchsummary(net):
    printed = io.StringIO()
    tool = optional("torchsummary")
    with contextlib.redirect_stdout(printed):
        tool.summary(net, SHAPE, device="cpu")
    return printed.getvalue().replace("FusedPSAModule", "     PSAModule")


def lightning(net):
    pl = optional("lightning.pytorch")
    module = pl.LightningModule()
    module.net, module.example_input_array = net, images()
    module.forward = net.forward
    summary = pl.utilities.model_summary.ModelSummary(module, max_depth=-1)
    return [(layer.num_parameters, layer.out_size) for layer in summary._layer_summary.values()]


def thop(net):
    return optional("thop").profile(net, (images(),), verbose=False)


def fvcore(net):
    counts = optional("fvcore.nn").FlopCountAnalysis(net, images())
    counts = counts.unsupported_ops_warnings(False)
    return counts.total(), counts.by_module()


def ptflops(net):
    tool = optional("ptflops")
    return tool.get_model_complexity_info(
        net, SHAPE, as_strings=False, print_per_layer_stat=False, backend="pytorch"
    )


def torch_pruning_counts(net):
    return optional("torch_pruning").utils.count_ops_and_params(net, images())


COUNTS = (torchinfo, torchsummary, lightning, thop, fvcore, ptflops, torch_pruning_counts)


@pytest.mark.parametrize("count", COUNTS)
def test_counts(count):
    """They are the reference's, and the module is fused again after them."""
    fused, plain = nets()
    expected = count(plain)
    with pytest.warns(UserWarning, match=r"FusedPSAModule calls layers"):
        got = count(fused)
    assert got == expected
    assert why_not_fused(fused.psa) is None


# ---- attributions ----


def captum_layer(name):
    def activation(net):
        tool = optional("captum.attr").LayerActivation(net, net.get_submodule(name))
        return tool.attribute(images())

    return activation


def captum_grad_cam(name):
    def grad_cam(net):
        tool = optional("captum.attr").LayerGradCam(net, net.get_submodule(name))
        return tool.attribute(images(), target=1)

    return grad_cam


def grad_cam(name):
    """Of the package grad-cam, which needs torchvision."""

    def heat(net):
        tool = optional("pytorch_grad_cam")
        target = tool.utils.model_targets.ClassifierOutputTarget(1)
        with tool.GradCAM(net, [net.get_submodule(name)]) as cam:
            return torch.from_numpy(cam(images(), [target, target]))

    return heat


def captum_guided_backpropagation(net):
    return optional("captum.attr").GuidedBackprop(net).attribute(images(), target=1)


def captum_integrated_gradients(net):
    return optional("captum.attr").IntegratedGradients(net).attribute(images(), target=1, n_steps=4)


CALLED = {
    "se": captum_layer("psa.se"),
    "se.fc2": captum_layer("psa.se.fc2"),
    "conv_2": captum_grad_cam("psa.conv_2"),
    "grad_cam of conv_2": grad_cam("psa.conv_2"),
    "guided_backpropagation": captum_guided_backpropagation,
}
FUSED = {
    "psa": captum_grad_cam("psa"),
    "grad_cam of psa": grad_cam("psa"),
    "integrated_gradients": captum_integrated_gradients,
}


@pytest.mark.parametrize("attribution", CALLED)
def test_attributions_inside_the_module(attribution):
    fused, plain = nets()
    expected = CALLED[attribution](plain)
    with pytest.warns(UserWarning, match=r"FusedPSAModule calls layers"):
        got = CALLED[attribution](fused)
    assert_near(got, expected, ROUNDING)


@pytest.mark.parametrize("attribution", FUSED)
def test_attributions_of_the_module_leave_it_fused(attribution):
    fused, plain = nets()
    expected = FUSED[attribution](plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FusedPSAModule calls layers")
        got = FUSED[attribution](fused)
    assert_near(got, expected, ROUNDING)


# ---- models that were changed ----


def cpu_offload(net):
    optional("accelerate").cpu_offload(net, execution_device=torch.device("cpu"))
    return net(images()).detach()


def lora(net):
    """The outputs with the adapters, their gradients, and the output after merging."""
    peft = optional("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False)
    adapted = peft.get_peft_model(net, config).eval()
    out = adapted(images())
    out.square().sum().backward()
    grads = [p.grad.flatten() for p in adapted.parameters() if p.grad is not None]
    merged = adapted.merge_and_unload()
    assert not isinstance(merged.psa, FusedPSAModule) or why_not_fused(merged.psa) is None
    return torch.cat([out.detach().flatten(), *grads, merged(images()).detach().flatten()])


def pruned(net):
    """Two hidden units of the SE less."""
    tool = optional("torch_pruning")
    graph = tool.DependencyGraph().build_dependency(net, images())
    graph.get_pruning_group(net.psa.se.fc1, tool.prune_conv_out_channels, idxs=[0, 2]).prune()
    assert net.psa.se.fc2.in_channels == 2
    assert not isinstance(net.psa, FusedPSAModule) or why_not_fused(net.psa) is None
    return net(images()).detach()


def opacus(net):
    """The gradients of each sample."""
    module = optional("opacus").GradSampleModule(net.train())
    module(images()).square().sum().backward()
    return torch.cat([p.grad_sample.flatten() for p in module.parameters()])


def globally_pruned(net):
    layers = [(m, "weight") for m in net.modules() if isinstance(m, nn.Conv2d)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.5)
    return net(images()).detach()


def weight_norm_by_hooks(net):
    torch.nn.utils.weight_norm(net.psa.conv_2)
    torch.nn.utils.weight_norm(net.psa.se.fc2)
    return net(images()).detach()


def spectral_norm_by_hooks(net):
    torch.manual_seed(0)  # of its first vectors
    torch.nn.utils.spectral_norm(net.psa.se.fc1)
    return net(images()).detach()


def observed(net):
    """Eager-mode quantisation: its observers' ranges, and the output."""
    net.qconfig = torch.ao.quantization.default_qconfig
    prepared = torch.ao.quantization.prepare(net)
    out = prepared(images()).detach()
    observer = prepared.psa.conv_3.activation_post_process
    return torch.cat([out.flatten(), observer.min_val[None], observer.max_val[None]])


OF_TORCH = (globally_pruned, weight_norm_by_hooks, spectral_norm_by_hooks, observed)


@pytest.mark.parametrize("change", (cpu_offload, lora, pruned, opacus, *OF_TORCH))
def test_a_changed_model(change):
    fused, plain = nets()
    expected = change(plain)
    with pytest.warns(UserWarning, match=r"FusedPSAModule calls layers"):
        got = change(fused)
    assert_near(got, expected, ROUNDING)
