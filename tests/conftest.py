"""Devices, seed and number of threads of every test."""

import os

# The tests enter thousands of short parallel regions. OpenMP threads that spin while they wait
# make them ten times as slow on a busy machine. OpenMP reads this when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import signal

import pytest
import torch
from support.elsewhere import imported_elsewhere

import epsa_fused
from epsa_fused import _C

# A shell's background job and nohup ignore signals. Programs that the tests start would inherit
# that, and those that a test ends by a signal would go on.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(_number) is signal.SIG_IGN:
        _default = signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL
        signal.signal(_number, _default)

# A library that registers the emulated CUDA kernels for the CPU: the operator's tests then check
# these (cuda/test_simt_kernels.py).
EMULATED = os.environ.get("EPSA_TEST_EMULATED")
if EMULATED:
    torch.ops.load_library(EMULATED)
    # a mode of simt/test_plans.h, the seed of the order, the most blocks that run at once
    PLANS = os.environ.get("EPSA_TEST_PLANS", "auto/0/0").split()

    @pytest.fixture(autouse=True, params=PLANS)
    def _plan(request):
        """Each test runs with each of the plans."""
        for name, value in zip(("MODE", "SEED", "RESIDENT"), request.param.split("/"), strict=True):
            os.environ[f"EPSA_SIMT_{name}"] = value


# Files of a minute or more are begun first: the last of them would keep one process busy alone.
LONG = (
    *("simt_kernels", "compile", "isa", "deployment", "kernels", "readme"),
    *("train", "processes", "resume", "signals"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


DEVICES = ["cpu"]
if torch.cuda.is_available() and _C.build_info()["cuda"]:
    DEVICES.append("cuda")


def pytest_configure() -> None:
    """Many tests start programs in other folders, which must not test another copy."""
    here, there = epsa_fused.__file__, imported_elsewhere()
    if there and not os.path.samefile(here, there):
        raise pytest.UsageError(
            f"the tests import {here}, but programs elsewhere {there}: remove what pip installed "
            "by `pip uninstall epsa_fused`, or put this checkout into PYTHONPATH"
        )


def pytest_report_header() -> list[str]:
    """Says which kernels the run covers."""
    if EMULATED:
        return [f"epsa_fused: emulated CUDA kernels, plans {' '.join(PLANS)}"]
    info = _C.build_info()
    return [
        f"epsa_fused: CPU kernels {_C.cpu_isa()} of {', '.join(info['cpu_isas'])}; "
        f"CUDA kernels {'built' if info['cuda'] else 'not built'}, "
        f"CUDA device {'found' if torch.cuda.is_available() else 'not found'}; "
        f"tested devices: {', '.join(DEVICES)}",
    ]


@pytest.fixture(
    params=[pytest.param(d, marks=pytest.mark.gpu) if d == "cuda" else d for d in DEVICES]
)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seed_and_threads():
    """Each test starts from one seed, and leaves the number of threads as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
