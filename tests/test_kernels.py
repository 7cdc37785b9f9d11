"""The CPU kernels under sanitizers, for each instruction set that this machine runs."""

import re

import pytest
from support import cpu_cases

# what a program says before its summary, and a number that its cases exceed
EXPECTED = {"attention": ("", 10000), "conv": (r"{isa}: \d+ left to the library", 1000)}


@pytest.fixture(scope="module", params=EXPECTED)
def noun(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def programs(noun, tmp_path_factory):
    return cpu_cases.programs(noun, tmp_path_factory.mktemp(noun))


@pytest.mark.parametrize("isa", cpu_cases.ISAS)
def test_case_table(programs, noun, isa, monkeypatch):
    words, least = EXPECTED[noun]
    count, rest = cpu_cases.run(programs, isa, monkeypatch)
    assert re.fullmatch(words.format(isa=isa), rest)
    assert count > least
