"""fuse() on what people make of the published module: it goes by what the layers are and do."""

import copy
import pickle
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support import published
from support.fusing import description, without_warning
from support.lookalikes.blocks import BLOCKS
from support.lookalikes.children import AndNorms, PlainList, with_ses
from support.lookalikes.conditions import (
    LooksAtAttributes,
    LooksAtBuffers,
    LooksAtDtypes,
    LooksAtNames,
)
from support.lookalikes.in_branches import (
    LastBranchFirst,
    WithConstant,
    in_place_first,
    pooling,
)
from support.lookalikes.near_misses import NEAR_MISSES
from support.lookalikes.odd_calls import ODD_CALLS
from support.lookalikes.parts import (
    Shared,
    convolution,
    convolutions,
    published_psa,
    squeeze,
    with_norm,
)
from support.lookalikes.subclasses import ReadsSE
from support.lookalikes.variants import VARIANTS, Gate, Named, Own, Parts
from support.tolerance import assert_near, largest, relative_error
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from epsa_fused import (
    fuse,
    optimize_for_inference,
    prepack,
    record_attention,
    unfuse,
    why_not_fused,
)
from epsa_fused.modules.adopted import AdoptedPSA, FusedAdoptedPSA
from epsa_fused.modules.layers import existing

LIMIT = 1e-14


def model_of(make, scale=1.0):
    """A model in float64, whose weights give outputs of about one and SE weights that differ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), make()).double()
    for p in model.parameters():
        fan_in = p[0].numel() if p.dim() > 1 else 10
        nn.init.normal_(p, std=scale * fan_in**-0.5)
    return model


def image(channels, *size):
    return torch.randn(*size[:1], channels, *size[1:], dtype=torch.float64)


def assert_same(actual, expected, x):
    """Equal outputs and gradients, within LIMIT of the largest output and gradient."""
    results = []
    for model in (actual, expected):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        grads = torch.autograd.grad(out.sin().sum(), [leaf, *model.parameters()])
        results.append((out, grads))
    (out, grads), (expected_out, expected_grads) = results
    assert relative_error(out, expected_out) <= LIMIT
    size = max(map(largest, expected_grads))
    names = ["x", *dict(expected.named_parameters())]
    for name, grad, other in zip(names, grads, expected_grads, strict=True):
        error = largest(grad - other)
        assert error <= LIMIT * size, f"gradient of {name}: {error / size:.2g}"


# ---- what is fused ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_fused_and_computes_the_same(variant):
    v = VARIANTS[variant]
    model = model_of(v.make)
    before = description(model)
    fused = without_warning(fuse, model)
    assert description(model) == before
    assert type(fused[1]).__name__ == v.kind and fused[1].branch_order == v.order
    assert list(fused.fuse_report.replaced) == ["1"] and not fused.fuse_report.left
    # the same tensors, by the same names
    assert list(fused.state_dict()) == list(model.state_dict())
    parameters = dict(model.named_parameters())
    assert parameters.keys() == dict(fused.named_parameters()).keys()
    assert all(p is parameters[name] for name, p in fused.named_parameters())
    independent = copy.deepcopy(fused)  # a BatchNorm would see each image twice
    for training in (False, True):
        for size in ((3, 9, 8), (1, 11, 12), (2, 13, 5)):
            for m in (independent, model):
                m.train(training)
            without_warning(assert_same, independent, model, image(v.channels, *size))
    for (name, a), b in zip(
        model.state_dict().items(), independent.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_and_back(variant):
    v = VARIANTS[variant]
    model = model_of(v.make).eval()
    fused = fuse(model)
    plain = without_warning(unfuse, fused)
    again = without_warning(fuse, plain)
    x = image(v.channels, 2, 9, 8)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert type(plain[1]) is not type(fused[1]) and type(again[1]) is type(fused[1])
    assert vars(again[1]).keys() == vars(fused[1]).keys()
    for other in (plain, again):
        without_warning(assert_same, other, model, x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_operator_computes_it(variant):
    """The convolutions too, or the attention step alone, as the report says."""
    v = VARIANTS[variant]
    fused = fuse(model_of(v.make))
    with torch.profiler.profile() as profile:
        fused(image(v.channels, 1, 6, 6))
    names = {event.key for event in profile.key_averages()}
    in_part = "the convolutions are called" in fused.fuse_report.replaced["1"]
    assert in_part or not v.in_part
    assert "aten::softmax" not in names and "aten::sigmoid" not in names
    called = in_part or v.kind == "FusedSplitPSA"
    assert ("epsa_fused::psa_forward" in names) != called
    assert "epsa_fused::psa_attention" in names or not called
    assert in_part == (why_not_fused(fused[1]) is not None)


# ---- what is not fused ----


WIDER = {
    **{"plain_lists": 64, "block": 32, "norms_beside": 32, "weights_halved": 32},
    **{"parameters_in_a_list": 32, "bottleneck": 128},
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_a_near_miss_is_named_and_stays_as_it_is(miss):
    make, why = NEAR_MISSES[miss]
    model = model_of(make)
    kept, before = type(model[1]), description(model)
    channels = WIDER.get(miss, 16)
    x = image(channels, 2, 7, 6).to(
        torch.float32 if miss.startswith("plain_list") else torch.float64
    )
    copied = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = copied(x)
    with pytest.warns(UserWarning, match=rf"left alone 1 .*1 \(.*{why}"):
        left = fuse(model)
    assert list(left.fuse_report.left) == ["1"] and not left.fuse_report.replaced
    assert type(left[1]) is kept
    assert description(model) == before
    torch.manual_seed(1)
    assert torch.equal(left(x), expected)


@pytest.mark.parametrize("other", BLOCKS)
def test_blocks_of_other_kinds_are_passed_over(other):
    model = model_of(BLOCKS[other])
    before = description(model)
    with pytest.warns(UserWarning, match=r"nothing to fuse") as warned:
        left = fuse(model)
    assert len(warned) == 1 and not left.fuse_report.left
    assert type(left[1]) is type(model[1]) and description(model) == before


@pytest.mark.parametrize("odd", ODD_CALLS)
def test_odd_calls_give_a_report_that_is_true(odd):
    make, named = ODD_CALLS[odd]
    model = model_of(make)
    with pytest.warns(UserWarning, match=r"nothing to fuse"):
        left = fuse(model)
    assert not left.fuse_report.replaced and list(left.fuse_report.left) == ["1"] * named
    assert "not given the mean" not in str(left.fuse_report)


def test_an_se_network_of_a_known_class_that_is_not_called():
    with pytest.warns(UserWarning, match=r"does not call the layers of its SE networks"):
        fuse(nn.Sequential(published_psa(ReadsSE)))


def test_lists_and_dicts_of_any_names_are_looked_into():
    """A call that shows nothing is no error."""
    module = PlainList()
    module.branches = dict(zip(("keys", 0, "a.b", None), module.branches, strict=True))
    with pytest.warns(UserWarning, match=r"nothing to fuse"):
        assert not fuse(nn.Sequential(module)).fuse_report.left


def test_a_list_that_holds_itself_is_no_error():
    module = Shared()
    module.history = []
    module.history.append(module.history)
    assert list(fuse(nn.Sequential(module)).fuse_report.replaced) == ["0"]


def test_what_cannot_be_fused_is_called_once_for_each_kind(monkeypatch):
    calls = []
    monkeypatch.setattr(AndNorms, "forward", lambda self, x: calls.append(x.shape))
    counts = []
    for count in (1, 3):
        calls.clear()
        with pytest.warns(UserWarning, match="nothing to fuse"):
            fuse(nn.Sequential(*(AndNorms() for _ in range(count))))
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_it_fuses_as_its_reason_says():
    """The reason of the plain lists and that of the BatchNorms beside the convolutions."""
    lists = NEAR_MISSES["plain_lists"][0]()
    lists.convs, lists.se_blocks = nn.ModuleList(lists.convs), nn.ModuleList(lists.se_blocks)
    fused = without_warning(fuse, nn.Sequential(lists, Shared(with_norm())))
    assert list(fused.fuse_report.replaced) == ["0", "1"]


def test_a_folded_norm_fuses_as_a_whole():
    norms = with_norm()
    model = nn.Sequential(Shared(norms)).double().eval()
    x = image(16, 2, 6, 5)
    expected = model(x)
    for i, (conv, norm) in enumerate(norms):
        model[0].conv_branches[i] = fuse_conv_bn_eval(conv, norm)
    fused = without_warning(fuse, model)
    assert relative_error(fused(x), expected) <= LIMIT
    assert fused[0]._has_convs_as_branches()


OWN_BRANCHES = {
    "in_place": in_place_first,
    "called_from_the_last": lambda: with_norm(),
    "pools_and_dropouts": pooling,
    "constants": lambda: [WithConstant(conv) for conv in convolutions()],
    "compiled": lambda: [torch.compile(conv, backend="eager") for conv in convolutions()],
    "pruned": lambda: [prune.l1_unstructured(c, "weight", 0.5) for c in convolutions()],
}


@pytest.mark.parametrize("kind", OWN_BRANCHES)
def test_a_trial_runs_the_modules_own_branches(kind):
    """They may be in place, in any order, refuse small maps, hold constants and draw numbers."""
    cls = LastBranchFirst if kind == "called_from_the_last" else Shared
    model = nn.Sequential(nn.Identity(), cls(OWN_BRANCHES[kind]()))
    fused = without_warning(fuse, model, inplace=True)
    assert list(fused.fuse_report.replaced) == ["1"] and not fused.fuse_report.left


# ---- the adopted module ----


def adopted(make=Shared, **options):
    module = fuse(model_of(make, **options))[1]
    assert type(module) is FusedAdoptedPSA
    return module


@pytest.mark.parametrize("make", (Shared, Own, Parts, lambda: Shared(with_norm())))
def test_the_attention_of_an_adopted_module(make):
    module = adopted(make).eval()
    x = image(64 if make is Parts else 16, 2, 6, 5)
    expected, attention = module(x, return_attention=True)
    assert torch.equal(module(x), expected) and attention.shape == (2, 4, 16)
    assert relative_error(attention.sum(1), torch.ones(2, 16)) <= LIMIT
    plain, other = unfuse(module)(x, return_attention=True)
    assert relative_error(plain, expected) <= LIMIT and relative_error(other, attention) <= LIMIT
    model = nn.Sequential(module)
    with record_attention(model) as scales:
        assert torch.equal(model(x), expected)
    assert torch.equal(scales["0"][0], attention)


CHANGES = {
    "hook_on_the_se": (Shared, lambda m: m.se_block.register_forward_hook(lambda m, x, y: 2 * y),
        r"se_block has hooks"),
    "hook_on_a_relu": (Shared, lambda m: m.se_block[2].register_forward_hook(lambda m, x, y: 2 * y),
        r"se_block\.2 has hooks"),
    "another_activation": (lambda: Shared(se=Gate()),
        lambda m: m.se_block.excite.__setitem__(1, nn.GELU()), r"excite\.1 is a GELU"),
    "another_layer": (Shared, lambda m: m.se_block.append(nn.Tanh()),
        r"se_block has other children"),
    "wrapped_linear": (lambda: Shared(se=Gate()),
        lambda m: m.se_block.excite.__setitem__(0, Doubled(m.se_block.excite[0])),
        r"excite\.0 is a Doubled"),
    "hook_on_a_convolution": (Shared,
        lambda m: m.conv_branches[1].register_forward_hook(lambda m, x, y: 2 * y),
        r"conv_branches\.1 has hooks"),
    "wrapped_convolution": (Shared,
        lambda m: m.conv_branches.__setitem__(1, Doubled(m.conv_branches[1])),
        r"conv_branches\.1 is a Doubled"),
    "hook_on_a_sequential": (lambda: Shared(with_norm()),
        lambda m: m.conv_branches[1].register_forward_hook(lambda m, x, y: 2 * y),
        r"conv_branches\.0 is a Sequential"),
}  # fmt: skip


class Doubled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:FusedAdoptedPSA calls layers")
def test_a_later_change_has_its_effect(change):
    """The layers are called then, as those of the module that it was."""
    make, act, why = CHANGES[change]
    module, theirs = adopted(make).eval(), model_of(make)[1].eval()
    x = image(16, 2, 6, 5)
    unchanged = theirs(x)
    for m in (theirs, module):
        act(m)
    with torch.no_grad():
        assert relative_error(module(x), theirs(x)) <= LIMIT
        assert relative_error(module(x), unchanged) > 1e-3
    assert re.search(why, why_not_fused(module))


def test_an_adopted_module_is_served():
    """Packed weights, and the BatchNorm and ReLU behind it in the operator."""
    model = nn.Sequential(Shared(), nn.BatchNorm2d(64), nn.ReLU()).eval()
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        expected = model(x)
        fused = fuse(model)
        prepack(fused, x, frozen=True)
        assert "prepacked" in repr(fused)
        assert relative_error(fused(x), expected) < 1e-5
        served = optimize_for_inference(model, x, compile=False)
        assert served.report.folded == ["1"] and served.report.packed == 1
        assert relative_error(served(x), expected) < 1e-5


def test_a_module_whose_children_have_names_of_methods_is_packed_compiled_and_exported():
    module = adopted(lambda: Named("prepack", "unpack")).float().eval()
    model, x = nn.Sequential(module).eval(), torch.randn(2, 16, 8, 8)
    assert module.prepack is module._modules["prepack"]
    with torch.no_grad():
        expected = model(x)
        prepack(model, x, frozen=True)
        assert "prepacked" in repr(model)
        assert relative_error(model(x), expected) < 1e-6
        assert "prepacked" not in repr(model.train())
        model.eval()
        for make in (Named, lambda: Named("attention", "branches")):
            module = adopted(make).float().eval()
            expected = module(x)
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x), expected)
            assert torch.equal(torch.export.export(module, (x,)).module()(x), expected)
            with record_attention(module) as scales:
                assert torch.equal(module(x), expected)
            assert len(scales[""]) == 1


@pytest.mark.parametrize("make", (Shared, lambda: Named("attention", "branches")))
@pytest.mark.filterwarnings("ignore:FusedAdoptedPSA calls layers")
def test_a_module_that_calls_its_layers_compiles_and_exports(make):
    """The plain module, and the fused one with a hook on a layer of the SE."""
    called = adopted(make).float().eval()
    plain = unfuse(called)
    se = existing(called, called._layers.networks[0].fc1)
    se.register_forward_hook(lambda module, args, result: result * 2)
    x = torch.randn(2, 16, 6, 6)
    assert type(plain) is AdoptedPSA and "has hooks" in why_not_fused(called)
    for module in (plain, called):
        with torch.no_grad():
            expected = module(x)
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x), expected)
            assert torch.equal(torch.export.export(module, (x,), strict=True).module()(x), expected)


class Zeros:
    """An attention of one's own."""

    def attention(self, feats, return_attention=False):
        return torch.cat([0 * feat for feat in feats], 1)


class FromMixin(Zeros, FusedAdoptedPSA):
    pass


class Changed(FusedAdoptedPSA):
    pass


Changed.attention = Zeros.attention  # as a patch does, after the class was made


@pytest.mark.parametrize("kind", (FromMixin, Changed), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("make", (Shared, lambda: Named("branches", "attention")))
@pytest.mark.filterwarnings("ignore:FromMixin calls layers", "ignore:Changed calls layers")
def test_an_attention_of_a_subclass_is_called(kind, make):
    module = adopted(make).float().eval()
    module.__class__ = kind
    x = torch.randn(2, 16, 6, 6)
    assert why_not_fused(module) == "it has an attention of its own"
    assert not module(x).any()
    assert not torch.compile(module, fullgraph=True, backend="aot_eager")(x).any()


def test_modules_that_cannot_be_packed_are_passed_over():
    model = fuse(nn.Sequential(Shared(with_norm()), nn.Conv2d(64, 16, 1), published_psa())).eval()
    x = torch.randn(1, 16, 8, 8)
    prepack(model, x)
    assert "prepacked" not in repr(model[0]) and "prepacked" in repr(model[2])
    served = optimize_for_inference(model, x, compile=False)
    assert served.report.notes == ["1 PSA modules are fused in part: their branches are called"]
    with pytest.raises(
        ValueError, match=r"Sequential with 1 fused in part: .*no .* weights to pac"
    ):
        prepack(model[:1].eval(), x)


def test_an_adopted_module_compiles_exports_and_is_pickled():
    module = adopted().float().eval()
    x = torch.randn(2, 16, 6, 6)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    exported = torch.export.export(module, (x,))
    assert torch.equal(exported.module()(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected)
    assert torch.equal(copy.deepcopy(module)(x), expected)


def test_save_output_of_an_adopted_module():
    module = adopted()
    x = image(16, 2, 6, 5)
    expected = module(x)
    module.save_output = True
    assert relative_error(module(x), expected) <= LIMIT
    module = adopted(lambda: Shared(with_norm()))
    module.save_output = True
    with pytest.raises(NotImplementedError, match=r"conv_branches\.0 is a Sequential"):
        module(x)


def test_hooks_of_an_adopted_module():
    """Those of branches, and of what they hold, stay; those of what is not called are an error."""
    model = nn.Sequential(Shared(with_norm()))
    calls = []
    for layer in (model[0], model[0].conv_branches[0], model[0].conv_branches[1][1]):
        layer.register_forward_hook(lambda m, x, y: calls.append(type(m)))
    fused = fuse(model)
    fused(torch.randn(2, 16, 6, 6))
    assert calls == [nn.Sequential, nn.BatchNorm2d, FusedAdoptedPSA]
    model[0].se_block[3].register_forward_hook(print)
    with pytest.raises(RuntimeError, match=r"fuse: 0\.se_block\.3 has hooks, .*remove them first"):
        fuse(model)
    assert type(model[0]) is Shared


# ---- modules at several places ----


def test_what_is_shared_stays_shared():
    """One module at two places, and one SE network in two modules and beside them."""
    first, second = Shared(), Shared()
    second.se_block = first.se_block
    model = nn.ModuleDict(
        {"a": first, "b": nn.Sequential(first), "c": second, "se": first.se_block}
    )
    fused = without_warning(fuse, model)
    assert list(fused.fuse_report.replaced) == ["a", "b.0", "c"]
    assert fused["a"] is fused["b"][0] and fused["a"].se_block is fused["c"].se_block
    assert fused["se"] is fused["a"].se_block
    assert list(fused.state_dict()) == list(model.state_dict())
    assert len(list(fused.parameters())) == len(list(model.parameters()))


def test_one_network_by_several_names():
    se = squeeze()
    module = Own()
    module.ses = nn.ModuleList([se] * 4)
    model = nn.Sequential(nn.Identity(), module).double()
    fused = without_warning(fuse, model)
    assert len(fused[1]._layers.networks) == 1
    assert list(fused.state_dict()) == list(model.state_dict())
    assert_same(fused, model, image(16, 2, 7, 6))


def test_a_sibling_keeps_its_reference():
    """A module that another one holds outside of PyTorch's tree keeps its layers and weights."""
    model = nn.Sequential(Shared()).double()
    held = [model[0]]
    fused = fuse(model, inplace=True)
    x = image(16, 1, 6, 6)
    assert relative_error(fused(x), held[0](x)) <= LIMIT
    with torch.no_grad():
        held[0].conv_branches[0].weight.mul_(2)
    assert relative_error(fused(x), held[0](x)) <= LIMIT


# ---- what a trial must not mix up ----


class Scaled(nn.Module):
    """Its repr hides what it does."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * self.scale


class WithHelper(Shared):
    def __init__(self, scale):
        super().__init__()
        self.helpers = (Scaled(scale).forward,)

    def forward(self, x):
        return self.helpers[0](super().forward(x))


WITH_FACTOR = {
    "helper": WithHelper,
    "attribute": lambda factor: LooksAtAttributes(with_norm(), factor),
    "buffer": LooksAtBuffers,
    "name": LooksAtNames,
}


@pytest.mark.parametrize("kind", WITH_FACTOR)
def test_modules_that_differ_in_hidden_objects_have_trials_of_their_own(kind):
    make = WITH_FACTOR[kind]
    fused = fuse(nn.ModuleList([make(1), make(2)]))
    assert list(fused.fuse_report.replaced) == ["0"] and list(fused.fuse_report.left) == ["1"]


def test_the_modules_own_dtype_is_tried():
    model = nn.Sequential(LooksAtDtypes()).bfloat16()
    model[0].dtype = torch.bfloat16
    with pytest.warns(UserWarning, match=r"something else than PSA .* of torch\.bfloat16"):
        fuse(model)


def test_hooks_on_all_modules_see_no_trial():
    registered = nn.modules.module
    calls = []
    handles = [
        registered.register_module_forward_pre_hook(lambda *args: calls.append("pre")),
        registered.register_module_forward_hook(lambda *args: calls.append("post")),
        registered.register_module_full_backward_hook(lambda *args: calls.append("backward")),
    ]
    try:
        fused = fuse(nn.Sequential(Shared()))
        assert list(fused.fuse_report.replaced) == ["0"] and not calls
        nn.Identity()(torch.ones(1, requires_grad=True) * 1).backward()
        assert calls == ["pre", "post", "backward"]
    finally:
        for handle in handles:
            handle.remove()
    nn.Identity()(torch.ones(1))
    assert len(calls) == 3


class Filling(Shared):
    """It makes its output before it has the values."""

    def forward(self, x):
        out = torch.empty(len(x), 64, *x.shape[2:], dtype=x.dtype)
        return out.copy_(super().forward(x))


@pytest.mark.parametrize("setting", (torch.inference_mode, lambda: torch.device("meta")))
def test_the_callers_settings_do_not_matter(setting):
    model = nn.Sequential(Filling(with_norm()))
    with setting():
        fused = without_warning(fuse, model)
    assert list(fused.fuse_report.replaced) == ["0"]


class Alone(Shared):
    """It draws random numbers if another one runs at the same time."""

    running = 0

    def forward(self, x):
        Alone.running += 1
        time.sleep(0.001)
        noise = torch.rand(1) if Alone.running > 1 else 0
        Alone.running -= 1
        return super().forward(x) + noise


def test_threads_fuse_one_after_the_other():
    models = [nn.Sequential(Alone()) for _ in range(3)]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(3) as pool:
        fused = list(pool.map(fuse, models))
    assert [list(f.fuse_report.replaced) for f in fused] == [["0"]] * 3
    assert torch.equal(torch.get_rng_state(), before)


def test_the_callers_precision_is_not_that_of_a_trial():
    """Processors with instructions for bfloat16 round to it."""
    matmul, conv = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
    matmul.fp32_precision = conv.fp32_precision = "bf16"
    try:
        fused = fuse(nn.Sequential(published.PSAModule(64, 64)))
        assert list(fused.fuse_report.replaced) == ["0"]
        assert matmul.fp32_precision == conv.fp32_precision == "bf16"
        assert torch.backends.mkldnn.enabled
    finally:
        matmul.fp32_precision = conv.fp32_precision = "none"


def test_the_users_random_numbers_go_on():
    model = nn.Sequential(NEAR_MISSES["random_of_python"][0]())
    random.seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with pytest.warns(UserWarning, match="draws random numbers"):
        fuse(model)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


class SEFirst(published.PSAModule):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        se = self._modules.pop("se")
        self._modules = {"se": se, **self._modules}


def test_the_order_of_the_parameters_stays():
    """The state of an optimizer goes by it."""
    plain = nn.Sequential(published_psa(SEFirst))
    fused = fuse(plain)
    assert list(fused.fuse_report.replaced) == ["0"]
    assert [*fused.state_dict()] == [*plain.state_dict()]
    assert [*map(id, fused.parameters())] == [*map(id, plain.parameters())]


WIDE = {
    "reflected": lambda: [convolution(3, dilation=d, padding_mode="reflect") for d in (1, 2, 4, 6)],
    "without_padding": lambda: [convolution(9, g, padding=0) for g in (1, 2)],
}


@pytest.mark.parametrize("kind", WIDE)
def test_the_trials_images_hold_the_kernels(kind):
    model = nn.Sequential(Shared(WIDE[kind]()))
    fused, x = fuse(model), torch.randn(2, 16, 15, 14)
    assert list(fused.fuse_report.replaced) == ["0"]
    assert_near(fused(x), model(x), limit=1e-5)


REPLACED = {
    "no_fc1_bias": lambda ses: ses[0].__setitem__(1, nn.Conv2d(16, 4, 1, bias=False)),
    "no_fc2_bias": lambda ses: ses[0].__setitem__(3, nn.Conv2d(4, 16, 1, bias=False)),
    "a_later_one": lambda ses: ses[1].__setitem__(1, nn.Conv2d(16, 4, 1, bias=False)),
    "groups": lambda ses: ses[2].__setitem__(1, nn.Conv2d(16, 4, 1, groups=4)),
    "kernel": lambda ses: ses[2].__setitem__(3, nn.Conv2d(4, 16, 3, padding=1)),
    "activation": lambda ses: ses[3].__setitem__(2, nn.LeakyReLU(0.5)),
}


@pytest.mark.parametrize("change", REPLACED)
@pytest.mark.filterwarnings("ignore:FusedAdoptedPSA calls layers")
def test_an_se_layer_that_is_replaced_after_fusing_is_called(change):
    fused = fuse(nn.Sequential(with_ses(*(squeeze() for _ in range(4)))))[0].double()
    REPLACED[change](fused.ses)
    fused = fused.double()
    assert "ses." in why_not_fused(fused)
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    assert_near(fused(x), unfuse(nn.Sequential(fused))(x))
