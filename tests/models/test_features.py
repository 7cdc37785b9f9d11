"""What tools ask of EPSANet without timm: maps by their indices, pruning, groups of parameters,
gradient checkpointing, tracing."""

import copy
import re
from collections import Counter

import pytest
import torch
from support.networks import narrow, psa_modules
from torch import nn

from epsa_fused import FusedPSAModule, record_attention


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


# ---- maps by their indices ----


def test_intermediates_are_what_the_named_modules_give(images):
    model, seen = narrow().eval(), []
    for info in model.feature_info:
        module = model.get_submodule(info["module"])
        module.register_forward_hook(lambda module, x, y: seen.append(y.clone()))
    last, maps = model.forward_intermediates(images)
    assert len(maps) == len(seen) == 5
    for i, (actual, expected) in enumerate(zip(maps, seen, strict=True)):
        assert torch.equal(actual, expected)
        info = model.feature_info[i]
        side = 64 // info["reduction"]
        assert actual.shape == (2, info["num_chs"], side, side)
    assert torch.equal(last, model.forward_features(images))


@pytest.mark.parametrize(
    ("indices", "expected"),
    ((None, [0, 1, 2, 3, 4]), (2, [3, 4]), ((0, 2), [0, 2]), ([-1, 1], [1, 4]), ((3,), [3])),
)
def test_indices(images, indices, expected):
    model = narrow().eval()
    _, every = model.forward_intermediates(images)
    calls = []
    model.layer4.register_forward_hook(lambda *args: calls.append(args))
    for options in ({}, {"stop_early": True}):
        calls.clear()
        maps = model.forward_intermediates(images, indices, intermediates_only=True, **options)
        assert len(maps) == len(expected)
        assert all(torch.equal(maps[i], every[j]) for i, j in enumerate(expected))
        assert len(calls) == (0 if options and 4 not in expected else 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"indices": 0}, ValueError, r"indices: expected at least 1, got 0"),
        ({"indices": 6}, ValueError, r"indices: expected at most 5, got 6"),
        ({"indices": [1, 5]}, ValueError, r"indices\[1\]: expected at most 4, got 5"),
        ({"indices": [-6]}, ValueError, r"indices\[0\]: expected at least -5, got -6"),
        ({"indices": []}, ValueError, r"indices: expected at least one index, got none"),
        ({"indices": True}, TypeError, r"indices: expected an int, got True"),
        ({"indices": "layer1"}, TypeError, r"indices: expected a sequence of ints, got 'layer1'"),
        ({"output_fmt": "NHWC"}, ValueError, r"output_fmt: expected 'NCHW', got 'NHWC'"),
    ),
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_maps_that_do_not_exist(images, options, error, message):
    with pytest.raises(error, match=message):
        narrow().forward_intermediates(images, **options)


# ---- pruning ----


@pytest.mark.parametrize(("indices", "kept"), (((0, -2), 3), ((0,), 0), (1, 4)))
def test_pruning_keeps_the_maps(images, indices, kept):
    model = narrow().eval()
    expected = model.forward_intermediates(images, indices, intermediates_only=True)
    pruned = copy.deepcopy(model)
    taken = pruned.prune_intermediate_layers(indices)
    assert max(taken) == kept and min(taken) >= 0
    for actual, old in zip(
        pruned.forward_intermediates(images, taken, intermediates_only=True), expected, strict=True
    ):
        assert torch.equal(actual, old)
    left = {name.split(".")[0] for name, _ in pruned.named_parameters()}
    assert left == {"conv1", "bn1", *(f"layer{i + 1}" for i in range(kept))}
    assert torch.equal(pruned.forward_features(images), expected[taken.index(max(taken))])
    assert torch.equal(pruned(images), pruned.forward_features(images))
    pyramid, whole = pruned.forward_pyramid(images), model.forward_pyramid(images)
    assert list(pyramid) == list(whole)[:kept] and len(pruned.feature_info) == kept + 1
    assert [m.shape[1] for m in pyramid.values()] == list(pruned.pyramid_channels)
    if kept < 4:
        with pytest.raises(ValueError, match="indices"):
            pruned.forward_intermediates(images, [4])
    pruned.reset_classifier(3, "avg")
    assert pruned(images).shape == (2, 3)
    assert pruned.head_hidden_size == model.feature_info[kept]["num_chs"]


def test_pruning_may_leave_the_classifier(images):
    model = narrow().eval()
    expected = model(images)
    assert model.prune_intermediate_layers(2, prune_head=False) == [3, 4]
    assert torch.equal(model(images), expected)


def test_nothing_is_pruned_for_wrong_indices():
    model = narrow()
    with pytest.raises(ValueError, match=r"indices\[0\]: expected at most 4, got 9"):
        model.prune_intermediate_layers([9])
    assert len(psa_modules(model)) == 6 and isinstance(model.fc, nn.Linear)


# ---- groups of parameters ----


@pytest.mark.parametrize(("coarse", "sizes"), ((False, [1, 2, 1, 2]), (True, [1, 1, 1, 1])))
def test_the_groups_of_parameters(coarse, sizes):
    """One for the stem, one for each block or stage; the classifier is in none."""
    model = narrow((1, 2, 1, 2), act_layer=nn.PReLU)
    patterns = [re.compile(p) for p in model.group_matcher(coarse).values()]
    groups = Counter()
    for name, _ in model.named_parameters():
        matches = [(i, *m.groups()) for i, p in enumerate(patterns) if (m := p.match(name))]
        assert len(matches) <= 1
        groups[matches[0] if matches else name] += 1
    blocks = [
        (1, str(i), *(() if coarse else (str(j),)))
        for i, size in enumerate(sizes, 1)
        for j in range(size)
    ]
    assert list(groups) == [(0,), *blocks, "fc.weight", "fc.bias"]


# ---- gradient checkpointing ----


def trained_step(model, images):
    """The outputs, all gradients and all buffers of one step from one seed."""
    torch.manual_seed(7)
    out = model(images)
    out.square().sum().backward()
    return [out, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "plain"))
def test_checkpointing_changes_nothing_but_memory(images, fused):
    """Random layers draw the same, and BatchNorm counts a batch once."""
    plain = narrow(fused=fused, drop_rate=0.3, drop_path_rate=0.4)
    model = copy.deepcopy(plain)
    model.set_grad_checkpointing()
    expected = trained_step(plain, images)
    assert all(map(torch.equal, trained_step(model, images), expected))
    assert model.bn1.num_batches_tracked == model.layer4[1].bn3.num_batches_tracked == 1
    model.set_grad_checkpointing(False)
    for net in (plain, model):
        net.zero_grad()
    assert all(map(torch.equal, trained_step(model, images), trained_step(plain, images)))


def kept_bytes(function):
    """The size of what autograd keeps of a call, its parameters aside."""
    storages = {}

    def pack(t):
        if not isinstance(t, nn.Parameter):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    del out
    return sum(storage.nbytes() for storage in storages.values())


def test_checkpointing_keeps_the_inputs_of_blocks_alone(images):
    model = narrow((3, 3, 3, 3))
    every = kept_bytes(lambda: model(images))
    model.set_grad_checkpointing()
    some = kept_bytes(lambda: model(images))
    stem = kept_bytes(lambda: model.forward_intermediates(images, [0], stop_early=True))
    assert stem < some < stem + (every - stem) / 3


def test_checkpointing_compiles():
    blocks = narrow((1, 1, 1, 1)).layer4
    plain = copy.deepcopy(blocks)
    x = torch.randn(2, 64, 4, 4)
    expected = trained_step(plain, x)
    for block in blocks:
        block.grad_checkpointing = True
    compiled = torch.compile(blocks, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    actual = [*(p.grad for p in blocks.parameters()), *blocks.buffers()]
    for a, b in zip(actual, expected[1:], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_forward_intermediates_are_checkpointed(images):
    model = narrow()
    model.set_grad_checkpointing()
    calls = []
    model.layer2[0].conv1.register_forward_pre_hook(lambda *args: calls.append(args))
    model.forward_intermediates(images)[0].sum().backward()
    assert len(calls) == 2


def test_checkpointing_takes_several_backward_passes(images):
    """As torch's own does: a gradient for each loss of one graph."""
    plain = narrow(drop_path_rate=0.3)
    model = copy.deepcopy(plain)
    model.set_grad_checkpointing()
    results = []
    for net in (plain, model):
        torch.manual_seed(1)
        out = net(images)
        parameters = list(net.parameters())
        first = torch.autograd.grad(out[:, 0].sum(), parameters, retain_graph=True)
        second = torch.autograd.grad(out[:, 1].square().sum(), parameters)
        results.append([*first, *second, *net.buffers()])
    assert all(map(torch.equal, *results))


def test_hooks_of_stages_and_blocks_run_once_beside_checkpointing(images):
    model = narrow()
    model.set_grad_checkpointing()
    seen = []
    for name in ("layer2", "layer2.1"):
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: seen.append(name))
    model(images).sum().backward()
    assert seen == ["layer2.1", "layer2"]


class Renormalised(nn.BatchNorm2d):
    """Reads its statistics in training, too."""

    def forward(self, x):
        before = self.running_mean.clone()
        return super().forward(x) * 2 - before[:, None, None]


def test_checkpointing_recomputes_from_the_buffers_of_before(images):
    plain = narrow(norm_layer=Renormalised)
    plain(images)  # the statistics are no zeros any more
    model = copy.deepcopy(plain)
    model.set_grad_checkpointing()
    assert all(map(torch.equal, trained_step(model, images), trained_step(plain, images)))


def test_a_record_has_each_call_once_beside_checkpointing(images):
    model = narrow()
    model.set_grad_checkpointing()
    with record_attention(model) as record:
        model(images).sum().backward()
    assert {len(calls) for calls in record.values()} == {1}


def test_checkpointing_is_switched_by_a_bool():
    with pytest.raises(TypeError, match=r"enable: expected a bool, got 'no'"):
        narrow().set_grad_checkpointing("no")


# ---- tracing ----


@pytest.mark.parametrize("checkpointing", (False, True), ids=("plain", "checkpointing"))
@pytest.mark.parametrize("trace", ("fx", "jit"))
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_tracing(images, trace, checkpointing):
    model = narrow(global_pool="max", act_layer=nn.SiLU, drop_path_rate=0.1).eval()
    model.set_grad_checkpointing(checkpointing)
    fx = trace == "fx"
    traced = torch.fx.symbolic_trace(model) if fx else torch.jit.trace(model, images)
    more = torch.randn(3, 3, 64, 64)
    assert torch.equal(traced(more), model(more))


def test_a_training_network_is_traced_by_fx(images):
    """Its nodes are drawn anew in each call, and PSA modules stay whole."""
    model = narrow(drop_path_rate=0.5).train()
    traced = torch.fx.symbolic_trace(model)
    torch.manual_seed(3)
    expected = model(images)
    torch.manual_seed(3)
    assert torch.equal(traced(images), expected)
    modules = [m for m in traced.modules() if isinstance(m, FusedPSAModule)]
    assert len(modules) == len(psa_modules(model))
