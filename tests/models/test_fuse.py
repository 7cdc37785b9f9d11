"""fuse(): what it finds and keeps, and that the fused model computes the same."""

import copy
import io
from collections import Counter

import pytest
import torch
from support import published
from support.fusing import description, without_warning
from support.lookalikes.parts import GROUPS, external_psa, published_psa
from support.lookalikes.subclasses import Overwriting, WithDropout
from support.lookalikes.variants import InOrder
from support.tolerance import assert_near
from torch import nn
from torch.nn.utils import parametrizations

from epsa_fused import EPSANet, FusedPSAModule, FusedSplitPSA, PSAModule, fuse


def results(model, x):
    """Output, gradient of the input, and all gradients as one vector."""
    x = x.clone().requires_grad_()
    out = model(x * 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grad_x, *grads = torch.autograd.grad(out.sin().sum(), [x, *parameters])
    return out.detach(), grad_x, torch.cat([g.flatten() for g in grads])


def assert_same(fused, model, x):
    for actual, expected in zip(results(fused, x), results(model, x), strict=True):
        assert_near(actual, expected)


# ---- what is found, and that it computes the same ----

MODULES = {
    "reference": (lambda: PSAModule(16, 64, conv_groups=GROUPS), FusedPSAModule, "reversed"),
    "reference_in_order": (lambda: PSAModule(16, 64, conv_groups=GROUPS, branch_order="forward"),
        FusedPSAModule, "forward"),
    "reference_of_3_branches": (lambda: PSAModule(16, 48, (3, 5, 7), 2, (1, 2, 4), reduction=5),
        FusedPSAModule, "reversed"),
    "published": (published_psa, FusedPSAModule, "reversed"),
    "published_in_order": (lambda: published_psa(InOrder), FusedPSAModule, "forward"),
    "stride_2": (lambda: published.PSAModule(64, 64, stride=2), FusedPSAModule, "reversed"),
    "external": (external_psa, FusedSplitPSA, "forward"),
    "external_of_2_branches": (lambda: external_psa(branches=2), FusedSplitPSA, "forward"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODULES)
def test_each_kind_is_found_and_computes_the_same(kind):
    make, cls, order = MODULES[kind]
    model = nn.Sequential(nn.Identity(), make()).double()
    inplans = (
        64 if kind in ("stride_2", "external") else {"external_of_2_branches": 32}.get(kind, 16)
    )
    before = description(model)
    fused = without_warning(fuse, model)
    assert description(model) == before
    assert type(fused[1]) is cls and fused[1].branch_order == order
    assert list(fused.fuse_report.replaced) == ["1"] and not fused.fuse_report.left
    # the same tensors, by the same names
    assert list(fused.state_dict()) == list(model.state_dict())
    for (name, a), (other, b) in zip(
        fused.named_parameters(), model.named_parameters(), strict=True
    ):
        assert name == other and a is b
    assert_same(fused, model, torch.randn(3, inplans, 7, 6, dtype=torch.float64))


def test_the_class_may_have_any_name_and_module_path():
    def forward(self, x):
        return published.PSAModule.forward(self, x)

    cls = type("Conv", (nn.Module,), {"forward": forward, "__module__": "somewhere.else"})
    module = cls()
    for name, child in published_psa().named_children():
        module.add_module(name, child)
    module.split_channel = 16
    model = nn.Sequential(module).double()
    fused = fuse(model)
    assert fused.fuse_report.replaced == {
        "0": "FusedPSAModule(branch_order='reversed') for somewhere.else.Conv"
    }
    assert_same(fused, model, torch.randn(2, 16, 6, 6, dtype=torch.float64))


def test_the_published_network_in_evaluation_and_in_training():
    model = published.epsanet50().double()
    fused = fuse(model)
    assert len(fused.fuse_report.replaced) == 16
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    # Both share the BatchNorms' statistics, so each run starts from the first ones.
    statistics = copy.deepcopy(model.state_dict())
    for train in (False, True):
        pair = []
        for m in (fused, model):
            m.load_state_dict(statistics)
            pair.append(results(m.train(train), x))
        for actual, expected in zip(*pair, strict=True):
            assert_near(actual, expected)


def test_what_was_fused_is_what_would_have_been_built():
    """The reference network, fused, against the same network with fused=True."""
    reference = EPSANet((1, 1, 1, 1), 10, fused=False)
    built = EPSANet((1, 1, 1, 1), 10)
    fused = fuse(reference)
    assert repr(fused) == repr(built)
    for (name, a), (_, b) in zip(fused.named_modules(), built.named_modules(), strict=True):
        # the keys too: fuse() sets all that the constructor sets
        assert vars(a).keys() - {"fuse_report"} == vars(b).keys(), name
    built.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(fused.eval()(x), built.eval()(x))


def test_a_module_that_wrote_over_its_input():
    """The result is the same. A warning says that the input is no longer overwritten."""
    model = nn.Sequential(external_psa(Overwriting)).double()
    with pytest.warns(UserWarning, match=r"0 wrote over its input, which the fused module leaves"):
        fused = fuse(model)
    x = torch.randn(2, 64, 6, 6, dtype=torch.float64)
    given = x.clone()
    with torch.no_grad():
        out = fused(given)
        assert torch.equal(given, x)
        assert_near(out, model(given))
    assert not torch.equal(given, x)


def test_a_shared_module_stays_shared():
    psa = published.PSAModule(64, 64)
    model = nn.ModuleDict({"a": psa, "b": nn.Sequential(psa)})
    fused = fuse(model)
    assert list(fused.fuse_report.replaced) == ["a", "b.0"]
    assert fused["a"] is fused["b"][0] and type(fused["a"]) is FusedPSAModule


def test_the_model_may_be_the_module():
    module = published_psa().double()
    fused = fuse(module)
    assert type(fused) is FusedPSAModule and list(fused.fuse_report.replaced) == [""]
    assert_same(fused, module, torch.randn(2, 16, 6, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"the model is itself a PSA module"):
        fuse(module, inplace=True)


def test_the_random_generator_is_left_alone():
    model = nn.Sequential(published_psa(), external_psa(), published_psa(WithDropout))
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"left alone 1"):
        fuse(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_kind_is_tried_once(monkeypatch):
    """EPSANet-101 has 33 modules of seven kinds, and EPSANet-50 has 16 of the same: four widths,
    and in three of them a stride."""
    runs = []
    forward = published.PSAModule.forward
    monkeypatch.setattr(
        published.PSAModule, "forward", lambda self, x: (runs.append(x.shape), forward(self, x))[1]
    )
    counts = []
    for make in (published.epsanet50, published.epsanet101):
        runs.clear()
        with torch.device("meta"):
            model = make()
        fuse(model)
        counts.append(len(runs))
    assert counts[0] == counts[1]
    kinds = dict.fromkeys((128, 256, 512), 2) | {64: 1}
    assert Counter(shape[1] for shape in runs) == {c: k * counts[0] // 7 for c, k in kinds.items()}


class Scaled(published.SEWeightModule):
    scale = 1.0

    def forward(self, x):
        return self.scale * super().forward(x)


class Flagged(published.PSAModule):
    _doubled = False

    def forward(self, x):
        return super().forward(x) * (2 if self._doubled else 1)


UNEQUAL = {
    "private": (Flagged, lambda m: setattr(m, "_doubled", True)),
    "se": (published.PSAModule, lambda m: setattr(m.se, "scale", 3.0)),
    "softmax": (published.PSAModule, lambda m: setattr(m.softmax, "dim", 2)),
}


@pytest.mark.parametrize("setting", UNEQUAL)
def test_two_of_one_class_and_unequal_settings_are_each_run(setting):
    cls, change = UNEQUAL[setting]
    model = nn.Sequential(published_psa(cls), published_psa(cls))
    if setting == "se":
        for m in model:
            m.se = Scaled(16)
    change(model[1])
    with pytest.warns(UserWarning, match=r"left alone 1 .*1 \(its forward computes something else"):
        fused = fuse(model)
    assert [type(m) for m in fused] == [FusedPSAModule, cls]


# ---- what is kept ----


def test_flags_dtype_and_frozen_parameters_are_kept():
    model = nn.Sequential(published_psa(), external_psa()).bfloat16()
    model[0].eval()
    model[0].conv_2.train()
    model[1].se_blocks[2].eval()
    for p in model[0].se.parameters():
        p.requires_grad_(False)
    training = {name: m.training for name, m in model.named_modules()}
    fused = fuse(model)
    for name, m in fused.named_modules():
        assert m.training == training[name], name
    assert not any(p.requires_grad for p in fused[0].se.parameters())
    out = fused(torch.randn(2, 16, 6, 6).bfloat16())
    assert out.dtype == torch.bfloat16


def test_a_model_without_data():
    with torch.device("meta"):
        model = nn.Sequential(published.PSAModule(64, 64))
    fused = fuse(model)
    assert {p.device.type for p in fused.parameters()} == {"meta"}
    assert fused(torch.empty(2, 64, 8, 8, device="meta")).shape == (2, 64, 8, 8)


def test_an_optimizer_goes_on():
    """In place or not, the parameters are the optimizer's own."""
    for inplace in (False, True):
        model = nn.Sequential(published_psa())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fused = fuse(model, inplace=inplace)
        assert (fused is model) == inplace
        before = fused[0].conv_1.weight.detach().clone()
        fused(torch.randn(2, 16, 6, 6)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(fused[0].conv_1.weight, before)


def test_a_deepcopy_is_independent():
    model = nn.Sequential(published_psa())
    other = copy.deepcopy(fuse(model))
    assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in model.parameters())


def test_the_fused_model_can_be_saved():
    model = fuse(nn.Sequential(published_psa(), external_psa()))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(loaded(x), model(x))
    assert loaded.fuse_report == model.fuse_report


@pytest.mark.parametrize("inplace", (False, True))
def test_hooks_on_the_module_and_its_convolutions_stay(inplace):
    model = nn.Sequential(published_psa(), external_psa())
    calls = []
    handles = [
        model[0].register_forward_hook(lambda m, x, y: calls.append(type(m))),
        model[0].register_forward_pre_hook(lambda m, x, k: calls.append("pre"), with_kwargs=True),
        model[0].register_full_backward_hook(lambda m, x, y: calls.append("backward")),
        model[1].convs[3].register_forward_hook(lambda m, x, y: calls.append("conv")),
    ]
    fused = fuse(model, inplace=inplace)
    assert not calls, "fuse() ran the user's hooks"
    x = torch.randn(2, 16, 6, 6, requires_grad=True)
    fused(x).sum().backward()
    assert calls == ["pre", FusedPSAModule, "conv", "backward"]
    if inplace:
        for handle in handles:
            handle.remove()
        calls.clear()
        fused(x).sum().backward()
        assert not calls


def test_parametrized_layers_are_kept():
    model = nn.Sequential(published_psa()).double().eval()
    parametrizations.weight_norm(model[0].se.fc1)
    parametrizations.spectral_norm(model[0].conv_2)
    fused = fuse(model)
    assert_same(fused, model, torch.randn(2, 16, 6, 6, dtype=torch.float64))


# ---- parallel wrappers ----


def test_data_parallel():
    model = nn.DataParallel(nn.Sequential(published_psa()).double())
    fused = fuse(model)
    assert type(fused.module[0]) is FusedPSAModule
    assert list(fused.fuse_report.replaced) == ["module.0"]
    assert list(fused.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    assert_near(fused(x), model(x))


distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)


@pytest.fixture
def one_process():
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@distributed
def test_distributed_data_parallel_in_place(one_process):
    plain = nn.Sequential(published_psa()).double()
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    model(x).sum().backward()  # its buckets exist before it is fused
    model.zero_grad()
    assert fuse(model, inplace=True) is model
    assert type(model.module[0]) is FusedPSAModule
    model(x).sin().sum().backward()
    plain(x).sin().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert_near(a.grad, b.grad)


@distributed
def test_distributed_data_parallel_needs_inplace(one_process):
    model = nn.parallel.DistributedDataParallel(nn.Sequential(published_psa()))
    with pytest.raises(RuntimeError, match=r"the model is a DistributedDataParallel.*inplace=True"):
        fuse(model)
    assert type(model.module[0]) is published.PSAModule


@distributed
def test_a_sharded_module_is_left_alone(one_process):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(published.PSAModule(64, 64), published_psa())
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh)
    with pytest.warns(UserWarning, match=r"0 \(its parameters are shards \(DTensor\)"):
        fuse(model, inplace=True)
    assert list(model.fuse_report.replaced) == ["1"]


def test_a_compiled_model_is_compiled_again():
    compiled = torch.compile(nn.Sequential(published_psa()).double(), backend="aot_eager")
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    expected = compiled(x).detach()
    assert fuse(compiled, inplace=True) is compiled
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_near(compiled(x).detach(), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1
