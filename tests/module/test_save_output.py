"""FusedPSAModule(save_output=True) keeps only the output for the backward pass, no other map."""

import pytest
import torch
from support.cases import FORMATS, ORDERS, name_of
from support.modules import (
    CASES,
    arguments,
    build,
    convolution_arguments,
    gradient_sizes,
    image,
    se_weights,
)
from support.tolerance import assert_near, relative_error
from torch import nn

from epsa_fused import FusedPSAModule, PSAModule

OP = torch.ops.epsa_fused.psa_save_output.default
BACKWARD = torch.ops.epsa_fused.psa_save_output_backward.default
NAMES = ("stage1", "stride_2", "two_branches", "eight_branches", "a_branch_for_the_library")
NAMES += ("stride_3", "one_pixel", "empty")


def make(name, cls=FusedPSAModule, dtype=torch.float32, **options):
    module = build(name, cls, dtype, **options)
    # some hidden units stay alive
    nn.init.ones_(module.se.fc1.bias)
    return module


def make_x(*given):
    return image(*given).requires_grad_()


def grad_of(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)


def step(module, x):
    """The output, and gradients of x and of the parameters."""
    out = module(x)
    grad = grad_of(out)
    return out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], grad)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_reference(name, memory_format, order):
    """The default's errors, which strict tests bound, are the yardstick."""
    module = make(name, branch_order=order, save_output=True)
    plain = make(name, PSAModule, torch.float64, branch_order=order)
    exact = step(plain, make_x(name, torch.float64, memory_format))
    saving = step(module, make_x(name, torch.float32, memory_format))
    module.save_output = False
    keeping = step(module, make_x(name, torch.float32, memory_format))
    assert torch.equal(saving[0], keeping[0])
    for got, default, expected in zip(saving, keeping, exact, strict=True):
        assert got.dtype == torch.float32 and got.stride() == default.stride()
        if expected.numel():
            limit = 4 * relative_error(default, expected) + 16 * torch.finfo(torch.float32).eps
            assert_near(got, expected, limit)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ("stage1", "stride_2", "a_branch_for_the_library"))
def test_half_precision(name, dtype):
    module = make(name, dtype=dtype, save_output=True)
    plain = make(name, PSAModule, dtype).double()
    exact = step(plain, make_x(name, dtype).detach().double().requires_grad_())
    names = ["out", "x", *(n for n, _ in module.named_parameters())]
    sizes = gradient_sizes(plain, make_x(name, dtype).detach().double(), grad_of(exact[0]))
    for key, got, expected in zip(names, step(module, make_x(name, dtype)), exact, strict=True):
        # Each map is recovered from the rounded output, so every term of a gradient is off by as
        # much. The SE's gradients are small differences of such terms.
        size = sizes[key].abs().max() if key in sizes else expected.abs().max()
        error = (got - expected).abs().max()
        assert got.dtype == dtype and error < 4 * torch.finfo(dtype).eps * size, (key, error / size)


def functional(module, x):
    names = [n for n, _ in module.named_parameters()]
    leaves = [p.detach().clone().requires_grad_() for p in module.parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    return call, (x, *leaves)


@pytest.mark.parametrize("name", ("two_branches", "a_branch_for_the_library"))
def test_gradcheck_and_gradgradcheck(name):
    module = make(name, dtype=torch.float64, save_output=True)
    x = torch.randn(2, CASES[name].inplans, 3, 4, dtype=torch.float64, requires_grad=True)
    call, inputs = functional(module, x)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", ("x", "conv_2.weight", "se.fc1.weight", "se.fc2.bias"))
def test_only_what_is_asked_for(wanted):
    module = make("stage1", save_output=True)
    x = make_x("stage1")
    leaves = {"x": x, **dict(module.named_parameters())}
    everything = dict(zip(leaves, step(module, x)[1:], strict=True))
    for key, leaf in leaves.items():
        leaf.requires_grad_(key == wanted)
    out = module(x)
    (got,) = torch.autograd.grad(out, leaves[wanted], grad_of(out))
    assert torch.equal(got, everything[wanted])


def test_without_grad_it_is_the_same_call():
    module, x = make("stage1", save_output=True), make_x("stage1")
    with torch.no_grad():
        out = module(x)
    module.save_output = False
    with torch.no_grad():
        assert torch.equal(module(x), out)


def test_opcheck():
    module, x = make("two_branches", save_output=True), make_x("two_branches")
    with_grad = (x, *convolution_arguments(module), *se_weights(module), True)
    torch.library.opcheck(OP, with_grad)
    with torch.no_grad():
        plain = arguments(module, x.detach())
        out, pooled, attention = OP(*plain)
        for mask in ([True] * 7, [False] * 3 + [True] * 4, [True, False, True] + [False] * 4):
            torch.library.opcheck(
                BACKWARD,
                (out.sin(), *plain[:-1], out, pooled, attention, True, mask),
            )


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled(backend):
    torch._dynamo.reset()
    module = make("stride_2", dtype=torch.float64, save_output=True)
    x = make_x("stride_2", torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for got, expected in zip(step(compiled, x), step(module, x), strict=True):
        assert_near(got, expected)
    torch._dynamo.reset()


def test_compiled_autograd():
    torch._dynamo.reset()
    module = make("stride_2", dtype=torch.float64, save_output=True)
    x = make_x("stride_2", torch.float64)
    module.se.fc1.bias = module.se.fc2.bias = None
    expected = step(module, x)[1:]

    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        out = module(x)
        out.backward(grad_of(out))
    for leaf, value in zip([x, *module.parameters()], expected, strict=True):
        assert_near(leaf.grad, value)
    torch._dynamo.reset()


def test_frozen_parameters_leave_nothing_to_save():
    """The call without gradients, which also reads packed weights."""
    module = make("stage1", save_output=True).eval().requires_grad_(False)
    x = make_x("stage1").detach()
    expected = module(x)
    module.prepack(11, 56)
    assert torch.equal(module(x), expected)
    module._packed.view(torch.float32)[-400:] *= 2
    assert not torch.equal(module(x), expected)


def test_under_autocast():
    module, x = make("stage1", save_output=True), make_x("stage1")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
        module.save_output = False
        assert out.dtype == torch.bfloat16 and torch.equal(out, module(x))
    assert torch.autograd.grad(out.sum(), x)[0].dtype == torch.float32


def kept_by_the_graph(module, x) -> list[tuple[int, ...]]:
    """Shapes of what is saved for the backward pass."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
    ):
        module(x)
    return shapes


def test_no_map_of_a_branch_is_kept():
    """Only x (of another size here), the weights and the output are kept."""
    x = make_x("stride_2")
    kept = kept_by_the_graph(make("stride_2", save_output=True), x)
    assert (2, 128, 5, 7) in kept and (2, 32, 5, 7) not in kept
    assert kept_by_the_graph(make("stride_2"), x).count((2, 32, 5, 7)) == 4


def bytes_kept(layer, x) -> int:
    """What is saved for the backward pass besides x and the parameters."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x)
    for t in (x, *layer.parameters(), *layer.buffers()):
        storages.pop(t.untyped_storage().data_ptr(), None)
    del out
    return sum(storages.values())


def test_a_layer_that_keeps_its_input_shares_it():
    """The maps of the branches are gone when the forward pass is over."""
    module, x = make("stage1"), torch.randn(4, 64, 56, 56, requires_grad=True)
    layer = nn.Sequential(module, nn.BatchNorm2d(64))
    map_bytes = x.numel() * x.element_size()
    keeping = bytes_kept(layer, x)
    module.save_output = True
    saving = bytes_kept(layer, x)
    assert 2 * map_bytes <= keeping < 2.1 * map_bytes
    assert map_bytes <= saving < 1.1 * map_bytes


def test_a_change_of_the_output_in_place_is_an_error():
    module, x = make("stage1", save_output=True), make_x("stage1")
    out = module(x).relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    module.save_output = False  # the default is a drop-in
    module(x).relu_().sum().backward()


REFUSED = {
    "bias": (lambda m: setattr(m, "conv_2", nn.Conv2d(64, 16, 5, padding=2, groups=4)),
        r"conv_2 has a bias"),
    "conv_hook": (lambda m: m.conv_2.register_forward_hook(lambda *args: None),
        r"conv_2 has hooks"),
    "se_hook": (lambda m: m.se.fc1.register_forward_hook(lambda *args: None),
        r"se\.fc1 has hooks"),
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
@pytest.mark.filterwarnings("ignore:FusedPSAModule calls layers")
def test_layers_that_are_not_plain_are_refused(change):
    """The layers would keep the maps."""
    module, x = make("stage1", save_output=True), make_x("stage1")
    change, why = REFUSED[change]
    change(module)
    expects = "expects a CPU tensor, plain convolutions of one stride without bias and a plain SE"
    with pytest.raises(NotImplementedError, match=f"{expects}: {why}"):
        module(x)
    with torch.no_grad():  # nothing would be saved
        assert module(x).shape == (3, 64, 11, 56)
