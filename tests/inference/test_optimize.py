"""optimize_for_inference(): what it does, what it says, what it refuses; without a compiler."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from support import published
from support.processes import run_code
from torch import nn

import epsa_fused
from epsa_fused import epsanet50, optimize_for_inference
from epsa_fused.inference import optimize, pointwise
from epsa_fused.inference.epilogue import PSAWithEpilogue

MODULES = 16  # PSA modules of EPSANet-50
DTYPES = (torch.float32, torch.bfloat16)


def images(batch: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def with_statistics(model: nn.Module) -> nn.Module:
    """BatchNorms start as the identity, which folding could leave out without notice."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(epsanet50())


class Net(nn.Module):
    """A foreign network around a PSA module of the published code."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.psa = published.PSAModule(channels, channels)
        self.norm = nn.BatchNorm2d(channels)
        self.last = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return (self.last(self.norm(self.psa(x)).relu()) + x).relu()


class Branching(Net):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def plain(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).to(dtype)(x.to(dtype)).double()


def assert_as_good_as_the_model(served, model, x, dtype):
    exact, usual = plain(model, x, torch.float64), plain(model, x, dtype)
    allowed = 3 * (usual - exact).abs().max() + 8 * torch.finfo(dtype).eps * exact.abs().max()
    out = served(x)
    assert out.dtype == next(model.parameters()).dtype
    assert not out.requires_grad
    assert (out.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epsanet(network, dtype):
    before = copy.deepcopy(network.state_dict())
    x = images()
    served = optimize_for_inference(network, x, dtype=dtype, compile=False)
    assert_as_good_as_the_model(served, network, x, dtype)
    report = served.report
    assert report.dtype == dtype and report.psa_modules == report.packed == MODULES
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert len(report.folded) == norms
    psa = [m for m in network.modules() if isinstance(m, epsa_fused.FusedPSAModule)]
    inside = {id(conv) for m in psa for conv in m.modules()}
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d) and id(m) not in inside]
    assert report.pointwise == len(convs)
    assert not report.compiled and not report.notes and not report.fuse.left
    assert f"{MODULES} fused PSA modules" in str(report) == repr(served)
    # the blocks' sums and ReLUs are part of a convolution's call
    nodes = list(served.module.graph.nodes)
    modules = [served.module.get_submodule(n.target) for n in nodes if n.op == "call_module"]
    assert not any(isinstance(m, (nn.ReLU, nn.BatchNorm2d, nn.Conv2d)) for m in modules)
    assert not [n for n in nodes if n.op == "call_function" and "add" in str(n.target)]
    # the model given is as before, and further calls do not depend on it
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(m._packed is not None for m in psa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_batches_and_sizes(network, dtype):
    served = optimize_for_inference(network, images(), dtype=dtype, compile=False)
    for batch, size in ((1, 64), (5, 64), (2, 96), (1, 33)):
        assert_as_good_as_the_model(served, network, images(batch, size), dtype)


def test_a_foreign_model():
    torch.manual_seed(0)
    model = with_statistics(Net())
    served = optimize_for_inference(model, images(), compile=False)
    assert_as_good_as_the_model(served, model, images(3, 20), torch.float32)
    report = served.report
    assert report.fuse.replaced.keys() == {"psa"}
    assert report.folded == ["stem.1", "norm"] and report.pointwise == 2 and report.packed == 1
    assert isinstance(model.psa, published.PSAModule)


def test_a_model_that_cannot_be_traced_is_served_layer_by_layer():
    torch.manual_seed(0)
    model = with_statistics(Branching())
    served = optimize_for_inference(model, images(), compile=False)
    assert_as_good_as_the_model(served, model, images(3, 20), torch.float32)
    assert served.report.packed == 1 and served.report.folded == [] and served.report.pointwise == 0
    assert any("torch.fx cannot trace" in note for note in served.report.notes)


def test_a_model_that_needs_contiguous_maps():
    class Flat(Net):
        def forward(self, x):
            return super().forward(x).view(x.shape[0], -1)

    torch.manual_seed(0)
    model = with_statistics(Flat())
    served = optimize_for_inference(model, images(), compile=False)
    assert_as_good_as_the_model(served, model, images(3, 20), torch.float32)
    first, second = served.report.notes
    assert first.startswith("images stay contiguous: in channels_last the model fails (view size")
    assert second.startswith("convolutions are called one by one")


def test_a_model_without_psa_modules():
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    served = optimize_for_inference(model, images(), compile=False)
    assert_as_good_as_the_model(served, model, images(), torch.float32)
    assert served.report.notes == ["no PSA module was found"]
    assert served.report.folded == ["1"] and served.report.pointwise == 1


def test_later_changes_of_the_weights_have_no_effect():
    torch.manual_seed(0)
    model = with_statistics(Net())
    served = optimize_for_inference(model, images(), compile=False)
    expected = served(images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(served(images()), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_of_bfloat16_gives_bfloat16(dtype):
    torch.manual_seed(0)
    model = with_statistics(Net()).bfloat16()
    served = optimize_for_inference(model, images(), dtype=dtype, compile=False)
    assert served.report.dtype == dtype
    assert served(images()).dtype == torch.bfloat16


# ---- passes ----


class Chain(nn.Module):
    """Convolutions whose sums and ReLUs may not be taken into their calls."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.narrow = nn.Conv2d(8, 1, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.a(x)
        if self.kind == "used twice":
            return y.relu() + y
        if self.kind == "normalised, used twice":
            return self.norm(y) * y
        if self.kind == "broadcast":
            return self.b(y) + self.narrow(y)
        if self.kind == "scaled":
            return torch.add(self.b(y), y, alpha=2)
        if self.kind == "to itself":
            return y + y
        if self.kind == "number":
            return (y + 1).relu()
        if self.kind == "changed between":
            z = x * 1
            y = self.a(z)
            z.relu_()
            return y + z
        if self.kind == "into the other":
            z = x * 1
            z += self.a(x)
            return z.relu()
        if self.kind == "into a tensor that others read":
            z = x * 1
            w = z[:1]
            z += self.a(x)
            return torch.cat([w, z.relu()])
        assert self.kind == "both convolutions"
        return (self.a(x) + self.b(x)).relu()


KINDS = (
    "used twice", "normalised, used twice", "broadcast", "scaled", "to itself", "number",
    "changed between", "into the other", "into a tensor that others read", "both convolutions",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_chains_keep_their_meaning(kind):
    torch.manual_seed(0)
    model = with_statistics(Chain(kind))
    x = torch.randn(2, 8, 9, 9)
    served = optimize_for_inference(model, x, compile=False)
    with torch.no_grad():
        torch.testing.assert_close(served(x), model(x), rtol=1e-4, atol=1e-4)
    if kind == "into a tensor that others read":  # torch.fx makes another sum of it
        assert "computes something else" in str(served.report)
    else:
        assert served.report.pointwise > 0


def test_convolutions_of_other_kinds_are_left_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(4, 4, (1, 3), stride=(1, 2), padding=(0, 1)),
    ).eval()
    served = optimize_for_inference(model, images(), compile=False)
    assert served.report.pointwise == 2
    assert_as_good_as_the_model(served, model, images(), torch.float32)


def test_a_hooked_convolution_is_called():
    seen = []
    model = with_statistics(Net())
    model.last.register_forward_hook(lambda *_: seen.append(1))
    served = optimize_for_inference(model, images(), compile=False)
    seen.clear()
    served(images())
    assert served.report.pointwise == 1 and seen == [1]


def test_a_hooked_psa_module_is_called():
    seen = []
    torch.manual_seed(0)
    model = with_statistics(Net())
    model.psa = epsa_fused.fuse(model.psa)
    model.psa.register_forward_hook(lambda *_: seen.append(1))
    served = optimize_for_inference(model, images(), compile=False)
    assert served.report.psa_modules == served.report.packed == 1
    assert served.report.folded == ["stem.1"]
    seen.clear()
    assert_as_good_as_the_model(served, model, images(), torch.float32)
    assert seen.count(1) == 3  # once by each of the three models


class WithAttention(epsa_fused.FusedPSAModule):
    def attention(self, feats):
        return super().attention(feats) * 2


def test_an_attention_of_its_own_stays():
    torch.manual_seed(0)
    model = with_statistics(nn.Sequential(WithAttention(64, 64), nn.BatchNorm2d(64)))
    x = torch.randn(2, 64, 9, 9)
    with pytest.warns(UserWarning, match="attention of its own"):
        served = optimize_for_inference(model, x, compile=False)
    assert served.report.folded == []
    assert_as_good_as_the_model(served, model, x, torch.float32)


class Sum(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.other = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(2))

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "smaller":
            return (y + self.other(nn.functional.adaptive_avg_pool2d(x, 1))).relu()
        return (self.other(x[:1]) + y).relu()


@pytest.mark.parametrize("kind", ("smaller", "larger"))
def test_sums_may_broadcast_in_later_calls(kind):
    model = Sum(kind).eval()
    served = optimize_for_inference(model, torch.randn(1, 3, 1, 1), compile=False)
    for shape in ((1, 3, 1, 1), (1, 3, 5, 4), (4, 3, 5, 5)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(served(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_sum_in_place_into_a_view():
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            t = x * 2
            t[:, :4].add_(self.conv(x))
            return t

    model, x = View().eval(), torch.randn(2, 8, 5, 5)
    served = optimize_for_inference(model, x, compile=False)
    assert_as_good_as_the_model(served, model, x, torch.float32)


@pytest.mark.parametrize("parametrisation", ("weight_norm", "spectral_norm", "orthogonal"))
def test_a_parametrised_convolution_is_left_alone(parametrisation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    getattr(nn.utils.parametrizations, parametrisation)(model[0])
    served = optimize_for_inference(with_statistics(model), images(), compile=False)
    assert served.report.folded == [] and served.report.pointwise == 0
    assert_as_good_as_the_model(served, model, images(), torch.float32)


def test_weights_of_five_dimensions():
    model, x = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()).eval(), torch.randn(1, 3, 5, 5, 5)
    served = optimize_for_inference(model, x, compile=False)
    assert_as_good_as_the_model(served, model, x, torch.float32)


# ---- what a trace takes for granted, and what a check cannot tell ----


class Flag(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x, flip=False, keep=None):
        y = self.conv(x)
        y = y.flip(-1) if flip is True else y
        return y if keep is None else y[keep]


def test_a_call_of_another_kind_than_the_examples_is_refused():
    served = optimize_for_inference(with_statistics(Net()), images(), compile=False)
    assert served(images(3, 20)).shape == (3, 64, 20, 20)
    granted = r"expected the example's arguments \(floating-point tensor of 4 dimensions\), which"
    for args, kwargs in (
        ((), {}),
        ((images(), True), {}),
        ((), {"x": images()}),
        ((images(), torch.tensor([0])), {}),
        ((images()[0],), {}),
        (((images() * 255).to(torch.uint8),), {}),
        ((images().as_subclass(Subclass),), {}),
    ):
        with pytest.raises(ValueError, match=granted):
            served(*args, **kwargs)


def test_a_value_that_the_trace_would_lose_is_kept():
    """torch.fx traces `flip is True` as false, which the example tells; so nothing is traced."""
    model = Flag().eval()
    served = optimize_for_inference(model, images(), True, compile=False)
    assert "computes something else" in str(served.report)
    for arguments in ((images(), True), (images(),), (images(), True, torch.tensor([0]))):
        with torch.no_grad():
            torch.testing.assert_close(served(*arguments), model(*arguments), rtol=1e-5, atol=1e-5)


def test_random_outputs_are_refused():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return nn.functional.dropout(self.conv(x))

    with pytest.raises(ValueError, match="expected a model that gives the same outputs in each"):
        optimize_for_inference(Random().eval(), images(), compile=False)


class Returning(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "dict":
            return {"maps": y, "best": y.argmax(1), "pair": (y.mean(), y)}
        if self.kind == "masked":
            return y.masked_fill(torch.arange(4).view(1, 4, 1, 1) == 2, float("-inf"))
        if self.kind == "float":
            return self.conv(x.float() / 255)
        if self.kind == "nothing":
            return y.sum().item()
        return y.relu_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trees_of_outputs(dtype):
    served = optimize_for_inference(Returning("dict").eval(), images(), dtype=dtype, compile=False)
    out = served(images(3))
    assert out.keys() == {"maps", "best", "pair"} and out["best"].dtype == torch.int64
    assert out["maps"].dtype == out["pair"][0].dtype == torch.float32


def test_infinite_outputs_may_be_meant():
    served = optimize_for_inference(Returning("masked").eval(), images(), compile=False)
    assert served(images())[:, 2].isinf().all()


def test_a_model_that_does_not_run_in_float64():
    served = optimize_for_inference(Returning("float").eval(), images(), compile=False)
    assert any("since the model fails in float64" in note for note in served.report.notes)


def test_outputs_that_are_no_tensors_are_refused():
    with pytest.raises(ValueError, match=r"expected a model that returns tensors, .* got float"):
        optimize_for_inference(Returning("nothing").eval(), images(), compile=False)


def test_the_example_and_the_buffers_stay_as_they_are():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv = nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return self.conv(self.first(x)) * 1

    model, x = Counting().eval(), images().contiguous(memory_format=torch.channels_last)
    before = x.clone()
    served = optimize_for_inference(model, x, compile=False)
    assert torch.equal(x, before) and model.calls == 0
    assert all(b == 0 for b in served.module.buffers())


def test_neither_copies_nor_pickles():
    served = optimize_for_inference(with_statistics(Net()), images(), compile=False)
    for function in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="InferenceModel cannot be copied or pickled"):
            function(served)


def test_the_module_before_compilation_can_be_exported(monkeypatch):
    monkeypatch.setattr(optimize, "FrozenModule", lambda module, whole: module)
    torch.manual_seed(0)
    model = with_statistics(Net())
    served = optimize_for_inference(model, images())
    x = images().contiguous(memory_format=torch.channels_last)
    program = torch.export.export(served.module, (x,))
    assert "psa_forward" in str(program.graph)
    torch.testing.assert_close(program.module()(x), served(x), rtol=1e-4, atol=1e-4)


def test_a_psa_module_whose_layers_are_called_stays_as_it_is():
    torch.manual_seed(0)
    model = with_statistics(Net())
    model.psa = epsa_fused.fuse(model.psa)
    calls = []
    model.psa.conv_2.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="conv_2 has hooks"):
        served = optimize_for_inference(model, images(), compile=False)
    assert served.report.folded == ["stem.1"] and served.report.packed == 0
    assert "weights are packed in each call" in str(served.report)
    calls.clear()
    assert_as_good_as_the_model(served, model, images(), torch.float32)
    assert calls.count(1) == 3  # once by each of the three models


class Subclass(torch.Tensor):
    pass


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


def test_autocast_changes_nothing():
    served = optimize_for_inference(with_statistics(Net()), images(), compile=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = served(images())
    assert torch.equal(out, served(images()))


def test_a_wrong_result_is_an_error(monkeypatch):
    def broken(graph_module):
        names = fold(graph_module)
        next(graph_module.parameters()).data.mul_(1.01)
        return names

    fold = optimize.fold_batch_norms
    monkeypatch.setattr(optimize, "fold_batch_norms", broken)
    with pytest.raises(
        RuntimeError, match=r"differs by .* from the model's in torch.float64, expected"
    ):
        optimize_for_inference(with_statistics(Net()), images(), compile=False)


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(optimize, "why_not_available", lambda dtype: "this PyTorch lacks oneDNN")
    served = optimize_for_inference(with_statistics(Net()), images(), compile=False)
    assert served.report.pointwise == 0 and "lacks oneDNN" in str(served.report)
    assert pointwise.why_not_available(torch.float32) is None


# ---- compiled ----


def test_compiled_and_frozen():
    torch.manual_seed(0)
    model = with_statistics(Net())
    torch._dynamo.reset()
    served = optimize_for_inference(model, images(), dtype=torch.bfloat16)
    assert served.report.compiled and served.report.packed == 1
    with torch.profiler.profile() as profiler:
        served(images())
    # only frozen weights are packed for oneDNN
    names = {event.key for event in profiler.key_averages()}
    assert {"mkldnn::_convolution_pointwise", "epsa_fused::psa_forward"} <= names
    assert "aten::convolution" not in names
    assert served.report.folded == ["stem.1", "norm"]
    assert_as_good_as_the_model(served, model, images(), torch.bfloat16)
    assert_as_good_as_the_model(served, model, images(1, 20), torch.bfloat16)


class Counted(nn.Module):
    """Its result depends on a value in x, which torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x) * int(x.sum().item())


def test_compiled_code_of_a_model_that_looks_into_its_input():
    torch.manual_seed(0)
    model = Counted().eval()
    served = optimize_for_inference(model, torch.ones(1, 3, 4, 4))
    for value in (1.0, 2.0, 5.0, 1.0):
        x = torch.full((1, 3, 4, 4), value)
        with torch.no_grad():
            torch.testing.assert_close(served(x), model(x), rtol=1e-5, atol=1e-5)


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x, array):
        return self.conv(x) * array.shape[0]


def test_compiled_code_with_arguments_that_are_neither_tensors_nor_literals():
    model, x = Sized().eval(), torch.randn(1, 3, 4, 4)
    served = optimize_for_inference(model, x, np.zeros(2000))
    assert served.report.notes == ["no PSA module was found"]
    for length in (2000, 3000, 2000):
        with torch.no_grad():
            array = np.zeros(length)
            torch.testing.assert_close(served(x, array), model(x, array), rtol=1e-5, atol=1e-5)
    image, array = "floating-point tensor of 4 dimensions", "an object of type numpy.ndarray"
    for args, kwargs, got in (
        ((x, "0"), {}, f"({image}, '0')"),
        ((x, [x, x[0]]), {}, f"({image}, [{image}, {image.replace('4', '3')}])"),
        ((x,), {"array": np.zeros(2000)}, f"({image}, array={array})"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"takes for granted, got {got}") + "$"):
            served(*args, **kwargs)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x, y):
        return self.conv(x) - 2 * self.conv(y)


def test_compiled_code_of_the_same_tensor_twice_is_not_that_of_two():
    torch.manual_seed(0)
    model = Twice().eval()
    served = optimize_for_inference(model, *torch.randn(2, 1, 3, 4, 4))
    a, b = (torch.randn(1, 3, 5, 5).contiguous(memory_format=torch.channels_last) for _ in "ab")
    for x, y in ((a, a), (a, b), (b, b), (a, a[:]), (b, a)):
        with torch.no_grad():
            torch.testing.assert_close(served(x, y), model(x, y), rtol=1e-5, atol=1e-5)


class AddsOne(nn.Module):
    """It changes an input in place, which another one may overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, a, b):
        a.add_(1)
        return b * self.weight


def test_compiled_code_of_tensors_that_overlap_in_other_ways():
    served = optimize_for_inference(AddsOne().eval(), torch.zeros(2, 4), torch.zeros(2, 4))
    for offset in (4, 2, 8, 6, 4):
        base = torch.arange(40.0)
        a, b = base[:8].view(2, 4), base[offset : offset + 8].view(2, 4)
        right = torch.arange(40.0)
        right[:8] += 1
        out = served(a, b)
        torch.testing.assert_close(out, right[offset : offset + 8].view(2, 4))


def test_compiled_code_of_a_tensor_whose_sign_is_not_yet_computed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    z = torch.complex(torch.ones(2, 4), torch.ones(2, 4))
    served = optimize_for_inference(model, z.imag)
    for x in (z.imag, z.conj().imag, z.imag):
        with torch.no_grad():
            torch.testing.assert_close(served(x), model(x), rtol=1e-5, atol=1e-5)


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


class Constant(float):
    """A number that hides its value."""

    def __repr__(self) -> str:
        return "a number"


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x, factor):
        return self.conv(x) * factor


def test_compiled_code_with_a_number_of_a_type_of_its_own():
    model, x = Scaled().eval(), torch.randn(1, 3, 4, 4)
    served = optimize_for_inference(model, x, Constant(2.0))
    for value in (2.0, 3.0, 2.0):
        with torch.no_grad():
            right = model(x, value)
        torch.testing.assert_close(served(x, Constant(value)), right, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="expected the example's arguments"):
        served(x, 2.0)


def test_no_compiler_at_all():
    code = """if True:
        import torch
        from epsa_fused import optimize_for_inference
        try:
            optimize_for_inference(torch.nn.Conv2d(3, 4, 1).eval(), torch.randn(1, 3, 4, 4))
        except RuntimeError as error:
            print(error)
    """
    message = run_code(code, PATH="/nonexistent", CXX="no-such-compiler").strip()
    assert message == (
        "optimize_for_inference: compile: expected a C++ compiler on PATH, got no "
        "no-such-compiler; compile=False needs none"
    )


def test_the_import_of_the_package_does_not_import_the_compiler():
    code = "import sys, epsa_fused; print('torch._inductor.config' in sys.modules)"
    assert run_code(code).strip() == "False"


def test_no_compiler_is_needed_without_compile():
    code = """if True:
        import torch
        from epsa_fused import EPSANet, optimize_for_inference
        model = EPSANet([1, 1, 1, 1], 10, planes=(64, 64, 64, 64)).eval()
        served = optimize_for_inference(model, torch.randn(1, 3, 64, 64), compile=False)
        print(tuple(served(torch.randn(2, 3, 64, 64)).shape))
    """
    assert run_code(code, PATH="/nonexistent", CXX="/nonexistent").strip() == "(2, 10)"


# ---- bad input ----


def bad(change: str):
    model, example, options = with_statistics(Net()), (images(),), {"compile": False}
    if change == "training":
        model.train()
    elif change == "one module in training":
        model.norm.train()
    elif change == "no example":
        example = ()
    elif change == "an example without tensors":
        example = (3,)
    elif change == "meta example":
        example = (images().to("meta"),)
    elif change == "meta model":
        model.to("meta")
    elif change == "float16":
        options["dtype"] = torch.float16
    elif change == "float64 model":
        model.double()
    elif change == "two dtypes":
        model.last.bfloat16()
    elif change == "no module":
        model = model.forward
    elif change == "compile":
        options["compile"] = "no"
    elif change == "infinite":
        example = (images() * float("inf"),)
    return model, example, options


BAD = (
    ("training", RuntimeError, "expected a model in eval mode, got one in training mode"),
    ("one module in training", RuntimeError, "expected a model in eval mode"),
    ("no example", ValueError, r"example: expected the arguments of one call.*got \(\)"),
    ("an example without tensors", ValueError, r"example: expected .* got \(3\)"),
    ("meta example", ValueError, "expected the model and the example on the CPU, got .* meta"),
    ("meta model", ValueError, "expected the model and the example on the CPU, got .* meta"),
    ("float16", ValueError, "dtype: expected torch.float32 or torch.bfloat16, got torch.float16"),
    ("float64 model", ValueError, "dtype: expected .* got torch.float64"),
    ("two dtypes", ValueError, "model: expected parameters of one floating-point dtype, got"),
    ("no module", TypeError, "optimize_for_inference: model: expected"),
    ("compile", TypeError, "optimize_for_inference: compile: expected"),
    ("infinite", ValueError, "example: expected one without NaN in the outputs, got NaN"),
)


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[row[0] for row in BAD])
def test_bad_input(change, error, message):
    model, example, options = bad(change)
    with pytest.raises(error, match=message):
        optimize_for_inference(model, *example, **options)


def test_an_input_on_another_device_is_refused_later():
    served = optimize_for_inference(with_statistics(Net()), images(), compile=False)
    with pytest.raises(ValueError, match="expected tensors on the CPU, got meta"):
        served(images().to("meta"))
