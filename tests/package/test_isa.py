"""The CPU kernels exist once per instruction set: each one that this machine runs is tested.

The instruction set is chosen once per process, from EPSA_CPU_ISA, so the tests of every other
one run in a process of their own.
"""

import re

import pytest
import torch
from support.cases import HALF_DTYPES, PLAIN_LAYOUTS, Layout, name_of
from support.isa import (
    BFLOAT16_ALONE,
    NEEDS,
    cpu_flags,
    is_intel,
    isa_of_a_process,
    runs_here,
)
from support.paths import TESTS
from support.processes import python

from epsa_fused import _C

OP = torch.ops.epsa_fused.psa_attention.default

# ---- instruction sets ----


@pytest.mark.parametrize("isa", _C.build_info()["cpu_isas"])
def test_every_test_of_the_kernels_passes(isa):
    if not runs_here(isa):
        pytest.skip(f"this machine's CPU has no {isa}")
    if isa == _C.cpu_isa():
        return  # the rest of this run has tested it
    # The other files take seconds to collect.
    files = [str(path) for path in TESTS.rglob("test_*.py") if "per_isa" in path.read_text()]
    least = 1000
    if isa in BFLOAT16_ALONE:
        files, least = ["-k", "bfloat16 or pairs", *files], 150
    output = python(
        *("-m", "pytest", "-p", "no:cacheprovider", "-m", "per_isa and not slow", *files),
        timeout=900,
        EPSA_CPU_ISA=isa,
    )
    assert f"CPU kernels {isa} of" in output, output
    assert int(re.search(r"(\d+) passed", output)[1]) > least, output


def test_the_best_instruction_set_is_chosen():
    built, flags = _C.build_info()["cpu_isas"], cpu_flags()
    if not flags:
        pytest.skip("no /proc/cpuinfo to compare with")
    # Intel's products of pairs are no faster than those of floats.
    best = [i for i in built if runs_here(i) and not (i == "avx512_bf16" and is_intel())][-1]
    assert isa_of_a_process("") == best
    for isa in built:
        # Linux may withhold the tiles of AMX, which the flags do not tell.
        withheld = isa == "amx_bf16" and not runs_here(isa)
        assert runs_here(isa) == (NEEDS[isa] <= flags) or withheld


@pytest.mark.parametrize("wrong", ("AVX2", "sse2"))
def test_an_unknown_instruction_set_is_refused(wrong):
    """The operator refuses it too, and names the usable ones."""
    code = """if True:
        import torch
        from epsa_fused import _C, psa_attention
        def call():
            psa_attention([torch.ones(1, 2, 2, 2)] * 2, torch.ones(1, 2), None,
                          torch.ones(2, 1), None)
        for function in (_C.cpu_isa, call, call):
            try:
                function()
            except RuntimeError as error:
                print(error)
    """
    lines = python("-c", code, EPSA_CPU_ISA=wrong).splitlines()
    usable = ", ".join(filter(runs_here, _C.build_info()["cpu_isas"]))
    expected = f"EPSA_CPU_ISA: expected one of {{{usable}}}"
    assert len([line for line in lines if expected in line and f"got '{wrong}'" in line]) == 3


# ---- 16-bit formats: all 65536 patterns ----


def all_numbers(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def call(maps: list[torch.Tensor], layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """out (of the first branch) and attention of C maps that hold the numbers in any order.

    `pooled` is given, so that a NaN among the numbers stays where it is, and random, so that the
    attention differs from channel to channel.
    """
    branches, (_, channels, _, _) = len(maps), maps[0].shape
    if layout.out_format == torch.channels_last:
        maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    fc1 = torch.randn(2, channels) * channels**-0.5
    fc2 = torch.randn(channels, 2) * 2
    pooled = torch.randn(1, branches, channels)
    out, _, attention = OP(maps, fc1, None, fc2, None, False, pooled)
    return out[:, :channels], attention[:, 0, :, None, None]


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but for the payloads of NaNs."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(
        a[~nan].view(torch.int16), b[~nan].view(torch.int16)
    )


# 17 planes of 67 x 61 hold all numbers, and no size is a multiple of a vector
SHAPE = (1, 17, 67, 61)


@pytest.mark.per_isa
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
def test_results_are_rounded_as_torch_rounds(dtype, layout):
    """out is the product in float32, rounded as PyTorch rounds it. Inputs are all numbers,
    subnormal ones and infinities too, times different attentions."""
    numbers = all_numbers(dtype)
    for shift in range(4):
        values = numbers.roll(shift * 9973).repeat(2)[: 17 * 67 * 61].view(SHAPE)
        out, attention = call([values] * 3, layout)
        assert same_numbers(out, (values.float() * attention).to(dtype))


@pytest.mark.per_isa
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
def test_every_16_bit_number_is_read_exactly(dtype, layout):
    """The mean of one pixel is that pixel."""
    values = all_numbers(dtype).view(1, -1, 1, 1)
    zeros = [torch.zeros(1, values.shape[1]), None, torch.zeros(values.shape[1], 1), None]
    _, pooled, _ = OP([values, values], *zeros, True)
    expected = values.flatten().float()
    assert torch.equal(pooled[0, 1].isnan(), expected.isnan())
    assert torch.equal(pooled[0, 1].nan_to_num(), expected.nan_to_num())


@pytest.mark.per_isa
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
def test_ties_round_to_even(dtype, layout):
    """With zero weights the attention of two branches is 1/2 exactly, and half of a subnormal
    number may lie in the middle between two others. (The test above meets ties of normal numbers
    by chance: one product in 2^13 of float16, in 2^16 of bfloat16.)"""
    values = all_numbers(dtype).repeat(2)[: 17 * 67 * 61].view(SHAPE)
    if layout.out_format == torch.channels_last:
        values = values.contiguous(memory_format=torch.channels_last)
    zeros = [torch.zeros(1, 17), None, torch.zeros(17, 1), None]
    out, _, attention = OP([values, values], *zeros, True, torch.zeros(1, 2, 17))
    assert (attention == 0.5).all()
    expected = (values.float() / 2).to(dtype).repeat(1, 2, 1, 1)
    assert same_numbers(out, expected)
