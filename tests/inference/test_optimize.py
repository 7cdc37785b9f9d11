"""optimize_for_inference(): what it does, what it says, what it refuses; without a compiler."""

import copy
import pickle

import pytest
import torch
from support import published
from support.inference import (
    DTYPES,
    Net,
    Subclass,
    assert_as_good_as_the_model,
    images,
    with_statistics,
)
from support.isa import BFLOAT16_ALONE
from support.networks import narrow
from torch import nn

import epsa_fused
from epsa_fused import _C, epsanet50, optimize_for_inference
from epsa_fused.inference import optimize, pointwise
from epsa_fused.inference.epilogue import PackedPSA

MODULES = 16  # PSA modules of EPSANet-50


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(epsanet50())


class Branching(Net):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


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
    assert report.pointwise == len(convs) and report.linear == (dtype == torch.bfloat16)
    assert not report.compiled and not report.fuse.left
    # one line where bfloat16 gains no speed; test_bfloat16.py has its words
    pays = dtype == torch.float32 or _C.cpu_isa() in BFLOAT16_ALONE
    assert len(report.notes) == (0 if pays else 1)
    assert f"{MODULES} fused PSA modules" in str(report) == repr(served)
    # the blocks' sums and ReLUs are part of a convolution's call
    nodes = list(served.module.graph.nodes)
    modules = [served.module.get_submodule(n.target) for n in nodes if n.op == "call_module"]
    assert not any(isinstance(m, (nn.ReLU, nn.BatchNorm2d, nn.Conv2d)) for m in modules)
    # by name: a function's repr holds its address, whose digits may spell "add"
    called = {n.target.__name__ for n in nodes if n.op == "call_function"}
    assert called and not called & {"add", "iadd", "add_", "relu", "relu_"}
    # the model given is as before, and further calls do not depend on it
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(m._packed is not None for m in psa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_batches_and_sizes(network, dtype):
    served = optimize_for_inference(network, images(), dtype=dtype, compile=False)
    for batch, size in ((1, 64), (5, 64), (2, 96), (1, 33)):
        assert_as_good_as_the_model(served, network, images(batch, size), dtype)


class LeakyByInheritance(nn.ReLU):
    def forward(self, x):
        return nn.functional.leaky_relu(x, 0.2)


@pytest.mark.parametrize("act_layer", (nn.SiLU, nn.ReLU6, nn.LeakyReLU, LeakyByInheritance))
def test_another_activation_than_relu_stays(act_layer):
    """The BatchNorms are folded all the same."""
    model = with_statistics(narrow(act_layer=act_layer))
    served = optimize_for_inference(model, images(), compile=False)
    assert_as_good_as_the_model(served, model, images(3, 96), torch.float32)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    psa = [m for m in served.module.modules() if isinstance(m, PackedPSA)]
    assert len(served.report.folded) == norms and len(psa) == 6
    assert all("then BatchNorm" in repr(m) and "and ReLU" not in repr(m) for m in psa)
    assert not any(getattr(m, "_relu", False) for m in served.module.modules())


def test_a_dilated_network():
    model = with_statistics(narrow(output_stride=8))
    served = optimize_for_inference(model, images(), compile=False)
    assert_as_good_as_the_model(served, model, images(3, 96), torch.float32)
    assert served.report.packed == 6


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
