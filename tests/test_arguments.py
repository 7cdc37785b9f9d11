"""Arguments of a wrong kind: TypeError or ValueError that names the argument, what was expected and
what was given. No error shows the values of an array."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import epsa_fused
from epsa_fused import (
    EPSABlock,
    FusedPSAModule,
    FusedSplitPSA,
    PSAModule,
    SplitPSA,
    epsanet50,
    fuse,
    prepack,
    psa_attention,
    unfuse,
)
from epsa_fused._checks import given
from epsa_fused.functional import spc_conv

FEATS = [torch.ones(1, 4, 2, 2)] * 2
FC1, FC2 = torch.ones(2, 4), torch.ones(4, 2)
ARRAY = np.full((1, 64, 4, 4), 123.0)


def module(**options: object) -> FusedPSAModule:
    return FusedPSAModule(**{"inplans": 64, "planes": 64} | options)


def set_to(module: nn.Module, **attributes: object) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def split(kind: type[SplitPSA]) -> SplitPSA:
    convs = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)]
    layers = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 1, 1), nn.ReLU(), nn.Conv2d(1, 4, 1))
    return kind(convs, [nn.Sequential(*copy.deepcopy(layers), nn.Sigmoid()) for _ in range(2)])


def attention(feats: object = FEATS, fc1: object = FC1, **options: object) -> object:
    return psa_attention(feats, fc1, None, FC2, None, **options)


def conv(**options: object) -> object:
    given = {"x": torch.ones(1, 4, 4, 4), "weights": [torch.ones(2, 4, 3, 3)], "groups": [1]}
    return spc_conv(**given | {"padding": [1]} | options)


WRONG = {
    "conv_kernels: expected a sequence of ints, got 3": lambda: module(conv_kernels=3),
    "conv_groups: expected a sequence of ints, got None": lambda: module(conv_groups=None),
    "conv_kernels: expected a sequence of ints, got '3579'": lambda: module(conv_kernels="3579"),
    "conv_kernels: expected a sequence of ints, got an object of type numpy.ndarray": lambda: (
        PSAModule(64, 64, np.array([3, 5, 7, 9]))
    ),
    "conv_groups[1]: expected an int, got True": lambda: module(conv_groups=(1, True, 8, 16)),
    "inplans: expected an int, got True": lambda: module(inplans=True),
    "stride: expected an int, got True": lambda: module(stride=True),
    "stride: expected an int, got an object of type numpy.int64": lambda: module(
        stride=np.int64(1)
    ),
    "stride: expected at most 2147483647, got 18446744073709551616": lambda: module(stride=2**64),
    "spc_conv: padding[0]: expected at most 2147483647, got 4294967296": lambda: conv(
        padding=[2**32]
    ),
    "inplanes: expected an int, got 'a'": lambda: EPSABlock("a", 64),
    "planes: expected an int, got True": lambda: EPSABlock(64, True),
    "stride: expected at least 1, got 0": lambda: EPSABlock(64, 64, 0),
    "downsample: expected a torch.nn.Module, got 3": lambda: EPSABlock(64, 64, downsample=3),
    "EPSANet: x: expected a Tensor, got None": lambda: epsanet50()(None),
    "convs: expected a sequence of torch.nn.Module, got None": lambda: SplitPSA(None, None),
    "se_blocks: expected a sequence of torch.nn.Module, got 3": lambda: SplitPSA([], 3),
    "convs[0]: expected a torch.nn.Module, got 1": lambda: FusedSplitPSA([1, 2], [3, 4]),
    "FusedPSAModule: save_output: expected a bool, got 'no'": lambda: set_to(
        module(), save_output="no"
    )(torch.ones(1, 64, 4, 4)),
    "save_output: expected a bool, got 'no'": lambda: module(save_output="no"),
    "FusedPSAModule: x: expected a Tensor, got None": lambda: module()(None),
    "FusedPSAModule: x: expected a Tensor, got an object of type numpy.ndarray": lambda: module()(
        ARRAY
    ),
    "FusedPSAModule: x: expected a Tensor, got an object of type list": lambda: module()(
        [torch.ones(1)]
    ),
    "PSAModule: x: expected a Tensor, got None": lambda: PSAModule(64, 64)(None),
    "SplitPSA: x: expected a Tensor, got 3": lambda: split(SplitPSA)(3),
    "FusedSplitPSA: x: expected a Tensor, got None": lambda: split(FusedSplitPSA)(None),
    "FusedPSAModule.prepack: height: expected an int, got '5'": lambda: (
        module().eval().prepack("5", 5)
    ),
    "FusedPSAModule.prepack: width: expected at least 1, got 0": lambda: (
        module().eval().prepack(5, 0)
    ),
    "prepack: model: expected a torch.nn.Module, got None": lambda: prepack(None),
    "prepack: x of FusedPSAModule: expected a Tensor, got None": lambda: prepack(module().eval()),
    "prepack: x of FusedPSAModule: expected a Tensor, got 3": lambda: prepack(module().eval(), 3),
    "unpack: model: expected a torch.nn.Module, got 3": lambda: epsa_fused.unpack(3),
    "fuse: model: expected a torch.nn.Module, got 'm'": lambda: fuse("m"),
    "unfuse: model: expected a torch.nn.Module, got None": lambda: unfuse(None),
    "inplace: expected a bool, got 1": lambda: fuse(PSAModule(64, 64), inplace=1),
    "psa_attention: feats: expected a sequence of maps, got None": lambda: attention(None),
    "psa_attention: feats: expected a sequence of maps, got 3": lambda: attention(3),
    "psa_attention: feats[1]: expected a Tensor, got None": lambda: attention([FEATS[0], None]),
    "psa_attention: feats[0]: expected a Tensor, got an object of type numpy.ndarray": lambda: (
        attention([ARRAY, ARRAY])
    ),
    "psa_attention: fc1_weight: expected a Tensor, got an object of type numpy.ndarray": lambda: (
        attention(fc1=ARRAY)
    ),
    "psa_attention: feats is a Tensor, expected a sequence of 2 to 8 maps (try feats.chunk("
    "branches, dim=1))": lambda: attention(torch.cat(FEATS, 1)),
    "return_attention: expected a bool, got 'no'": lambda: attention(return_attention="no"),
    "psa_attention_reference: feats: expected a sequence, got 3": lambda: (
        epsa_fused.psa_attention_reference(3, FC1, None, FC2, None)
    ),
    "spc_conv: x: expected a Tensor, got an object of type numpy.ndarray": lambda: conv(x=ARRAY),
    "spc_conv: weights: expected a sequence of Tensors, got 3": lambda: conv(weights=3),
    "spc_conv: weights[0]: expected a Tensor, got 3": lambda: conv(weights=[3]),
    "spc_conv: groups: expected a sequence of ints, got 1": lambda: conv(groups=1),
    "spc_conv: padding: expected a sequence of ints, got 1": lambda: conv(padding=1),
    "spc_conv: dilation[0]: expected an int, got '1'": lambda: conv(dilation=["1"]),
    "spc_conv: stride: expected an int, got (1, 1)": lambda: conv(stride=(1, 1)),
    "drop_rate: expected a number, got '0.1'": lambda: epsanet50(drop_rate="0.1"),
    "norm_layer: expected a callable, got 'bn'": lambda: epsanet50(norm_layer="bn"),
    "num_classes: expected an int, got True": lambda: epsanet50(num_classes=True),
    "fused: expected a bool, got None": lambda: epsanet50(fused=None),
    "planes: expected a sequence of ints, got 64": lambda: epsanet50(planes=64),
}


@pytest.mark.parametrize("function", (psa_attention, epsa_fused.psa_attention_reference))
@pytest.mark.parametrize("order", ("backward", "", None, True))
def test_an_unknown_branch_order(order, function):
    message = r"branch_order: expected one of \('reversed', 'forward'\), got " + repr(order)
    with pytest.raises(ValueError, match=message):
        function(FEATS, FC1, None, FC2, None, branch_order=order)


@pytest.mark.parametrize("message", WRONG)
def test_the_error_names_the_argument(message):
    with pytest.raises((TypeError, ValueError)) as error:
        WRONG[message]()
    assert str(error.value) == message


def test_a_network_of_narrow_stages_takes_the_reduction_that_the_error_names():
    options = {"planes": (16, 32, 64, 128), "conv_groups": (1, 1, 2, 4)}
    with pytest.raises(ValueError, match="reduction=4 gives one"):
        epsanet50(**options)
    assert epsanet50(**options, reduction=4).layer1[0].conv2.se.fc1.out_channels == 1


FOREIGN = {
    "sparse": torch.Tensor.to_sparse,
    "mkldnn": torch.Tensor.to_mkldnn,
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
@pytest.mark.filterwarnings("ignore")  # torch warns of its prototypes
def test_tensors_without_strided_memory_are_refused_by_name(kind, mode):
    image, weight, maps = torch.ones(1, 4, 4, 4), torch.ones(2, 4, 3, 3), torch.ones(1, 4, 2, 2)
    image.requires_grad_(mode is torch.enable_grad and kind not in ("quantized", "nested"))
    foreign = FOREIGN[kind]
    with mode():
        calls = {
            "feats[1]": lambda: attention([maps, foreign(maps)]),
            "fc1_weight": lambda: attention(fc1=foreign(FC1)),
            "x": lambda: conv(x=foreign(image)),
            "weights[0]": lambda: conv(weights=[foreign(weight)]),
        }
        for name, call in calls.items():
            with pytest.raises(TypeError) as error:
                call()
            words = f": {name} is a {kind} tensor, expected one with strided memory"
            assert words in str(error.value)
        with pytest.raises(TypeError, match=f"^psa_forward: x is a {kind} tensor"):
            module()(foreign(torch.ones(1, 64, 4, 4)))


@pytest.mark.parametrize("feats", (None, 3, [None, None], [ARRAY, ARRAY]))
def test_a_transform_names_the_argument_too(feats):
    def loss(fc1: torch.Tensor) -> torch.Tensor:
        return psa_attention(feats, fc1, None, FC2, None).sum()

    with pytest.raises(TypeError, match=r"^psa_attention: feats(\[0\])?: expected a"):
        torch.func.grad(loss)(FC1)


def test_every_operator_refuses_every_foreign_kind():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("epsa_fused::")]
    names = [n for n in names if not n.endswith("_meta")]
    assert len(names) == 8
    keys = ("Sparse{}", "SparseCsr{}", "Quantized{}", "NestedTensor{}")
    keys = [key.format(device) for key in keys for device in ("CPU", "CUDA")]
    for name in names:
        for key in [*keys, "MkldnnCPU", "AutogradNestedTensor"]:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "None"),
        ("x" * 100, "'" + "x" * 59 + "..."),
        ((1, "a", None), "(1, 'a', None)"),
        ([torch.ones(2)], "an object of type list"),
        (ARRAY, "an object of type numpy.ndarray"),
        (torch.ones(2), "an object of type torch.Tensor"),
    ],
)
def test_what_is_said_of_a_value(value, said):
    assert given(value) == said
