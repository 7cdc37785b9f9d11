"""`python -m epsa_fused`: what was built, what runs, and a self-check."""

import re

import torch
from support.processes import python

from epsa_fused import _C


def test_it_reports_the_build_and_checks_itself():
    output = python("-m", "epsa_fused")
    for isa in _C.build_info()["cpu_isas"]:
        assert isa in output
    assert torch.__version__ in output
    assert re.search(r"\d(\.\d+)?e-\d\d", output), f"no errors of the self-check in:\n{output}"
