"""No byte outside of an input is read: each one lies right before, or right behind, a page of
memory that cannot be read. Run as a script, since a mistake ends the process."""

import ctypes
import itertools
import mmap
import os
import signal
import subprocess
import sys

import pytest
import torch
from support import convolutions
from support.cases import BY_NAME, CHANNELS_LAST, CONTIGUOUS, DTYPES, LAYOUTS, Case, make_inputs
from support.paths import ROOT, TESTS
from support.processes import python
from support.tolerance import make_cotangents

OP = torch.ops.epsa_fused.psa_attention.default
BACKWARD = torch.ops.epsa_fused.psa_attention_backward.default

# sizes of every remainder of a vector, in both layouts, and maps of several chunks
CASES = (
    *(Case(f"width_{w}", 2, 2, 3, 1, w, 2) for w in (*range(1, 18), 31, 33, 63, 65)),
    *(Case(f"channels_{c}", 2, 2, c, 2, 3, 2) for c in (*range(1, 18), 31, 33, 63, 65)),
    Case("one_pixel", 1, 2, 37, 1, 1, 3),
    BY_NAME["stage4"],
    BY_NAME["large_planes"],
)
CHUNKS = next(layout for layout in LAYOUTS if layout.name == "chunks_channels_last")
KEPT = []  # keeps the mapped memory alive
# pytest's paths, for this file as a script
PATHS = os.pathsep.join((str(ROOT), str(TESTS)))


def guarded(t: torch.Tensor, before: bool) -> torch.Tensor:
    """A copy of `t`, of its strides, with an unreadable page before or behind its memory."""
    page = mmap.PAGESIZE
    size = (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.itemsize
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    KEPT.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for guard in (address, address + (pages + 1) * page):
        result = protect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0)
        assert result == 0, "mprotect failed"
    offset = page if before else (pages + 1) * page - size
    flat = torch.frombuffer(memory, dtype=t.dtype, count=size // t.itemsize, offset=offset)
    return flat.as_strided(t.shape, t.stride()).copy_(t)


def call_with_guards() -> None:
    for case, dtype, layout, before in itertools.product(
        CASES, DTYPES, (CONTIGUOUS, CHANNELS_LAST, CHUNKS), (False, True)
    ):
        inputs = make_inputs(case, dtype, layout).map(lambda t, b=before: guarded(t, b))
        grad_out, _ = make_cotangents(case, dtype, layout.out_format)
        _, pooled, attention = OP(*inputs.args, True)
        mask = [True] * (case.branches + 4)
        tensors = [guarded(t, before) for t in (grad_out, pooled, attention)]
        BACKWARD(tensors[0], None, *inputs.args, *tensors[1:], True, mask)
        KEPT.clear()
    convolve_with_guards()
    print("every call stayed within its inputs")


def convolve_with_guards() -> None:
    """Channels and pixels of every remainder of a vector, by both methods."""
    layouts = convolutions.PLAIN_LAYOUTS
    # layouts in which no two elements share memory
    weight_layouts = [w for w in convolutions.WEIGHT_LAYOUTS if "expanded" not in w.name]
    turns = itertools.cycle(itertools.product(DTYPES, layouts, weight_layouts))
    sizes = (*range(1, 18), 31, 33)
    shapes = [s for n in sizes for s in ((1, n, 16, 5), (1, 16, n, 5), (n, 4, 4, 3), (2, 8, 8, n))]
    for (groups, ic, oc, width), kernel in itertools.product(shapes, (1, 3)):
        branch = convolutions.same(kernel, groups)
        call = convolutions.Call("bounds", 2, groups * ic, groups * oc, 2, width, (branch,))
        # Steps of 17 share no factor with the number of combinations.
        for dtype, layout, weight_layout in itertools.islice(turns, 16, 4 * 17, 17):
            inputs = convolutions.make_inputs(call, dtype, layout, weight_layout)
            for before in (False, True):
                near = inputs.map(lambda t, b=before: guarded(t, b))
                convolutions.run(call, near, [True] * 2)
                KEPT.clear()


@pytest.mark.per_isa
def test_nothing_outside_of_the_inputs_is_read():
    assert "every call stayed within its inputs" in python(__file__, "call", PYTHONPATH=PATHS)


@pytest.mark.parametrize("side", ("before", "behind"))
def test_the_guards_work(side):
    """One element too many ends the process."""
    result = subprocess.run(
        [sys.executable, __file__, side],
        env=os.environ | {"PYTHONPATH": PATHS},
        capture_output=True,
        timeout=60,
    )
    assert result.returncode in (-signal.SIGSEGV, -signal.SIGBUS)


if __name__ == "__main__":
    import epsa_fused  # noqa: F401  (the operators)

    if sys.argv[1] == "call":
        call_with_guards()
    else:
        values = guarded(torch.zeros(3), sys.argv[1] == "before")
        index = {"before": -1, "behind": 3}[sys.argv[1]]
        print(ctypes.c_float.from_address(values.data_ptr() + 4 * index).value)
