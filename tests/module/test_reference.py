"""The reference itself: against loops over the paper's formulas, and against the published code.

Everything else is compared with the reference, so nothing here takes anything from it.
"""

import math

import pytest
import torch
from support import published
from support.cases import (
    BY_NAME,
    ORDERS,
    SMALL,
    WEIGHT_KINDS,
    Case,
    make_inputs,
    name_of,
)
from support.maths import gradients
from support.modules import gradient_sizes
from support.tolerance import assert_close, make_cotangents, run

from epsa_fused import FusedPSAModule, PSAModule, psa_attention, psa_attention_reference

# ---- against the formulas ----


def attention_by_loops(inputs):
    """Equations 4 to 6 with Python's own floats: a [N][S][C]."""
    branches, (n, channels, _, _) = len(inputs.feats), inputs.feats[0].shape
    w1, b1, w2, b2 = (None if w is None else w.squeeze().tolist() for w in inputs.weights)
    if inputs.weights[0].dim() in (2, 4):  # shared by all branches
        w1, w2 = [w1] * branches, [w2] * branches
        b1, b2 = b1 and [b1] * branches, b2 and [b2] * branches
    attention = []
    for sample in range(n):
        z = []
        for s, feat in enumerate(inputs.feats):
            values = feat[sample].flatten(1).tolist()
            p = [math.fsum(plane) / len(plane) for plane in values]
            h = []
            for j, row in enumerate(w1[s]):
                u = sum(w * x for w, x in zip(row, p, strict=True)) + (b1[s][j] if b1 else 0)
                h.append(max(u, 0.0))
            z.append([])
            for c, row in enumerate(w2[s]):
                v = sum(w * x for w, x in zip(row, h, strict=True)) + (b2[s][c] if b2 else 0)
                z[s].append(1 / (1 + math.exp(-v)))
        sums = [sum(math.exp(z[s][c]) for s in range(branches)) for c in range(channels)]
        attention.append(
            [[math.exp(z[s][c]) / sums[c] for c in range(channels)] for s in range(branches)]
        )
    return torch.tensor(attention, dtype=torch.float64)


@pytest.mark.parametrize("function", (psa_attention_reference, psa_attention))
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", WEIGHT_KINDS, ids=name_of)
def test_forward_is_the_formulas(kind, order, function):
    case = Case("tiny", 2, 3, 4, 3, 2, 2)
    inputs = make_inputs(case, torch.float64, kind=kind)
    out, attention = function(*inputs.args, branch_order=order, return_attention=True)
    expected = attention_by_loops(inputs)
    assert_close(attention, expected, torch.float64)
    for s, feat in enumerate(inputs.feats):
        slot = {"reversed": case.branches - 1 - s, "forward": s}[order]
        channels = out[:, slot * case.channels : (slot + 1) * case.channels]
        assert_close(channels, feat * expected[:, s, :, None, None], torch.float64)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", WEIGHT_KINDS, ids=name_of)
@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_autograd_of_the_reference_is_the_formulas(case, kind, order):
    inputs = make_inputs(case, torch.float64, kind=kind)
    cotangents = make_cotangents(case, torch.float64)
    result = run(psa_attention_reference, inputs, *cotangents, branch_order=order)
    expected = gradients(inputs, *cotangents, branch_order=order)
    sizes = gradients(inputs, *cotangents, branch_order=order, absolute=True)
    for name, value in expected.items():
        assert_close(result[name], value, torch.float64, magnitude=sizes[name], name=name)


# ---- against the published code ----


KEYS = [
    *(f"conv_{i}.weight" for i in (1, 2, 3, 4)),
    *(f"se.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("weight", "bias")),
]
CONFIGURATIONS = {
    "stage1": (64, 64, 7, {}),
    "stage2": (128, 128, 4, {}),
    "stride_2": (64, 128, 9, {"stride": 2}),
    "32_groups": (64, 128, 5, {"conv_groups": (32, 32, 32, 32)}),
    "small_kernels": (64, 64, 6, {"conv_kernels": (1, 3, 5, 7), "conv_groups": (1, 2, 4, 8)}),
}


@pytest.mark.parametrize("cls", (PSAModule, FusedPSAModule))
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_the_published_module_and_ours_are_one(configuration, cls):
    """state_dict goes both ways, and the outputs and every gradient are equal."""
    inplans, planes, size, options = CONFIGURATIONS[configuration]
    seed = published.PSAModule(inplans, planes, **options).double()
    ours = cls(inplans, planes, **options).double()
    assert list(seed.state_dict()) == KEYS
    assert list(ours.state_dict()) == KEYS
    ours.load_state_dict(seed.state_dict(), strict=True)

    x = torch.randn(2, inplans, size, size, dtype=torch.float64)
    expected, out = seed(x), ours(x)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    out.backward(grad)
    if cls is PSAModule:
        assert torch.equal(out, expected)
    assert_close(out, expected.detach(), torch.float64)
    sizes = gradient_sizes(seed, x, grad)
    for (name, a), b in zip(ours.named_parameters(), seed.parameters(), strict=True):
        assert_close(a.grad, b.grad, torch.float64, magnitude=sizes[name], name=name)

    ours = cls(inplans, planes, **options).double()
    seed.load_state_dict(ours.state_dict(), strict=True)
    assert_close(ours(x).detach(), seed(x).detach(), torch.float64)


def test_the_articles_example():
    assert FusedPSAModule(512, 512)(torch.randn(1, 512, 14, 14)).shape == (1, 512, 14, 14)


# ---- against PSA as External-Attention-pytorch has it ----


@pytest.mark.parametrize("function", (psa_attention_reference, psa_attention))
@pytest.mark.parametrize("branches", (2, 4, 8))
def test_per_branch_weights_are_those_of_the_other_psa(branches, function):
    module = published.ExternalPSA(16 * branches, reduction=4, S=branches).double()
    x = torch.randn(2, 16 * branches, 6, 5, dtype=torch.float64)
    fc1 = torch.stack([se[1].weight for se in module.se_blocks])
    fc2 = torch.stack([se[3].weight for se in module.se_blocks])
    out = function(module.branch_maps(x), fc1, None, fc2, None, branch_order="forward")
    assert_close(out.detach(), module(x).detach(), torch.float64)


# ---- what the reference takes ----


def test_an_unknown_branch_order_is_refused():
    inputs = make_inputs(BY_NAME["odd"])
    with pytest.raises(ValueError, match=r"branch_order.*'reversed', 'forward'.*'backward'"):
        psa_attention_reference(*inputs.args, branch_order="backward")


@pytest.mark.parametrize("order", ORDERS)
def test_an_empty_batch(order):
    case = BY_NAME["empty_batch"]
    out, attention = psa_attention_reference(
        *make_inputs(case).args, branch_order=order, return_attention=True
    )
    assert (out.shape, attention.shape) == (case.out_shape, case.attention_shape)
