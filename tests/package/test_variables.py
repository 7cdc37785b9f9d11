"""The table of environment variables in docs/install.md."""

import re

from support.pages import PAGES
from support.paths import ROOT

READ = re.compile(r"""(?:getenv|environ(?:\.get|\.setdefault)?)[(\[]["'](EPSA_[A-Z_]+)["']""")
# Sources that read a variable by a name put together, or by a function of their own.
INDIRECT = {"EPSA_SIMT_MODE", "EPSA_SIMT_SEED", "EPSA_SIMT_RESIDENT"}


def test_it_has_every_variable_that_a_source_reads():
    read = set(INDIRECT)
    for folder in ("csrc", "epsa_fused", "scripts", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".cpp", ".h", ".inc", ".cu", ".cuh"):
                read |= set(READ.findall(path.read_text()))
    read |= set(READ.findall((ROOT / "setup.py").read_text()))
    assert {"EPSA_CPU_ISA", "EPSA_CUDA", "EPSA_TEST_EMULATED"} <= read
    rows = re.findall("^[|] (`[A-Z].*?) [|]", PAGES["docs/install.md"], re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(EPSA_\w+)`", row)}
    assert listed == read
