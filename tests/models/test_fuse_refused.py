"""fuse(): what it refuses, and what it leaves alone and names."""

import copy
import re

import pytest
import torch
from support import published
from support.fusing import description, without_warning
from support.lookalikes.in_branches import on_gpus
from support.lookalikes.parts import (
    Shared,
    convolutions,
    external_psa,
    published_psa,
    recalibrated,
    squeeze,
    with_norm,
)
from support.lookalikes.subclasses import (
    Failing,
    Keeping,
    Sum,
    WithDropout,
    WithoutReLU,
    WithoutSigmoid,
    WithShortcut,
)
from support.tolerance import assert_near
from torch import nn
from torch.nn.utils import prune

from epsa_fused import FusedPSAModule, FusedSplitPSA, PSAModule, fuse

REFUSED_HOOKS = {
    "se": (lambda m: m.se.register_forward_hook(print), r"0\.se has hooks"),
    "fc2": (lambda m: m.se.fc2.register_full_backward_hook(print), r"0\.se\.fc2 has hooks"),
    "softmax": (lambda m: m.softmax.register_forward_pre_hook(print), r"0\.softmax has hooks"),
    "se_state_dict": (lambda m: m.se.register_load_state_dict_post_hook(print),
        r"0 has hooks in _load_state_dict_post_hooks"),
    "state_dict": (lambda m: m.register_state_dict_post_hook(lambda *args: None),
        r"0 has hooks in _state_dict_hooks"),
    "load": (lambda m: m.register_load_state_dict_post_hook(print),
        r"0 has hooks in _load_state_dict_post_hooks"),
    "old_backward": (lambda m: m.register_backward_hook(lambda *args: None),
        r"0 has hooks in _backward_hooks"),
}  # fmt: skip


@pytest.mark.parametrize("hook", REFUSED_HOOKS)
def test_hooks_that_cannot_be_kept_are_an_error(hook):
    register, message = REFUSED_HOOKS[hook]
    # the first and the last could be fused: nothing may be half-done
    model = nn.Sequential(published_psa(), external_psa(), published.PSAModule(64, 64))
    register(model[0])
    before = [(name, type(m), id(m)) for name, m in model.named_modules()]
    for inplace in (False, True):
        with pytest.raises(RuntimeError, match=rf"fuse: {message}.*remove them first"):
            fuse(model, inplace=inplace)
    assert [(name, type(m), id(m)) for name, m in model.named_modules()] == before


def test_hooks_that_were_removed_are_no_error():
    model = nn.Sequential(published_psa(), external_psa())
    for layer in (model[0].se, model[0].se.fc1, model[0].softmax, model[1].se_blocks[0][1]):
        layer.register_forward_hook(print).remove()
        layer.register_full_backward_hook(print).remove()
    fused = without_warning(fuse, model)
    assert len(fused.fuse_report.replaced) == 2


def test_the_hook_error_of_a_model_that_is_the_module():
    module = published_psa()
    module.se.fc1.register_forward_hook(print)
    with pytest.raises(RuntimeError, match=r"fuse: se\.fc1 has hooks"):
        fuse(module)


def test_hooks_on_a_split_modules_se_are_an_error():
    model = nn.Sequential(external_psa())
    model[0].se_blocks[1][3].register_forward_hook(print)
    with pytest.raises(RuntimeError, match=r"0\.se_blocks\.1\.3 has hooks"):
        fuse(model)


def test_a_model_that_cannot_be_copied():
    model = nn.Sequential(published_psa()).double()
    prune.l1_unstructured(model[0].conv_1, "weight", 0.5)
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    expected = model(x).detach()
    with pytest.raises(RuntimeError, match=r"fuse: Sequential cannot be copied, use .*inplace"):
        fuse(model)
    assert type(model[0]) is published.PSAModule
    fused = fuse(model, inplace=True)
    assert type(fused[0]) is FusedPSAModule
    assert_near(fused(x), expected)


def test_a_module_that_cannot_be_copied():
    model = nn.Sequential(published_psa(), nn.Conv2d(64, 16, 1), published_psa(Keeping))
    model(torch.randn(2, 16, 6, 6))
    with pytest.warns(UserWarning, match=r"left alone 1 .*2 \(it cannot be copied for a trial"):
        fuse(model, inplace=True)
    assert [type(m) for m in model] == [FusedPSAModule, nn.Conv2d, Keeping]


class CopiesItself(nn.Sequential):
    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("part", ("se", "branches"))
def test_a_module_that_is_its_own_copy(part):
    """A trial would change the weights of the model itself."""
    branches = map(CopiesItself, convolutions()) if part == "branches" else None
    se = CopiesItself(*squeeze()) if part == "se" else None
    model = nn.Sequential(Shared(branches, se))
    before, x = description(model), torch.randn(2, 16, 6, 6)
    expected = model(x)
    with pytest.raises(RuntimeError, match=r"copy of a CopiesItself is the same object"):
        fuse(model)
    with pytest.warns(UserWarning, match=r"for a trial: the copy of a CopiesItself is the same"):
        fuse(model, inplace=True)
    assert description(model) == before and torch.equal(model(x), expected)


class KeepsAFunction(Shared):
    def __init__(self):
        super().__init__(with_norm())
        branches = list(self.conv_branches)
        self.run = lambda x: [branch(x) for branch in branches]

    def forward(self, x):
        return recalibrated(maps := self.run(x), [self.se_block(m) for m in maps])


def test_a_copy_that_calls_the_layers_of_the_module_itself():
    model = nn.Sequential(KeepsAFunction()).double()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"nothing to fuse"):
        fuse(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_thing_that_is_no_module():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got .*dict"):
        fuse(dict(published_psa().state_dict()))


# ---- what is left alone ----


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def changed(module, change):
    change(module)
    return module


def set_child(path, make):
    def change(module):
        parent, _, name = path.rpartition(".")
        parent = module.get_submodule(parent)
        setattr(parent, name, make(getattr(parent, name)))

    return change


def set_forward(module):
    module.forward = lambda x: x


MISFITS = {
    "another_result": (lambda: published_psa(WithShortcut), r"something else than PSA"),
    "no_sigmoid": (lambda: published_psa(WithoutSigmoid), r"something else than PSA"),
    "no_relu": (lambda: published_psa(WithoutReLU), r"something else than PSA"),
    "another_shape": (lambda: published_psa(Sum), r"something else than PSA"),
    "failing": (lambda: published_psa(Failing), r"a trial on \[4, 16, 3, 2\] failed: of no use"),
    "dropout": (lambda: published_psa(WithDropout).eval(), r"draws random numbers in training"),
    "patched": (lambda: changed(published_psa(), set_forward), r"forward was replaced"),
    "patched_reference": (lambda: changed(PSAModule(64, 64), set_forward), r"forward was replaced"),
    "patched_attention_of_the_reference": (
        lambda: changed(PSAModule(64, 64), lambda m: setattr(m, "attention", torch.stack)),
        r"something else than PSA"),
    "lazy": (lambda: changed(
        published_psa(), set_child("conv_1", lambda c: nn.LazyConv2d(16, 3, bias=False))),
        r"its parameters are not initialised; run the model once"),
    "lazy_se": (
        lambda: changed(published_psa(), set_child("se.fc1", lambda c: nn.LazyConv2d(1, 1))),
        r"its parameters are not initialised; run the model once"),
    "another_child": (
        lambda: changed(published_psa(), lambda m: m.add_module("bn", nn.BatchNorm2d(64))),
        r"other children too: bn"),
    "a_gap": (
        lambda: changed(published_psa(), lambda m: m.add_module("conv_6", nn.Conv2d(16, 16, 1))),
        r"something else than PSA"),
    "parameter": (lambda: changed(
        published_psa(), lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(1)))),
        r"parameters or buffers of its own: scale"),
    "parameter_of_the_se": (
        lambda: changed(published_psa(), lambda m: m.se.add_module("bn", nn.BatchNorm2d(16))),
        r"has no SE network: .*what is more than that: se\.bn"),
    "buffer_of_the_softmax": (lambda: changed(
        published_psa(), lambda m: m.softmax.register_buffer("temperature", torch.ones(1))),
        r"other children too: softmax"),
    "even_kernel": (lambda: changed(
        published_psa(), set_child("conv_3", lambda c: nn.Conv2d(16, 16, 4, bias=False))),
        r"paddings less what the kernels reach are .*\(-3, -3\)"),
    "lora_se": (lambda: changed(published_psa(), set_child("se.fc1", Lora)),
        r"something else than PSA.*se\.fc1 is a Lora"),
    "lora_se_of_the_reference": (lambda: changed(PSAModule(64, 64), set_child("se.fc1", Lora)),
        r"something else than PSA.*se\.fc1 is a Lora"),
    "se_of_another_width": (
        lambda: changed(published_psa(), set_child("se.fc2", lambda c: nn.Conv2d(1, 32, 1))),
        r"it has no SE network"),
    "gelu": (lambda: changed(published_psa(), set_child("se.relu", lambda r: nn.GELU())),
        r"se\.relu is a GELU"),
    "split_lengths": (lambda: changed(external_psa(), lambda m: m.se_blocks.append(m.se_blocks[0])),
        r"4 branches and 5 SE networks"),
    "split_bias": (
        lambda: changed(external_psa(), set_child("se_blocks.1.1", lambda c: nn.Conv2d(16, 4, 1))),
        r"the biases of the SE networks are .*expected equal"),
    "split_widths": (lambda: changed(external_psa(), lambda m: (
        set_child("se_blocks.1.1", lambda c: nn.Conv2d(16, 2, 1, bias=False))(m),
        set_child("se_blocks.1.3", lambda c: nn.Conv2d(2, 16, 1, bias=False))(m))),
        r"the channels of the SE networks are .*\(16, 2\)"),
    "split_channels": (
        lambda: changed(external_psa(), set_child("convs.3", lambda c: nn.Conv2d(8, 16, 1))),
        r"input channels of the branches are \[16, 16, 16, 8\], expected equal"),
}  # fmt: skip


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_left_alone_and_named(misfit, inplace):
    make, why = MISFITS[misfit]
    model = nn.ModuleDict({"good": published_psa(), "bad": make()})
    kept = type(model["bad"])
    with pytest.warns(UserWarning, match=rf"left alone 1 .*bad \(.*{why}"):
        fused = fuse(model, inplace=inplace)
    assert type(fused["good"]) is FusedPSAModule and type(fused["bad"]) is kept
    report = fused.fuse_report
    assert list(report.replaced) == ["good"] and list(report.left) == ["bad"]
    assert re.search(why, report.left["bad"])
    assert str(report).splitlines()[0] == "fuse: 1 replaced, 1 left alone"
    assert "  bad: left alone, " in str(report) and "  good: FusedPSAModule" in str(report)


def test_branches_that_no_trial_can_run_are_named():
    """Stand-ins for them say nothing of what they leave behind."""
    with pytest.warns(UserWarning, match=r"with its own branches on the CPU failed: not implement"):
        fuse(nn.Sequential(Shared(on_gpus())))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_traced_module_is_left_alone_and_named():
    x = torch.randn(2, 16, 6, 6)
    model = nn.ModuleDict({"good": published_psa(), "bad": torch.jit.trace(published_psa(), x)})
    with pytest.warns(UserWarning, match=r"left alone 1 .*bad \(it was compiled by torch\.jit"):
        fused = fuse(model)
    assert list(fused.fuse_report.replaced) == ["good"]
    assert torch.equal(fused["bad"](x), model["bad"](x))


@pytest.mark.parametrize("inplace", (False, True))
def test_nothing_to_fuse(inplace):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    before = description(model)
    with pytest.warns(UserWarning, match=r"nothing to fuse, Sequential has no PSA module that can"):
        fused = fuse(model, inplace=inplace)
    assert description(model) == before
    assert repr(fused) == repr(model) and not fused.fuse_report.replaced


def test_what_is_fused_already():
    model = fuse(nn.Sequential(published_psa(), external_psa()))
    with pytest.warns(UserWarning, match=r"nothing to fuse.*besides 2 that are fused already"):
        again = fuse(model)
    assert [type(m) for m in again] == [FusedPSAModule, FusedSplitPSA]
