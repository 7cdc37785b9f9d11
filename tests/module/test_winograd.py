"""Winograd's method turned off: values, plans, packed weights; for the process and one module."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from support.modules import arguments, build, image
from support.processes import run_code

import epsa_fused
from epsa_fused import _C, FusedPSAModule
from epsa_fused.functional import spc_conv

CONV = torch.ops.epsa_fused.spc_conv.default
FORWARD = torch.ops.epsa_fused.psa_forward.default
SAVE_OUTPUT = torch.ops.epsa_fused.psa_save_output.default


@pytest.fixture(autouse=True)
def as_before():
    before = epsa_fused.winograd_allowed()
    yield
    epsa_fused.set_winograd(before)


def infinite_weight(channels=32, size=12):
    """x and a 3x3 weight with one infinity: Winograd's transforms subtract it from itself."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, size, size, generator=generator)
    weight = torch.randn(channels, channels, 3, 3, generator=generator)
    weight[0, 0, 1, 1] = float("inf")
    return x, weight


def conv(x, weight, **options):
    return spc_conv(x, [weight], [1], padding=[1], **options)[0][0]


def plan(**options):
    return _C.conv_plan(
        in_channels=32, out_channels=32, groups=1, kernel=(3, 3), height=12, width=12, padding=1,
        **options,
    )["method"]  # fmt: skip


def test_the_plan():
    assert (plan(), plan(winograd=True), plan(winograd=False)) == (
        "winograd",
        "winograd",
        "broadcast",
    )


def test_an_infinite_weight_stays_infinite_without():
    """Where conv2d gives an infinity, so does the direct method; Winograd's gives NaN."""
    x, weight = infinite_weight()
    expected = torch.conv2d(x, weight, padding=1)
    assert not expected.isnan().any()
    torch.testing.assert_close(conv(x, weight, winograd=False), expected, atol=1e-4, rtol=1e-4)
    assert conv(x, weight, winograd=True).isnan().any()


def test_small_values_beside_large_ones():
    """The weight copies x. Winograd's transforms add the large value to its neighbours first."""
    x, weight = infinite_weight()
    weight.zero_()
    weight[range(32), range(32), 1, 1] = 1
    x[0, :, 5, 5] = 1e7
    neighbours = (slice(None), slice(None), slice(4, 7), slice(4, 5))

    def error(winograd):
        return (conv(x, weight, winograd=winograd) - x)[neighbours].abs().max()

    assert error(False) == 0
    assert error(True) > 0.1


def test_the_gradient_of_x():
    """It is a convolution, too, and so it obeys."""
    x, weight = infinite_weight()
    grads = {}
    for winograd in (True, False):
        leaf = x.clone().requires_grad_()
        conv(leaf, weight, winograd=winograd).sum().backward()
        grads[winograd] = leaf.grad
    leaf = x.clone().requires_grad_()
    torch.conv2d(leaf, weight, padding=1).sum().backward()
    assert not leaf.grad.isnan().any() and not grads[False].isnan().any()
    assert grads[True].isnan().any()


@pytest.mark.parametrize("save_output", (False, True))
@pytest.mark.parametrize("grad", (False, True))
def test_a_module_and_the_process(grad, save_output):
    module, x = build("stage3").eval(), image("stage3")
    module.save_output = save_output
    torch.set_grad_enabled(grad)
    try:
        results = {}
        for process in (True, False):
            epsa_fused.set_winograd(process)
            for own in (None, True, False):
                module.winograd = own
                results[process, own] = module(x).detach()
    finally:
        torch.set_grad_enabled(True)
    used, left = results[True, True], results[False, False]
    assert not torch.equal(used, left)
    for (process, own), out in results.items():
        assert torch.equal(out, used if (process if own is None else own) else left), (process, own)


def test_the_gradients_of_a_module():
    """save_output computes them by an operator of its own, with the same setting."""
    module, x = build("stage3").eval(), image("stage3").requires_grad_()

    def gradient(winograd, save_output):
        module.winograd, module.save_output = winograd, save_output
        return torch.autograd.grad(module(x).square().sum(), x)[0]

    for save_output in (False, True):
        used, left = (gradient(winograd, save_output) for winograd in (True, False))
        assert not torch.equal(used, left)
        torch.testing.assert_close(used, left, atol=1e-4, rtol=1e-4)


def test_the_operators_default_is_on():
    """Programs that were exported by older versions do not give the argument."""
    module, x = build("stage3").eval(), image("stage3")
    with torch.no_grad():
        given = arguments(module, x)
        assert torch.equal(FORWARD(*given), FORWARD(*given, None, True))
        assert torch.equal(SAVE_OUTPUT(*given)[0], SAVE_OUTPUT(*given, True)[0])
        assert torch.equal(CONV(*given[:6])[0][0], CONV(*given[:6], True)[0][0])
        assert not torch.equal(FORWARD(*given), FORWARD(*given, None, False))


@torch.no_grad()
def test_opcheck():
    module, x = build("stage3").eval(), image("stage3")
    given = arguments(module, x)
    torch.library.opcheck(FORWARD, (*given, None, False))
    torch.library.opcheck(CONV, (*given[:6], False))


@torch.no_grad()
@pytest.mark.parametrize("frozen", (False, True))
def test_packed_weights_of_the_method_are_left_out(frozen):
    module, x = build("stage2").eval(), image("stage2")
    module.winograd = False
    expected = module(x)
    module.winograd = None
    used = module(x)
    module.prepack(28, 28, frozen=frozen)
    assert torch.equal(module(x), used)
    module.winograd = False
    assert torch.equal(module(x), expected)
    packed = module.prepack(28, 28, frozen=frozen)._packed
    packed.view(torch.float32)[-400:] *= 2
    assert not torch.allclose(module(x), expected)  # packed without the method, and read


def test_compiled():
    module, x = build("stage3").eval(), image("stage3")
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for process in (True, False, True):
            epsa_fused.set_winograd(process)
            assert torch.equal(compiled(x), module(x))
    torch._dynamo.reset()


def test_an_exported_program_keeps_the_choice():
    module, x = build("stage3").eval(), image("stage3")
    epsa_fused.set_winograd(False)
    with torch.no_grad():
        expected = module(x)
        program = torch.export.export(module, (x,)).module()
        epsa_fused.set_winograd(True)
        assert torch.equal(program(x), expected)
        assert not torch.equal(module(x), expected)


def test_it_is_shown_and_copied():
    module = FusedPSAModule(64, 64, winograd=False)
    assert "winograd=False" in repr(module)
    assert "winograd" not in repr(FusedPSAModule(64, 64))
    assert copy.deepcopy(module).winograd is False


@pytest.mark.parametrize(("value", "code"), (("0", 0), ("1", 0), ("off", 1)))
def test_the_environment(value, code):
    command = "import epsa_fused; print(epsa_fused.winograd_allowed())"
    run = subprocess.run(
        [sys.executable, "-c", command],
        env=os.environ | {"EPSA_WINOGRAD": value},
        capture_output=True,
        text=True,
    )
    assert run.returncode == code
    if code:
        assert run.stderr.endswith("ValueError: EPSA_WINOGRAD: expected 0 or 1, got 'off'\n")
    else:
        assert run.stdout.strip() == str(value == "1")


def test_a_wrong_environment_gives_no_result_but_another_choice_does():
    code = """if True:
        import torch, epsa_fused
        x = torch.randn(1, 64, 5, 5)
        epsa_fused.FusedPSAModule(64, 64, winograd=False)(x)
        try:
            epsa_fused.FusedPSAModule(64, 64)(x)
        except ValueError as error:
            print(error)
        epsa_fused.set_winograd(True)
        epsa_fused.FusedPSAModule(64, 64)(x)
    """
    assert run_code(code, EPSA_WINOGRAD="2") == "EPSA_WINOGRAD: expected 0 or 1, got '2'\n"


@pytest.mark.parametrize("value", (1, "no", None))
def test_values_that_are_no_flag(value):
    with pytest.raises(TypeError, match="set_winograd: allowed: expected a bool, got"):
        epsa_fused.set_winograd(value)
    if value is not None:
        with pytest.raises(TypeError, match="winograd: expected a bool, got"):
            FusedPSAModule(64, 64, winograd=value)
        with pytest.raises(TypeError, match="winograd: expected a bool, got"):
            conv(*infinite_weight(), winograd=value)
        module = FusedPSAModule(64, 64)
        module.winograd = value
        with pytest.raises(TypeError, match="winograd: expected a bool, got"):
            module(torch.ones(1, 64, 5, 5))
        with pytest.raises(TypeError, match="winograd: expected a bool, got"):
            epsa_fused.winograd_allowed(value)
