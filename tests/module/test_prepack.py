"""Weights packed ahead for serving: equal results, and changed weights are noticed."""

import copy
import io

import pytest
import torch
from support.cases import FORMATS, name_of
from support.modules import CASES, arguments, build, image
from support.tolerance import assert_no_worse
from torch import nn
from torch.nn.utils.prune import l1_unstructured, remove

import epsa_fused
from epsa_fused import FusedPSAModule

PREPACK = torch.ops.epsa_fused.spc_prepack.default
OP = torch.ops.epsa_fused.psa_forward.default
NAMES = ("stage1", "stage2_first", "stage3", "stage4", "large", "a_branch_for_the_library")


def make(name="stage2_first", dtype=torch.float32) -> tuple[FusedPSAModule, torch.Tensor]:
    return build(name, dtype=dtype).eval(), image(name, dtype)


def exactly(module: FusedPSAModule, x: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(module).double()(x.double())


@torch.no_grad()
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits(name, dtype, memory_format):
    module, x = make(name, dtype)
    x = x.to(memory_format=memory_format)
    expected = module(x)
    for frozen in (True, False) if module._may_be_compared() else (True,):
        module.prepack(*x.shape[2:], frozen=frozen)
        assert torch.equal(module(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("size", (5, 7, 14, 20, 30))
def test_maps_of_another_size(size):
    module, _ = make("stage3")
    x = torch.randn(3, 256, size, size + 1)
    expected = module(x)
    module.prepack(14, 14, frozen=True)
    assert_no_worse(module(x), expected, exactly(module, x), terms=256 * 9)


@torch.no_grad()
@pytest.mark.parametrize(("packed_for", "used_for"), ((14, 3), (3, 14)))
def test_maps_for_which_another_method_is_planned(packed_for, used_for):
    """The packed weights decide: Winograd's method takes 3x3 kernels unless the map is small."""
    module, _ = make("stage3")
    x = torch.randn(3, 256, used_for, used_for)
    expected = module(x)
    module.prepack(packed_for, packed_for, frozen=True)
    actual = module(x)
    assert not torch.equal(actual, expected)
    assert_no_worse(actual, expected, exactly(module, x), terms=256 * 9)


@torch.no_grad()
def test_the_packed_weights_are_what_is_read():
    module, x = make()
    module.prepack(28, 28)
    before = module(x)
    mark(module._packed)
    assert not torch.allclose(module(x), before)
    assert torch.equal(module.unpack()(x), before)


@torch.no_grad()
def test_a_dilation_that_was_changed_since():
    """Winograd's weights cannot be used then. Those of other methods can."""
    module, x = make("stage3")
    module.prepack(14, 14, frozen=True)
    for i, kernel in enumerate((3, 5, 7, 9)):
        conv = getattr(module, f"conv_{i + 1}")
        conv.dilation, conv.padding = (2, 2), (kernel - 1, kernel - 1)
    with pytest.raises(ValueError, match=r"packed has method \d.*weights\[0\].*; prepack again"):
        module(x)
    assert torch.equal(module.prepack(14, 14, frozen=True)(x), module.unpack()(x))


@torch.no_grad()
def test_packed_bytes_are_those_of_the_weights_alone():
    """Bytes that were in the memory before do not show."""
    weights, settings = [torch.randn(32, 32, 3, 3)], ([1], 1, [1], [1])
    x = torch.empty(1, 32, 14, 14)
    packed = PREPACK(x, weights, *settings)
    for value in (0, 170, 255):
        used = [torch.full_like(packed, value) for _ in range(4)]
        del used  # the allocator may reuse this memory in the next call
        assert torch.equal(PREPACK(x, weights, *settings), packed)


def replace_layer(module):
    module.conv_1 = copy.deepcopy(module.conv_1)
    module.conv_1.weight.data.mul_(2)


def replace_parameter(module):
    module.conv_1.weight = nn.Parameter(module.conv_1.weight * 2)


def replace_parameter_by_its_data(module):
    """The same address. The version begins anew, and meets the old one after a change."""
    module.conv_1.weight = nn.Parameter(module.conv_1.weight.data)
    change_in_place(module)


def replace_data(module):
    module.conv_1.weight.data = module.conv_1.weight.data * 2


def swap_tensors(module):
    torch.utils.swap_tensors(module.conv_1.weight, nn.Parameter(module.conv_1.weight * 2))


def change_in_place(module):
    with torch.no_grad():
        module.conv_1.weight.mul_(2)


def change_in_inference_mode(module):
    with torch.inference_mode():
        module.conv_1.weight.mul_(2)


def change_through_data(module):
    module.conv_1.weight.data.mul_(2)


def average_through_data(module):
    """A mean teacher's step."""
    for parameter in module.parameters():
        parameter.data.mul_(0.9).add_(torch.ones_like(parameter), alpha=0.1)


def change_one_bit_through_numpy(module):
    bits = module.conv_1.weight.detach().numpy().reshape(-1).view("uint32")
    bits[-1] ^= 1 << 30


def swap_two_weights_through_numpy(module):
    weights = module.conv_2.weight.detach().numpy().reshape(-1)
    weights[[3, -5]] = weights[[-5, 3]]


def turn_strides(module):
    """The same bytes, read in another order."""
    weight = module.conv_1.weight.data
    turned = weight.transpose(2, 3)
    module.conv_1.weight.data = turned


def change_through_dlpack(module):
    torch.from_dlpack(module.conv_1.weight.detach()).data.mul_(2)


def copy_from_a_vector(module):
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector * 2, module.parameters())


def load_the_layer(module):
    module.conv_1.load_state_dict({"weight": module.conv_1.weight.detach() * 2})


def load_the_layer_by_assignment(module):
    state = {"weight": module.conv_1.weight.detach() * 2}
    module.conv_1.load_state_dict(state, assign=True)


def initialise(module):
    nn.init.ones_(module.conv_1.weight)


def step(optimizer, **options):
    def take_a_step(module):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(module.parameters(), lr=0.1, **options).step()

    take_a_step.__name__ = "_".join((optimizer.__name__, *options))
    return take_a_step


def average_the_model(module):
    average = torch.optim.swa_utils.AveragedModel(module)
    change_in_place(average.module)
    module.conv_1.weight.data.copy_(average.module.conv_1.weight)


def prune(module):
    l1_unstructured(module.conv_1, "weight", 0.5)
    remove(module.conv_1, "weight")


def parametrize(module):
    class Twice(nn.Module):
        def forward(self, weight):
            return weight * 2

    nn.utils.parametrize.register_parametrization(module.conv_1, "weight", Twice())


CHANGES = (
    replace_layer,
    replace_parameter,
    replace_parameter_by_its_data,
    replace_data,
    swap_tensors,
    change_in_place,
    change_in_inference_mode,
    change_through_data,
    average_through_data,
    change_one_bit_through_numpy,
    swap_two_weights_through_numpy,
    turn_strides,
    change_through_dlpack,
    copy_from_a_vector,
    load_the_layer,
    load_the_layer_by_assignment,
    initialise,
    step(torch.optim.SGD),
    step(torch.optim.SGD, fused=True),
    step(torch.optim.Adam, fused=True),
    step(torch.optim.AdamW, fused=True),
    step(torch.optim.Adagrad, fused=True),
    step(torch.optim.AdamW, foreach=True),
    average_the_model,
    prune,
    parametrize,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_weights_are_noticed(change):
    module, x = make()
    with torch.no_grad():
        before = module(x)
    module.prepack(28, 28)
    change(module)
    with torch.no_grad():
        out = module(x)
        assert module._packed is not None
        assert not torch.equal(out, before)
        assert torch.equal(out, module.unpack()(x))


def compared(module, size):
    """Packs for calls that compare the weights, also if there are too many for that to pay."""
    x = torch.empty(1, module.conv_1.in_channels, size, size)
    module._packed = PREPACK(x, *arguments(module, x)[1:6])
    return module


def mark(packed):
    """Change what packed weights compute, so that outputs tell whether they were used."""
    packed.view(torch.float32)[-400:] *= 2


@torch.no_grad()
def test_equal_weights_are_served_wherever_they_are():
    """A copy has the same bytes. A weight that is changed back needs no second packing."""
    module, x = make()
    mark(module.prepack(28, 28)._packed)
    marked = module(x)
    twin = copy.deepcopy(module)
    twin._packed = module._packed
    assert torch.equal(twin(x), marked)
    module.conv_1.weight.data.neg_()
    assert not torch.equal(module(x), marked)
    module.conv_1.weight.data.neg_()
    assert torch.equal(module(x), marked)


@torch.no_grad()
def test_a_bit_anywhere_is_noticed():
    """Large weights are read in pieces, by several threads."""
    module, x = make("stage4")
    mark(compared(module, 7)._packed)
    marked = module(x)
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        bits = getattr(module, f"conv_{i % 4 + 1}").weight.view(-1).view(torch.int32)
        place = (
            int(torch.randint(len(bits), (), generator=generator)) if i >= 8 else (0, -1)[i // 4]
        )
        bit = int(torch.randint(31, (), generator=generator))
        bits[place] ^= 1 << bit
        assert not torch.equal(module(x), marked), (i, place, bit)
        bits[place] ^= 1 << bit
        assert torch.equal(module(x), marked), (i, place, bit)


@torch.no_grad()
@pytest.mark.parametrize("threads", (1, 2))
def test_weights_of_any_strides(threads):
    """Every second channel of a larger tensor, and channels last."""
    module, x = make("stage4")
    torch.set_num_threads(threads)
    weight = module.conv_1.weight
    weight.data = torch.randn(weight.shape[0], 2 * weight.shape[1], 3, 3)[:, ::2]
    module.conv_2.weight.data = module.conv_2.weight.data.to(memory_format=torch.channels_last)
    expected = module(x)
    compared(module, 7)
    assert torch.equal(module(x), expected)
    mark(module._packed)
    marked = module(x)
    assert not torch.equal(marked, expected)
    weight.data[0, 0, 0, 0] += 1
    assert not torch.equal(module(x), marked)


# ---- frozen: a promise in place of the comparison ----

LEAVE_NO_VERSION = {
    "change_through_data",
    "average_through_data",
    "average_the_model",
    "change_one_bit_through_numpy",
    "swap_two_weights_through_numpy",
    "change_through_dlpack",
    "SGD_fused",
    "Adam_fused",
    "AdamW_fused",
    "Adagrad_fused",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_frozen_weights_that_were_changed(change):
    """Changes that leave a version or move the weights are noticed. The promise is that there are
    no others; the documentation says that they are not."""
    module, x = make()
    module.prepack(28, 28, frozen=True)
    change(module)
    with torch.no_grad():
        out = module(x)
        assert module._packed is not None
        noticed = torch.equal(out, module.unpack()(x))
    assert noticed == (change.__name__ not in LEAVE_NO_VERSION)


def test_frozen_weights_have_versions():
    """A computed weight is another tensor in each call, perhaps at the same address."""
    module, _ = make()
    torch.nn.utils.parametrizations.weight_norm(module.conv_2)
    with pytest.raises(RuntimeError, match=r"expects parameters .* conv_2.weight that is computed"):
        module.prepack(28, 28, frozen=True)
    with torch.inference_mode():
        module, x = make()
        with pytest.raises(RuntimeError, match=r"conv_1.weight that torch.inference_mode made"):
            module.prepack(28, 28, frozen=True)
        assert torch.equal(module.prepack(28, 28)(x), module.unpack()(x))
    assert module._packed is None


@torch.no_grad()
def test_frozen_weights_that_are_parametrised_later():
    module, x = make()
    module.prepack(28, 28, frozen=True)
    torch.nn.utils.parametrizations.weight_norm(module.conv_2)
    for _ in range(5):
        module.conv_2.parametrizations.weight.original0.mul_(1.5)
        packed, module._packed = module._packed, None
        expected = module(x)
        module._packed = packed
        assert torch.equal(module(x), expected)


def test_many_weights_are_packed_only_if_frozen():
    module, _ = make("stage3")
    with pytest.raises(
        ValueError, match=r"at most 262144 weights, or frozen=True, got 433152 weights"
    ):
        module.prepack(14, 14)
    assert module._packed is None
    assert module.prepack(14, 14, frozen=True)._packed is not None


@torch.no_grad()
def test_parameters_given_to_functional_call_are_used():
    module, x = make()
    module.prepack(28, 28)
    others = {n: p * 2 for n, p in module.named_parameters()}
    out = torch.func.functional_call(module, others, (x,))
    assert torch.equal(out, torch.func.functional_call(module.unpack(), others, (x,)))
    assert not torch.allclose(out, module(x))


def test_a_call_that_may_ask_for_gradients_reads_the_weights():
    module, x = make()
    module.prepack(28, 28)
    with torch.no_grad():
        module.conv_1.weight.mul_(2)
    with_grad = module(x)
    assert with_grad.requires_grad
    assert torch.equal(with_grad.detach(), module.unpack()(x).detach())


def undo_by_loading_a_parent(module):
    parent = nn.Sequential(module)
    parent.load_state_dict(copy.deepcopy(parent.state_dict()))


@pytest.mark.parametrize(
    "undo",
    (
        FusedPSAModule.unpack,
        FusedPSAModule.train,
        lambda m: nn.Sequential(m).train(),
        lambda m: m.load_state_dict(m.state_dict()),
        undo_by_loading_a_parent,
        FusedPSAModule.double,
        lambda m: nn.Sequential(m).to(torch.bfloat16),
    ),
    ids=("unpack", "train", "train_parent", "load", "load_parent", "double", "cast_parent"),
)
def test_undone(undo):
    module, _ = make()
    module.prepack(28, 28)
    assert "prepacked" in module.extra_repr()
    undo(module)
    assert module._packed is None and "prepacked" not in module.extra_repr()


def test_eval_keeps_it():
    module, _ = make()
    module.prepack(28, 28).eval()
    assert module._packed is not None


def test_copies_and_files_leave_it_out():
    module, x = make()
    keys = list(module.state_dict())
    module.prepack(28, 28)
    assert list(module.state_dict()) == keys
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert other._packed is None
        with torch.no_grad():
            assert torch.equal(other(x), module(x))
    assert module._packed is not None


@torch.no_grad()
def test_under_autocast_the_cast_weights_are_packed_by_the_call():
    module, x = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(x)
        module.prepack(28, 28)
        assert torch.equal(module(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("frozen", (False, True))
def test_compiled(frozen):
    module, x = make()
    expected = module(x)
    module.prepack(28, 28, frozen=frozen)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    module.unpack()
    module.conv_1.weight.mul_(2)
    assert torch.equal(compiled(x), module(x))


def test_an_exported_program_has_no_packed_weights(tmp_path):
    """Packed weights belong to this process alone."""
    module, x = make()
    with torch.no_grad():
        expected = module(x)
    module.prepack(28, 28)
    program = torch.export.export(module, (x,))
    assert not program.constants
    torch.export.save(program, tmp_path / "program.pt2")
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "program.pt2").module()(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ("stage3", "stage4"))
def test_more_samples_than_one_wave_holds(name):
    module, _ = make(name)
    _, height, width = CASES[name].x
    x = torch.randn(22, CASES[name].inplans, height, width)
    expected = module(x)
    assert torch.equal(module.prepack(height, width, frozen=True)(x), expected)


@torch.no_grad()
def test_opcheck_with_packed_weights():
    module, x = make()
    given = arguments(module, x)
    torch.library.opcheck(OP, (*given, PREPACK(*given[:6])))


# ---- a whole model ----


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = FusedPSAModule(16, 64, conv_groups=(1, 2, 4, 8), stride=2)
        self.second = FusedPSAModule(64, 64)
        self.unused = FusedPSAModule(64, 64)

    def forward(self, x):
        return self.second(self.first(x))


@torch.no_grad()
def test_a_model():
    torch.manual_seed(0)
    model, x = Network().eval(), torch.randn(2, 16, 20, 14)
    expected = model(x)
    assert epsa_fused.prepack(model, x) is model
    packed = [m._packed is not None for m in (model.first, model.second, model.unused)]
    assert packed == [True, True, False]
    assert not model.first._forward_pre_hooks
    assert torch.equal(model(x), expected)
    assert epsa_fused.unpack(model) is model
    assert model.first._packed is None and model.second._packed is None


@pytest.mark.parametrize("error", (ValueError, KeyboardInterrupt))
def test_after_an_error_no_module_is_packed(error, monkeypatch):
    model, x = Network().eval(), torch.randn(2, 16, 20, 14)

    def fails(*size, frozen):
        assert model.first._packed is not None
        raise error

    monkeypatch.setattr(model.second, "prepack", fails)
    with pytest.raises(error):
        epsa_fused.prepack(model, x)
    assert model.first._packed is None


def test_a_model_in_training_mode_is_not_called():
    model = nn.Sequential(nn.BatchNorm2d(16), FusedPSAModule(16, 64, conv_groups=(1, 2, 4, 8)))
    model[1].eval()
    with pytest.raises(RuntimeError, match="expected a model in eval mode, got one in training"):
        epsa_fused.prepack(model, torch.randn(1, 16, 8, 8))
    assert model[1]._packed is None and not model[0].running_mean.any()
    with pytest.raises(RuntimeError, match="expected eval mode, got training mode"):
        model[1].train().prepack(8, 8)


@torch.no_grad()
def test_a_compiled_model_that_ran():
    torch._dynamo.reset()
    model, x = Network().eval(), torch.randn(2, 16, 20, 14)
    compiled = torch.compile(model, backend="aot_eager")
    expected = compiled(x)
    epsa_fused.prepack(compiled, x)
    assert model.first._packed is not None
    assert torch.equal(compiled(x), expected)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_model_that_is_called_by_keywords():
    class Keywords(Network):
        def forward(self, *, images):
            return self.second(x=self.first(x=images))

    model, x = Keywords().eval(), torch.randn(2, 16, 20, 14)
    expected = model(images=x)
    epsa_fused.prepack(model, images=x)
    assert model.second._packed is not None and torch.equal(model(images=x), expected)


def test_a_model_with_many_weights():
    """Comparing costs less than packing for the first module alone."""
    small = FusedPSAModule(16, 256, conv_groups=(1, 4, 8, 16))
    model = nn.Sequential(small, FusedPSAModule(256, 256)).eval()
    x = torch.randn(1, 16, 5, 5)
    for frozen in (False, True):
        epsa_fused.prepack(model, x, frozen=frozen)
        assert [m._packed is not None for m in model] == [True, frozen]
        epsa_fused.unpack(model)
    with pytest.raises(ValueError, match=r"expected frozen=True, or a module of at most 262144"):
        epsa_fused.prepack(model[1], torch.randn(1, 256, 5, 5))
    with pytest.raises(TypeError, match="prepack: frozen: expected a bool, got 'yes'"):
        epsa_fused.prepack(model, x, frozen="yes")


def test_a_model_without_fused_modules():
    with pytest.raises(ValueError, match=r"expected a model whose call reaches a FusedPSAModule"):
        epsa_fused.prepack(nn.Conv2d(3, 4, 1).eval(), torch.randn(1, 3, 8, 8))


# ---- errors ----


def test_a_module_with_hooks_is_refused():
    module, _ = make()
    module.conv_2.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match="expected plain convolutions"):
        module.prepack(28, 28)


def test_nothing_to_pack_for_float64():
    module, _ = make(dtype=torch.float64)
    with pytest.raises(ValueError, match=r"at least one convolution .* got none of 4"):
        module.prepack(28, 28)
    assert module._packed is None


@pytest.mark.parametrize(
    ("size", "message"), [((0, 4), "height: .* 1, got 0"), ((4, -1), "width: .* 1, got -1")]
)
def test_sizes_that_are_none(size, message):
    module, _ = make()
    with pytest.raises(ValueError, match=message):
        module.prepack(*size)


@torch.no_grad()
def test_bytes_of_something_else():
    module, x = make()
    _, *convolutions = arguments(module, x)
    convolutions, se = convolutions[:5], convolutions[5:]
    packed = PREPACK(x, *convolutions)

    def refused(message, packed, x=x, convolutions=convolutions):
        with pytest.raises(ValueError, match=message):
            OP(x, *convolutions, *se, packed)

    refused(r"packed has shape \[100\] and stride \[1\], expected the bytes", packed[:100])
    refused(r"packed has .* stride \[2\], expected the bytes", packed.repeat(2)[::2])
    refused(r"modulo 64, expected 0", torch.cat([packed[:8], packed])[8:])
    refused("does not hold what spc_prepack returned", torch.zeros_like(packed))
    refused(rf"packed has {len(packed) - 4} bytes, expected {len(packed)}", packed[:-4])
    method, block = packed.clone(), packed.clone()
    method[40] = 77
    refused(r"packed has method 77, blocks of \d and \d columns for weights\[0\]", method)
    block[44] = 77
    refused(r"packed has method 0, blocks of 77 and 0 columns for weights\[0\]", block)
    branches = packed.clone()
    branches[16:20] = torch.tensor([0, 0, 1, 0], dtype=torch.uint8)
    refused("packed was made for .* expected .*; prepack again", branches)
    # other convolutions: another dtype, another kernel
    low = ([w.bfloat16() for w in convolutions[0]], *convolutions[1:])
    refused("made for .* Float, .* expected .* BFloat16, .*", packed, x.bfloat16(), low)
    weights = [torch.randn(32, 128, 5, 5), *convolutions[0][1:]]
    other = (weights, convolutions[1], 2, [2, 2, 3, 4], [1] * 4)
    refused("made for .* 3x3 of 1 groups, .* expected .* 5x5 of 1 groups", packed, x, other)
