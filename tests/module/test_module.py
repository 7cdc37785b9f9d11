"""FusedPSAModule and PSAModule as modules: construction, copies, conversions, and changed
submodules, which the fused step must not skip silently."""

import copy
import io
import pickle
import re

import pytest
import torch
from support.cases import DTYPES, FORMATS, ORDERS, name_of, strides_of
from support.modules import convolutions_of, se_weights
from support.tolerance import accumulation_type, assert_close, assert_near
from torch import nn
from torch.nn.utils import parametrizations, prune

from epsa_fused import FusedPSAModule, PSAModule, psa_attention, psa_attention_reference

MODULES = (PSAModule, FusedPSAModule)
GROUPS = (1, 2, 4, 8)


def small(cls=FusedPSAModule, **options):
    return cls(16, 64, conv_groups=GROUPS, **options)


def features(module, x):
    return [conv(x) for conv in convolutions_of(module)]


# ---- construction ----


@pytest.mark.parametrize("cls", MODULES)
def test_defaults_are_the_published_configuration(cls):
    module = cls(64, 128)
    convs = [getattr(module, f"conv_{i}") for i in (1, 2, 3, 4)]
    assert [c.kernel_size[0] for c in convs] == [3, 5, 7, 9]
    assert [c.padding[0] for c in convs] == [1, 2, 3, 4]
    assert [c.groups for c in convs] == [1, 4, 8, 16]
    assert all(c.bias is None and c.stride == (1, 1) and c.out_channels == 32 for c in convs)
    assert module.se.fc1.weight.shape == (2, 32, 1, 1)
    assert module.branch_order == "reversed"


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("stride", (1, 2, 3))
def test_stride(stride, cls):
    out = small(cls, stride=stride)(torch.randn(2, 16, 9, 7))
    assert out.shape == (2, 64, -(-9 // stride), -(-7 // stride))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("branches", range(2, 9))
def test_branch_counts(branches, order):
    kernels = [2 * i + 1 for i in range(branches)]
    options = {"conv_groups": [1] * branches, "reduction": 4, "branch_order": order}
    fused = FusedPSAModule(8, 8 * branches, kernels, **options)
    reference = PSAModule(8, 8 * branches, kernels, **options).double()
    reference.load_state_dict(fused.state_dict(), strict=True)
    assert len(fused.state_dict()) == branches + 4
    x = torch.randn(2, 8, 6, 5)
    # the convolutions in float64 for both, so that only the attention step differs
    feats = [f.detach().float() for f in features(reference, x.double())]
    expected = reference.attention([f.double() for f in feats]).detach()
    assert_close(fused.attention(feats), expected, torch.float32)


@pytest.mark.parametrize("cls", MODULES)
def test_lists_and_tuples_are_taken(cls):
    lists, tuples = cls(16, 64, [3, 5, 7, 9], 1, list(GROUPS)), small(cls)
    lists.load_state_dict(tuples.state_dict(), strict=True)
    x = torch.randn(2, 16, 6, 5)
    assert torch.equal(lists(x), tuples(x))


@pytest.mark.parametrize("cls", MODULES)
def test_a_reduction_that_does_not_divide_rounds_down(cls):
    assert cls(16, 96, conv_groups=GROUPS, reduction=10).se.fc1.out_channels == 2


BAD = {
    # planes not a multiple of the branches
    "planes": ((16, 66), {}, r"planes: expected a multiple of the 4 branches, got 66"),
    "no_planes": ((16, 0), {}, r"planes: expected at least 1, got 0"),
    "no_inplans": ((0, 64), {}, r"inplans: expected at least 1, got 0"),
    "stride": ((16, 64), {"stride": 0}, r"stride: expected at least 1, got 0"),
    "reduction": ((16, 64), {"reduction": 0}, r"reduction: expected at least 1, got 0"),
    # no hidden unit: says which reduction would do
    "no_hidden_unit": ((16, 32), {},
        r"reduction: expected at most planes // branches = 8, got 16,.*reduction=8"),
    "groups_of_inplans": ((12, 64), {"conv_groups": (1, 2, 4, 8)},
        r"conv_groups\[3\]: expected a divisor of inplans = 12.*got 8"),
    "groups_of_planes": ((64, 64), {"conv_groups": (1, 2, 4, 32)},
        r"conv_groups\[3\]: expected a divisor of.*planes // branches = 16, got 32"),
    "no_groups": ((16, 64), {"conv_groups": (1, 0, 4, 8)},
        r"conv_groups\[1\]: expected a divisor of.*got 0"),
    "even_kernel": ((16, 64), {"conv_kernels": (3, 4, 7, 9)},
        r"conv_kernels\[1\]: expected an odd kernel size, got 4"),
    "negative_kernel": ((16, 64), {"conv_kernels": (3, 5, 7, -1)},
        r"conv_kernels\[3\]: expected an odd kernel size, got -1"),
    "lengths": ((16, 64), {"conv_kernels": (3, 5, 7)},
        r"conv_kernels and conv_groups: expected equal lengths, got 3 .* and 4"),
    "one_branch": ((16, 64), {"conv_kernels": (3,), "conv_groups": (1,)},
        r"conv_kernels: expected 2 to 8 branches, got 1"),
    "nine_branches": ((16, 144), {"conv_kernels": (3,) * 9, "conv_groups": (1,) * 9},
        r"conv_kernels: expected 2 to 8 branches, got 9"),
    "branch_order": ((16, 64), {"branch_order": "backward"},
        r"branch_order: expected one of \('reversed', 'forward'\), got 'backward'"),
}  # fmt: skip


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("bad", BAD)
def test_configurations_that_cannot_be_built(bad, cls):
    args, options, message = BAD[bad]
    options = {"conv_groups": GROUPS, **options}
    with pytest.raises(ValueError, match=message):
        cls(*args, **options)


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"inplans": 16.0}, r"inplans: expected an int, got 16\.0"),
        ({"planes": "64"}, r"planes: expected an int, got '64'"),
        ({"stride": (1, 1)}, r"stride: expected an int, got \(1, 1\)"),
        ({"reduction": 16.0}, r"reduction: expected an int, got 16\.0"),
        ({"conv_kernels": (3, 5, 7.0, 9)}, r"conv_kernels\[2\]: expected an int, got 7\.0"),
        ({"conv_groups": (None, 2, 4, 8)}, r"conv_groups\[0\]: expected an int, got None"),
    ),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_things_that_are_no_integers(options, message, cls):
    with pytest.raises(TypeError, match=message):
        cls(**{"inplans": 16, "planes": 64, "conv_groups": GROUPS, **options})


@pytest.mark.parametrize("cls", MODULES)
def test_the_reduction_that_the_message_names_works(cls):
    with pytest.raises(ValueError) as error:
        cls(16, 32, conv_groups=GROUPS)
    reduction = int(re.search(r"reduction=(\d+)", str(error.value)).group(1))
    out = cls(16, 32, conv_groups=GROUPS, reduction=reduction)(torch.randn(1, 16, 4, 4))
    assert out.shape == (1, 32, 4, 4)


# ---- results ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_forward_in_every_dtype_and_layout(dtype, memory_format, order, device):
    """The whole module is moved, as .double() or .bfloat16() do it."""
    module = small(branch_order=order).to(device, dtype, memory_format=memory_format)
    x = torch.randn(2, 16, 9, 8, device=device).to(dtype).to(memory_format=memory_format)
    out = module(x)
    assert out.dtype == dtype
    # cuDNN returns contiguous maps of float64, whatever it is given.
    by_cudnn = device != "cpu" and dtype == torch.float64
    kept = torch.contiguous_format if by_cudnn else memory_format
    assert out.stride() == strides_of(out.shape, kept)
    exact = [f.detach().double() for f in features(module, x)]
    weights = [w.detach().double() for w in se_weights(module)]
    expected = psa_attention_reference(exact, *weights, branch_order=order)
    assert_close(out, expected, accumulation_type(dtype))


@pytest.mark.parametrize("cls", MODULES)
def test_training_and_evaluation_are_the_same(cls):
    module, x = small(cls), torch.randn(2, 16, 6, 6)
    assert torch.equal(module.train()(x), module.eval()(x))


@pytest.mark.parametrize("cls", MODULES)
def test_an_empty_batch(cls):
    module = small(cls)
    out = module(torch.randn(0, 16, 6, 6))
    assert out.shape == (0, 64, 6, 6)
    out.sum().backward()
    assert not module.se.fc1.weight.grad.any()


def test_training_reaches_every_parameter():
    module = small()
    module(torch.randn(2, 16, 6, 6)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("frozen", ("se", "conv_2", "conv_"))
def test_frozen_parts(frozen):
    """Parts that are not frozen get the same gradients as before."""
    module, x = small(), torch.randn(2, 16, 6, 6)
    module(x).square().sum().backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        if name.startswith(frozen):
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, expected[name]), name


# ---- copies ----


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_a_file(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def through_a_state_dict(module):
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    other = type(module)(16, 64, conv_groups=GROUPS, branch_order=module.branch_order)
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    return other


@pytest.mark.parametrize(
    "duplicate", (copy.deepcopy, through_pickle, through_a_file, through_a_state_dict)
)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cls", MODULES)
def test_copies(cls, order, duplicate):
    module, x = small(cls, branch_order=order), torch.randn(2, 16, 6, 6)
    other = duplicate(module)
    assert type(other) is cls and other is not module
    assert torch.equal(other(x), module(x))
    with torch.no_grad():
        other.se.fc2.bias[0] += 1
    assert not torch.equal(other(x), module(x))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cls", MODULES)
def test_repr_shows_the_branch_order(cls, order):
    assert f"branch_order='{order}'" in repr(small(cls, branch_order=order))


def test_functional_call_with_other_parameters():
    module, x = small(), torch.randn(2, 16, 6, 6)
    other = small()
    assert torch.equal(torch.func.functional_call(module, other.state_dict(), (x,)), other(x))


# ---- changes to submodules: computed, or refused ----


def test_weights_of_another_width_and_no_biases():
    """Plain layers may replace plain layers."""
    module = small()
    module.se.fc1 = nn.Conv2d(16, 3, 1, bias=False)
    module.se.fc2 = nn.Conv2d(3, 16, 1, bias=False)
    module.double()
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    expected = psa_attention(features(module, x), *se_weights(module))
    assert_near(module(x), expected)


@pytest.mark.parametrize(
    "parametrization", (parametrizations.weight_norm, parametrizations.spectral_norm)
)
def test_parametrized_weights(parametrization):
    """The weight is computed when it is read, and its parameters get gradients."""
    module, x = small().double().eval(), torch.randn(2, 16, 6, 6, dtype=torch.float64)
    parametrization(module.se.fc2)
    weights = [w.detach() for w in se_weights(module)]
    out = module(x)
    assert_near(out, psa_attention(features(module, x), *weights))
    out.square().sum().backward()
    parameters = list(module.se.fc2.parametrizations.weight.parameters())
    assert parameters and all(p.grad is not None for p in parameters)


def test_pruning_that_was_made_permanent():
    module, x = small().double(), torch.randn(2, 16, 6, 6, dtype=torch.float64)
    prune.l1_unstructured(module.se.fc1, "weight", 0.5)
    prune.remove(module.se.fc1, "weight")
    expected = psa_attention(features(module, x), *se_weights(module))
    assert_near(module(x), expected)


class Wrapper(nn.Module):
    """LoRA and quantisation wrap layers like this, with the weight in reach."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return 2 * self.base(x)


class DoublingConv2d(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def doubling_conv2d(base):
    layer = DoublingConv2d(base.in_channels, base.out_channels, 1)
    layer.load_state_dict(base.state_dict())
    return layer


def patch(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


LAYERS = ("se", "se.avg_pool", "se.fc1", "se.relu", "se.fc2", "se.sigmoid")
HOOKS = {
    "forward_hook": lambda m: m.register_forward_hook(lambda m, x, y: 2 * y),
    "forward_pre_hook": lambda m: m.register_forward_pre_hook(lambda m, x: (2 * x[0],)),
    "full_backward_hook": lambda m: m.register_full_backward_hook(lambda m, x, y: None),
    "full_backward_pre_hook": lambda m: m.register_full_backward_pre_hook(lambda m, y: None),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", LAYERS)
def test_hooks_are_refused_and_gone_when_removed(layer, hook):
    module, x = small(), torch.randn(2, 16, 6, 6)
    expected = module(x)
    handle = HOOKS[hook](module.get_submodule(layer))
    with pytest.raises(RuntimeError, match=rf"FusedPSAModule: {layer} has hooks.*PSAModule"):
        module(x)
    handle.remove()
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", ("", "conv_1"))
def test_hooks_on_what_is_called_work(layer, hook):
    module, x = small(), torch.randn(2, 16, 6, 6, requires_grad=True)
    calls = []

    def record(*args):
        calls.append(args)

    name = f"register_{hook}"
    getattr(module.get_submodule(layer) if layer else module, name)(record)
    module(x).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("layer", LAYERS[1:])
def test_replaced_layers_are_refused(layer):
    module, x = small(), torch.randn(2, 16, 6, 6)
    name = layer.removeprefix("se.")
    setattr(module.se, name, Wrapper(getattr(module.se, name)))
    with pytest.raises(RuntimeError, match=rf"FusedPSAModule: {layer} is a Wrapper.*PSAModule"):
        module(x)


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    module, x = small(), torch.randn(2, 16, 6, 6)
    module.se.fc2 = doubling_conv2d(module.se.fc2)
    with pytest.raises(RuntimeError, match=r"se\.fc2 is a DoublingConv2d.*expected.*Conv2d"):
        module(x)


@pytest.mark.parametrize(
    ("layer", "replacement", "message"),
    (
        ("avg_pool", nn.AdaptiveAvgPool2d(2), r"avg_pool has output_size 2, expected 1"),
        ("fc1", nn.Conv2d(16, 1, 1, padding=1), r"fc1 has padding \(1, 1\)"),
        ("fc1", nn.Conv2d(16, 2, 1, groups=2), r"fc1 has.*groups 2"),
        ("fc2", nn.Conv2d(1, 16, 3, padding=1), r"fc2 has padding \(1, 1\)"),
    ),
    ids=("output_size", "padding", "groups", "kernel_size"),
)
def test_layers_of_other_settings_are_refused(layer, replacement, message):
    module = small()
    setattr(module.se, layer, replacement)
    with pytest.raises(RuntimeError, match=rf"FusedPSAModule: se\.{message}.*PSAModule"):
        module(torch.randn(2, 16, 6, 6))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_patched_forward_is_refused(layer):
    module, x = small(), torch.randn(2, 16, 6, 6)
    patch(module.get_submodule(layer))
    with pytest.raises(RuntimeError, match=rf"FusedPSAModule: {layer} is.*forward of its own"):
        module(x)


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation, where Conv2d.forward calls it."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def standardise(layer, patched):
    if patched:
        conv = layer._conv_forward
        layer._conv_forward = lambda x, weight, bias: conv(
            x, weight - weight.mean((1, 2, 3), keepdim=True), bias
        )
    else:
        layer.__class__ = StandardisedConv2d


@pytest.mark.parametrize("patched", (False, True), ids=("subclass", "patched"))
def test_a_conv_forward_of_its_own_is_called(patched):
    module, reference = small().double(), small(PSAModule).double()
    reference.load_state_dict(module.state_dict())
    for m in (module, reference):
        standardise(m.conv_2, patched)
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    assert_near(module(x), reference(x))


@pytest.mark.parametrize("patched", (False, True), ids=("subclass", "patched"))
@pytest.mark.parametrize("layer", ("se.fc1", "se.fc2"))
def test_a_conv_forward_of_its_own_is_refused_in_the_se(layer, patched):
    module, x = small(), torch.randn(2, 16, 6, 6)
    standardise(module.get_submodule(layer), patched)
    with pytest.raises(RuntimeError, match=rf"{layer} is a .* with a _conv_forward of its own"):
        module(x)


@pytest.mark.parametrize("layer", LAYERS[1:])
def test_a_missing_layer_is_refused(layer):
    module, x = small(), torch.randn(2, 16, 6, 6)
    delattr(module.se, layer.removeprefix("se."))
    with pytest.raises(RuntimeError, match=rf"FusedPSAModule: {layer} is missing"):
        module(x)


def test_pruning_is_refused_while_it_is_a_hook():
    module = small()
    prune.l1_unstructured(module.se.fc1, "weight", 0.5)
    with pytest.raises(RuntimeError, match=r"se\.fc1 has hooks"):
        module(torch.randn(2, 16, 6, 6))


# The errors recommend PSAModule, so it must call what they refuse.


@pytest.mark.parametrize("layer", LAYERS)
def test_the_reference_module_calls_hooks(layer):
    """Once for each branch, as the published code does."""
    module, calls = small(PSAModule), []
    module.get_submodule(layer).register_forward_hook(lambda *args: calls.append(args))
    module(torch.randn(2, 16, 6, 6))
    assert len(calls) == 4


@pytest.mark.parametrize("change", ("wrapper", "subclass", "patch"))
@pytest.mark.parametrize("layer", ("fc1", "fc2"))
def test_the_reference_module_calls_replaced_layers(layer, change):
    """Each change doubles the layer's result, as twice its weight and bias would."""
    module, x = small(PSAModule), torch.randn(2, 16, 6, 6)
    expected = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in getattr(expected.se, layer).parameters():
            parameter.mul_(2)
    base = getattr(module.se, layer)
    if change == "patch":
        patch(base)
    else:
        setattr(module.se, layer, Wrapper(base) if change == "wrapper" else doubling_conv2d(base))
    assert torch.equal(module(x), expected(x))


# ---- sharded parameters ----

distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)


@pytest.fixture
def mesh():
    """One process, no network."""
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@distributed
@pytest.mark.parametrize("root", (False, True), ids=("module", "parent"))
def test_fully_shard_of_the_module_or_a_parent_works(root, mesh):
    from torch.distributed.fsdp import fully_shard

    module, x = small(), torch.randn(2, 16, 6, 6)
    expected = module(x)
    expected.sum().backward()
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    model = nn.Sequential(module) if root else module
    fully_shard(model, mesh=mesh)
    out = model(x)
    out.sum().backward()
    assert torch.equal(out, expected)
    for p, grad in zip(module.parameters(), grads, strict=True):
        assert torch.equal(p.grad.full_tensor(), grad)


@distributed
@pytest.mark.parametrize("layer", ("se", "se.fc1", "se.fc2"))
def test_fully_shard_inside_the_se_is_refused(layer, mesh):
    from torch.distributed.fsdp import fully_shard

    module = small()
    fully_shard(module.get_submodule(layer), mesh=mesh)
    with pytest.raises(RuntimeError, match=rf"FusedPSAModule: {layer} has hooks.*PSAModule"):
        module(torch.randn(2, 16, 6, 6))


@distributed
@pytest.mark.parametrize("parameter", ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))
def test_a_dtensor_parameter_is_refused(parameter, mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    module = small()
    layer, name = parameter.split(".")
    layer = getattr(module.se, layer)
    sharded = distribute_tensor(getattr(layer, name).detach(), mesh, [Replicate()])
    layer.register_parameter(name, nn.Parameter(sharded))
    message = rf"FusedPSAModule: se\.{re.escape(parameter)} is a DTensor.*PSAModule"
    with pytest.raises(RuntimeError, match=message):
        module(torch.randn(2, 16, 6, 6))


@distributed
def test_distributed_data_parallel(mesh):
    module, x = small(), torch.randn(2, 16, 6, 6)
    module(x).sum().backward()
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    nn.parallel.DistributedDataParallel(module)(x).sum().backward()
    for p, grad in zip(module.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)
