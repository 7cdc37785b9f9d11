"""Where optimize_for_inference() says that bfloat16 gains no speed.

The instruction set is chosen once per process, so each one has a process of its own.
"""

import json

import pytest
from support.isa import BFLOAT16_ALONE, runs_here
from support.paths import TESTS
from support.processes import python

from epsa_fused import _C

REPORTS = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
from support.inference import Net, images, with_statistics
from epsa_fused import optimize_for_export, optimize_for_inference
from torch import nn

def report(model, dtype=None):
    return str(optimize_for_inference(model, images(), dtype=dtype, compile=False).report)

net, plain = with_statistics(Net()), nn.Sequential(nn.Conv2d(3, 8, 3)).eval()
print(json.dumps({
    "float32": report(net),
    "float32 to bfloat16": report(net, torch.bfloat16),
    "without PSA": report(plain, torch.bfloat16),
    "export": str(optimize_for_export(net, images(), dtype=torch.bfloat16).report),
    "bfloat16": report(net.bfloat16()),
    "bfloat16 to float32": report(net, torch.float32),
}))
"""


@pytest.mark.parametrize("isa", _C.build_info()["cpu_isas"])
def test_the_report_says_where_bfloat16_gains_no_speed(isa):
    if not runs_here(isa):
        pytest.skip(f"this machine's CPU has no {isa}")
    output = python("-c", REPORTS, str(TESTS), EPSA_CPU_ISA=isa)
    reports = json.loads(output.splitlines()[-1])
    said = {
        name: [line.strip() for line in report.splitlines() if "no speed" in line]
        for name, report in reports.items()
    }
    note = f"bfloat16 gains no speed: the kernels of {isa} compute it in float32; "
    pays = isa in BFLOAT16_ALONE
    assert said == {
        "float32": [],
        "float32 to bfloat16": [] if pays else [note + "leave dtype out"],
        "without PSA": [],  # its layers do not run these kernels
        "export": [],  # another machine may run the program
        "bfloat16": [] if pays else [note + "take dtype=torch.float32"],
        "bfloat16 to float32": [],
    }
