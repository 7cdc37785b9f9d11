"""return_attention of the modules, and record_attention of a model."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.modules import CASES, build, image
from support.tolerance import assert_near
from torch import nn

import epsa_fused
from epsa_fused import FusedPSAModule, FusedSplitPSA, PSAModule, SplitPSA, record_attention

ROUNDING = 1e-5  # between two formulations in float32


def exact(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and attention in float64, by the layers."""
    kind = PSAModule if isinstance(module, PSAModule) else SplitPSA
    plain = copy.deepcopy(module).double()
    return kind.forward(plain, x.double(), True)


def split(kind):
    torch.manual_seed(0)
    convs = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)]
    blocks = [
        nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Conv2d(2, 8, 1), nn.Sigmoid()
        )
        for _ in range(3)
    ]
    return kind(convs, blocks)


# ---- return_attention ----


@pytest.mark.parametrize("kind", (PSAModule, FusedPSAModule))
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("order", ("reversed", "forward"))
def test_of_a_module(name, kind, grad, order):
    module, x = build(name, kind, branch_order=order), image(name)
    with torch.set_grad_enabled(grad):
        out, attention = module(x, return_attention=True)
        plain = module(x)
    _, expected = exact(module, x)
    assert torch.equal(out, plain) and out.stride() == plain.stride()
    assert attention.shape == (len(x), module.branches, module.split_channel)
    assert attention.dtype == torch.float32 and attention.requires_grad == grad
    assert_near(attention.detach(), expected.detach(), ROUNDING)
    torch.testing.assert_close(attention.sum(1), torch.ones_like(attention[:, 0]))
    # the slot of a branch tells that the attention is by branch
    products = [c(x) * a[..., None, None] for c, a in zip(
        [getattr(module, f"conv_{i + 1}") for i in range(module.branches)],
        attention.unbind(1), strict=True)]  # fmt: skip
    slots = products[::-1] if order == "reversed" else products
    assert_near(out.detach(), torch.cat(slots, 1).detach(), 1e-4)


@pytest.mark.parametrize("kind", (SplitPSA, FusedSplitPSA))
def test_of_a_split_module(kind):
    module, x = split(kind), torch.randn(2, 24, 5, 6)
    out, attention = module(x, return_attention=True)
    _, expected = exact(module, x)
    assert torch.equal(out, module(x)) and attention.shape == (2, 3, 8)
    assert_near(attention.detach(), expected.detach(), ROUNDING)


@pytest.mark.parametrize("kind", (PSAModule, FusedPSAModule))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_its_dtype(kind, dtype):
    module, x = build("stage3", kind, dtype), image("stage3", dtype)
    _, attention = module(x, return_attention=True)
    assert attention.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# the sums of float32 cancel by some digits here
@pytest.mark.parametrize(("dtype", "limit"), ((torch.float32, 5e-3), (torch.float64, 1e-11)))
@pytest.mark.parametrize("name", ("stage3", "stride_2"))
def test_gradients_of_both(name, dtype, limit):
    gradients = []
    for kind, of in ((FusedPSAModule, dtype), (PSAModule, torch.float64)):
        module, x = build(name, kind, of), image(name, of).requires_grad_()
        out, attention = module(x, return_attention=True)
        weights = torch.linspace(-1, 1, attention.numel(), dtype=of).view_as(attention)
        loss = (out * out).sum() + (attention * weights).sum()
        gradients.append(torch.autograd.grad(loss, (x, *module.parameters())))
    for mine, right in zip(*gradients, strict=True):
        assert_near(mine, right, limit)


def test_where_layers_are_called():
    module, x = build("stage3"), image("stage3")
    expected = module(x, return_attention=True)
    calls = []
    module.se.fc1.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="se.fc1 has hooks"):
        out = module(x, return_attention=True)
    assert calls
    for mine, right in zip(out, expected, strict=True):
        assert_near(mine.detach(), right.detach(), ROUNDING)


def test_prepacked_and_autocast():
    module, x = build("stage3").eval(), image("stage3")
    module.prepack(*x.shape[2:], frozen=True)
    with torch.no_grad():
        out, attention = module(x, return_attention=True)
        assert_near(out, module(x), ROUNDING)
        with torch.autocast("cpu", torch.bfloat16):
            low, low_attention = module(x, return_attention=True)
            assert torch.equal(low, module(x)) and low.dtype == torch.bfloat16
    assert low_attention.dtype == torch.float32
    assert_near(low_attention, attention, 1e-2)


def test_compiled_and_traced():
    module, x = build("stage3"), image("stage3")
    expected = module(x, return_attention=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.psa = module

        def forward(self, x):
            out, attention = self.psa(x, return_attention=True)
            return out, attention

    traced = torch.fx.symbolic_trace(Outer())
    assert [n.op for n in traced.graph.nodes].count("call_module") == 1
    exported = torch.export.export(Outer(), (x,)).module()
    for results in (compiled(x, return_attention=True), traced(x), exported(x)):
        for mine, right in zip(results, expected, strict=True):
            assert_near(mine.detach(), right.detach(), ROUNDING)


@pytest.mark.parametrize("make", (
    lambda: build("stage3"), lambda: build("stage3", PSAModule), lambda: split(FusedSplitPSA)
))  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_a_graph_of_the_module_itself_has_the_output_alone(make):
    module = make().requires_grad_(False)
    x = torch.randn(1, 24, 5, 5) if isinstance(module, SplitPSA) else image("stage3")
    graph = torch.fx.symbolic_trace(module)
    assert_near(graph(x), module(x), ROUNDING)
    with pytest.raises(AssertionError, match="this graph has no attention"):
        graph(x, return_attention=True)


@pytest.mark.parametrize("kind", (PSAModule, FusedPSAModule))
def test_a_graph_of_a_parent_that_asks(kind):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.psa = build("stage3", kind, torch.bfloat16).requires_grad_(False)

        def forward(self, x):
            return self.psa(x, return_attention=True)

    model, x = Outer(), image("stage3", torch.bfloat16)
    for mine, right in zip(torch.fx.symbolic_trace(model)(x), model(x), strict=True):
        assert torch.equal(mine, right) and mine.dtype == right.dtype


@pytest.mark.parametrize("make", (lambda: build("stage3", PSAModule), lambda: build("stage3")))
def test_a_flag_that_is_none(make):
    with pytest.raises(TypeError, match="return_attention: expected a bool, got 1"):
        make()(image("stage3"), 1)


def test_beside_save_output():
    module, x = build("stage3", save_output=True), image("stage3")
    with pytest.raises(NotImplementedError, match="return_attention asks for the gradient"):
        module(x, return_attention=True)
    with torch.no_grad():
        out, _ = module(x, return_attention=True)
        assert torch.equal(out, module(x))
    expected = module(x)
    with record_attention(module) as record:  # needs no gradient of the attention
        out = module(x)
    assert torch.equal(out, expected) and out.grad_fn.name() == expected.grad_fn.name()
    assert_near(record[""][0], exact(module, x)[1].detach(), ROUNDING)


class Doubled(FusedPSAModule):
    def attention(self, feats):
        return 2 * super().attention(feats)


@pytest.mark.filterwarnings("ignore")
def test_an_attention_of_a_subclass():
    module, x = Doubled(64, 64), torch.randn(1, 64, 5, 5)
    assert_near(module(x).detach(), 2 * FusedPSAModule.forward(
        _as(module, FusedPSAModule), x).detach(), ROUNDING)  # fmt: skip
    with pytest.raises(TypeError, match="unexpected keyword argument 'return_attention'"):
        module(x, return_attention=True)


def _as(module, kind):
    same = copy.copy(module)
    same.__class__ = kind
    return same


# ---- record_attention ----


class Net(nn.Module):
    def __init__(self, kind=FusedPSAModule) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 64, 3)
        self.first = kind(64, 64)
        of_parts = SplitPSA if kind is PSAModule else FusedSplitPSA
        self.second = nn.Sequential(kind(64, 64), split(of_parts))

    def forward(self, x):
        x = self.first(self.stem(x))
        x = self.first(x)
        return self.second[1](self.second[0](x)[:, :24])


def images(n=2):
    return torch.randn(n, 3, 12, 11, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", (PSAModule, FusedPSAModule))
@pytest.mark.parametrize("grad", (False, True))
def test_every_call_of_every_module(kind, grad):
    model = Net(kind)
    with torch.set_grad_enabled(grad):
        expected = model(images())
        with record_attention(model) as record:
            out = model(images())
            model(images(3))
    assert torch.equal(out, expected) and out.requires_grad == grad
    assert list(record) == ["first", "second.0", "second.1"]
    shapes = {name: [tuple(a.shape) for a in calls] for name, calls in record.items()}
    assert shapes["first"] == [(2, 4, 16)] * 2 + [(3, 4, 16)] * 2
    assert shapes["second.1"] == [(2, 3, 8), (3, 3, 8)]
    maps = model.stem(images())
    assert_near(record["first"][0], exact(model.first, maps)[1].detach(), ROUNDING)
    assert not any(a.requires_grad for calls in record.values() for a in calls)
    # nothing stays behind
    before = copy.deepcopy(record)
    assert torch.equal(model(images()), expected)
    assert all(map(torch.equal, record["first"], before["first"]))
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks


def test_fused_modules_stay_fused(recwarn):
    model = Net()
    with torch.no_grad(), torch.profiler.profile() as profiler, record_attention(model):
        model(images())
    names = {event.key for event in profiler.key_averages()}
    assert "epsa_fused::psa_save_output" in names and not recwarn.list


def test_chosen_names_and_the_model_itself():
    model = Net()
    with record_attention(model, ["second.0"]) as record:
        model(images())
    assert list(record) == ["second.0"] and len(record["second.0"]) == 1
    with record_attention(model.first) as record:
        model.first(torch.randn(1, 64, 4, 4))
    assert list(record) == [""]


def test_contexts_in_each_other_and_hooks_of_the_user():
    model, seen = Net(), []
    model.first.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    model.first.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with record_attention(model) as outer, record_attention(model, ["first"]) as inner:
        model(images())
        out, attention = model.second[0](torch.randn(1, 64, 4, 4), True)
    assert out.shape == (1, 64, 4, 4) and attention.shape == (1, 4, 16)
    assert [len(r["first"]) for r in (outer, inner)] == [2, 2] and len(outer["second.0"]) == 2
    assert all(map(torch.equal, outer["first"], inner["first"]))
    assert len(seen) == 4 and all(isinstance(shape, torch.Size) for shape in seen)


def test_from_several_threads():
    module, x = build("stage3").requires_grad_(False), image("stage3")

    def work(asked: bool) -> int:
        results = [module(x, return_attention=asked) for _ in range(100)]
        return sum(isinstance(r, tuple) for r in results)

    with record_attention(module) as record, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, (True, False, True, False))) == [100, 0, 100, 0]
    assert len(record[""]) == 400


def test_wrong_calls_stay_wrong():
    module, x = build("stage3"), image("stage3")
    with record_attention(module) as record:
        for call in (lambda: module(x, False, 3), lambda: module(x, "no"), lambda: module(x, 1)):
            with pytest.raises(TypeError):
                call()
        module(x)
    assert len(record[""]) == 1


def test_copies_and_pickles_record_nothing():
    model = Net()
    with record_attention(model) as record:
        model(images())
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in (copied, loaded):
            assert torch.equal(other(images()), model(images()))
    assert len(record["second.0"]) == 3
    for other in (copied, loaded):
        assert isinstance(other(images()), torch.Tensor)
        with record_attention(other) as again:
            other(images())
        assert len(again["second.0"]) == 1
    assert len(record["second.0"]) == 3


def test_lists_may_be_emptied_meanwhile(recwarn):
    model = Net()
    with record_attention(model) as record:
        model(images())
        record["first"].clear()
        record["second.0"].clear()
        record["second.1"].clear()
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore")
def test_transforms_and_exports_record_nothing():
    module, x = build("stage3").requires_grad_(False), image("stage3")
    with record_attention(module) as record:
        torch.func.vmap(module)(x[:, None])
        exported = torch.export.export(module, (x,))
        module(x)
    assert len(record[""]) == 1 and type(record[""][0]) is torch.Tensor
    assert_near(exported.module()(x), module(x), ROUNDING)


class OwnForward(FusedPSAModule):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(("kind", "method"), ((Doubled, "an attention"), (OwnForward, "a forward")))
def test_a_module_that_takes_no_such_argument_is_refused(kind, method):
    model = nn.Sequential(kind(64, 64))
    words = f"got '0', a {kind.__name__} with {method} of its own"
    with pytest.raises(ValueError, match=words), record_attention(model):
        pass
    assert not model[0]._forward_hooks


def test_after_an_error():
    model = Net()
    with record_attention(model) as record:
        with pytest.raises(ValueError):
            model.first(torch.randn(1, 3, 4, 4))
        model(images())
    assert len(record["first"]) == 2
    with pytest.raises(ZeroDivisionError), record_attention(model):
        _ = 1 / 0
    assert not model.first._forward_hooks


def test_a_compiled_model():
    model = Net().requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with record_attention(compiled) as record:
        out = compiled(images())
    assert torch.equal(out, model(images()))
    name = next(n for n in record if n.endswith("first"))
    assert len(record[name]) == 2
    assert_near(record[name][0], exact(model.first, model.stem(images()))[1], ROUNDING)


def test_nothing_was_called():
    with pytest.warns(UserWarning, match="no PSA module was called"), record_attention(Net()):
        pass


def test_what_is_refused():
    model = Net()
    for wrong, error, words in (
        ((nn.Linear(1, 1),), ValueError, r"expected PSA modules of epsa_fused, got none\. fuse"),
        ((model, ["third"]), ValueError, r"names: expected some of 'first', .*, got 'third'"),
        ((model, "first"), TypeError, r"names: expected several, got 'first'"),
        ((print,), TypeError, r"model: expected a torch.nn.Module"),
    ):
        with pytest.raises(error, match=words), record_attention(*wrong):
            pass


def test_of_an_epsanet():
    model = epsa_fused.epsanet50(10).eval()
    with torch.no_grad(), record_attention(model) as record:
        model(torch.randn(1, 3, 64, 64))
    assert len(record) == 16 and all(len(calls) == 1 for calls in record.values())
