"""Compiled and frozen models: what their code takes for granted, and machines without compilers."""

import inspect
import re

import numpy as np
import pytest
import torch
from support.inference import Net, assert_as_good_as_the_model, images, with_statistics
from support.processes import run_code
from torch import nn

from epsa_fused import optimize_for_inference
from epsa_fused.inference.compiled import _own_function


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


def test_each_compiled_function_has_code_of_its_own():
    """And a source file: torch before 2.13 gives all functions without one the same code."""
    one, other = (_own_function(nn.Identity()) for _ in range(2))
    assert one.__code__ is not other.__code__
    assert inspect.getsourcefile(one)


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
