"""The attention's kernels under sanitizers, for each instruction set that this machine runs."""

import pytest
from support import cpu_cases


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return cpu_cases.programs("attention", tmp_path_factory.mktemp("attention"))


@pytest.mark.parametrize("isa", cpu_cases.ISAS)
def test_case_table(programs, isa, monkeypatch):
    count, rest = cpu_cases.run(programs, isa, monkeypatch)
    assert rest == ""
    assert count > 10000
