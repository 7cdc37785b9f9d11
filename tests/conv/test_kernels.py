"""The convolutions' kernels under sanitizers, for each instruction set that this machine runs."""

import re

import pytest
from support import cpu_cases


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return cpu_cases.programs("conv", tmp_path_factory.mktemp("conv"))


@pytest.mark.parametrize("isa", cpu_cases.ISAS)
def test_case_table(programs, isa, monkeypatch):
    count, rest = cpu_cases.run(programs, isa, monkeypatch)
    assert re.fullmatch(rf"{isa}: \d+ left to the library", rest)
    assert count > 1000
