"""What every test file shares: the devices, the seed and the number of threads."""

import importlib.util
import os

# The tests enter thousands of short parallel regions. OpenMP threads that spin while they wait
# make them ten times as slow on a busy machine. Read when torch loads OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import signal

import pytest
import torch

from epsa_fused import _C

# Started in the background or by nohup: the programs that tests start would inherit the ignored
# signals, and those that are to be ended by one would go on.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(_number) is signal.SIG_IGN:
        _default = signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL
        signal.signal(_number, _default)

# A library that puts the emulated CUDA kernels under the CPU key (cuda/test_simt_kernels.py): tests
# of the operator then check those.
EMULATED = os.environ.get("EPSA_TEST_EMULATED")
if EMULATED:
    torch.ops.load_library(EMULATED)

DEVICES = ["cpu"]
if torch.cuda.is_available() and _C.build_info()["cuda"]:
    DEVICES.append("cuda")


# A GPU machine may have no more than torch and pytest.
TRAINING = ("numpy", "tqdm", "sklearn", "PIL")
NEEDED = {
    "attention/test_properties.py": ("hypothesis",),
    "train/test_train.py": TRAINING,
    "train/test_accuracy.py": (*TRAINING, "matplotlib"),
    "train/test_processes.py": TRAINING,
    "train/test_resume.py": TRAINING,
}
MISSING = {
    name: [package for package in packages if importlib.util.find_spec(package) is None]
    for name, packages in NEEDED.items()
}
collect_ignore = [name for name, packages in MISSING.items() if packages]


def pytest_report_header() -> list[str]:
    """Says which kernels the run covers: nothing is left out silently."""
    left_out = [
        f"left out, {', '.join(MISSING[name])} not installed: {name}" for name in collect_ignore
    ]
    if EMULATED:
        mode = os.environ.get("EPSA_SIMT_MODE", "auto")
        return [f"epsa_fused: emulated CUDA kernels, plan {mode}", *left_out]
    info = _C.build_info()
    return [
        f"epsa_fused: CPU kernels {_C.cpu_isa()} of {', '.join(info['cpu_isas'])}; "
        f"CUDA kernels {'built' if info['cuda'] else 'not built'}, "
        f"CUDA device {'found' if torch.cuda.is_available() else 'not found'}; "
        f"tested devices: {', '.join(DEVICES)}",
        *left_out,
    ]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seed_and_threads():
    """Each test starts from one seed, and leaves the number of threads as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
