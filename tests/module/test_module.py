"""FusedPSAModule and PSAModule as modules: construction, copies, conversions, changed and sharded
parameters. test_layers.py has the layers that are called."""

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
from torch.nn.utils import prune

from epsa_fused import (
    FusedPSAModule,
    PSAModule,
    psa_attention,
    psa_attention_reference,
    why_not_fused,
)

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


# ---- changes to submodules that stay plain ----


def test_weights_of_another_width_and_no_biases():
    """Plain layers may replace plain layers."""
    module = small()
    module.se.fc1 = nn.Conv2d(16, 3, 1, bias=False)
    module.se.fc2 = nn.Conv2d(3, 16, 1, bias=False)
    module.double()
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    expected = psa_attention(features(module, x), *se_weights(module))
    assert_near(module(x), expected)
    assert why_not_fused(module) is None


def test_pruning_that_was_made_permanent():
    module, x = small().double(), torch.randn(2, 16, 6, 6, dtype=torch.float64)
    prune.l1_unstructured(module.se.fc1, "weight", 0.5)
    prune.remove(module.se.fc1, "weight")
    expected = psa_attention(features(module, x), *se_weights(module))
    assert_near(module(x), expected)
    assert why_not_fused(module) is None


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
@pytest.mark.parametrize("layer", ("conv_2", "se", "se.fc1", "se.fc2"))
def test_fully_shard_inside_the_module_calls_its_layers(layer, mesh):
    from torch.distributed.fsdp import fully_shard

    module, reference = small().double(), small(PSAModule).double()
    reference.load_state_dict(module.state_dict())
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    expected = reference(x)
    expected.sum().backward()
    fully_shard(module.get_submodule(layer), mesh=mesh)
    with pytest.warns(UserWarning, match=rf"calls layers .*: {layer} has hooks"):
        out = module(x)
    out.sum().backward()
    assert_near(out, expected, 1e-12)
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        assert_near(grad, q.grad, 1e-12)


@distributed
@pytest.mark.parametrize(
    "parameter", ("conv_2.weight", "se.fc1.weight", "se.fc1.bias", "se.fc2.weight", "se.fc2.bias")
)
def test_a_dtensor_parameter_is_named(parameter, mesh):
    """A call of the layer would take it, or raise as that of the reference does."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    module = small()
    layer, name = parameter.rsplit(".", 1)
    layer = module.get_submodule(layer)
    sharded = distribute_tensor(getattr(layer, name).detach(), mesh, [Replicate()])
    layer.register_parameter(name, nn.Parameter(sharded))
    assert why_not_fused(module).startswith(f"{parameter} is a DTensor")
    with (
        pytest.warns(UserWarning, match=rf"calls layers .*: {re.escape(parameter)} is a DTensor"),
        pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"),
    ):
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
