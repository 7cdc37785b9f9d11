"""Threads: equal bits for any number of them, as many as asked for, and none without need."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import convolutions
from support.cases import (
    BY_NAME,
    DTYPES,
    HALF_DTYPES,
    PLAIN_LAYOUTS,
    WEIGHT_KINDS,
    Case,
    make_inputs,
    marked,
    name_of,
)
from support.convolutions import Call, same, stage
from support.processes import run_code
from support.tolerance import make_cotangents, run

from epsa_fused import _C, psa_attention

THREADS = (1, 2, 3, 5, 8)

# One sample. Batches that do not divide by the threads: some samples go to one thread, others are
# split. Maps of several chunks. A call too small for threads. Weight gradients over many rows.
CASES = (
    BY_NAME["one_sample"],
    BY_NAME["batch_of_7"],
    BY_NAME["stage4"],
    BY_NAME["large_planes"],
    BY_NAME["many_channels"],
    BY_NAME["many_pixels"],
    BY_NAME["odd"],
    Case("many_samples", 37, 4, 40, 5, 5, 9),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_results_are_bitwise_the_same_for_any_number_of_threads(case, layout, dtype, device):
    """Each number of threads runs twice, so results also agree from run to run."""
    inputs = make_inputs(case, dtype, layout, device=device)
    cotangents = make_cotangents(case, dtype, layout.out_format, device)
    expected = None
    for threads in THREADS * 2:
        torch.set_num_threads(threads)
        results = run(psa_attention, inputs, *cotangents)
        expected = expected or results
        for name, result in results.items():
            assert torch.equal(result, expected[name]), (name, threads)


def test_per_branch_weight_gradients_are_bitwise_the_same(device):
    case = Case("many_samples", 37, 4, 40, 5, 5, 9)
    kind = next(kind for kind in WEIGHT_KINDS if kind.name == "per_branch")
    inputs = make_inputs(case, kind=kind, device=device)
    cotangents = make_cotangents(case, torch.float32, device=device)
    expected = None
    for threads in THREADS:
        torch.set_num_threads(threads)
        results = run(psa_attention, inputs, *cotangents)
        expected = expected or results
        assert all(torch.equal(results[name], expected[name]) for name in results)


# One sample, samples of one thread and of several, a call too small for threads, and a call whose
# first branch PyTorch's library computes.
CONVOLUTIONS = (
    stage(64, 28, batch=1),
    stage(64, 14, batch=7),
    stage(128, 14, stride=2, batch=3),
    stage(512, 7, batch=1),
    Call("little_work", 2, 16, 16, 7, 6, (same(3, 1), same(5, 4), same(3, 16))),
    Call("much_work", 5, 48, 40, 17, 19, (same(5, 2), same(3, 4), same(7, 8))),
    Call("many_samples", 37, 20, 36, 9, 8, (same(3, 1), same(5, 4))),
    Call("mixed", 5, 9, 36, 9, 8, (same(3, 9), same(5, 1), same(3, 1))),
)


@pytest.mark.parametrize(
    "dtype",
    marked(pytest.mark.per_isa, (torch.float32, *HALF_DTYPES), lambda t: t == torch.float32),
    ids=name_of,
)
@pytest.mark.parametrize("layout", convolutions.PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("call", CONVOLUTIONS, ids=name_of)
def test_convolutions_are_bitwise_the_same_for_any_number_of_threads(call, layout, dtype):
    """The forward pass of the package's kernels, also from run to run. PyTorch's own convolutions,
    which compute float64, promise nothing."""
    inputs = convolutions.make_inputs(call, dtype, layout)
    expected = None
    for threads in THREADS * 2:
        torch.set_num_threads(threads)
        results = convolutions.run_own(call, inputs)
        expected = expected or results
        assert len(results) >= 4
        assert all(map(torch.equal, results, expected)), threads


def test_several_python_threads_convolve_at_once():
    call = CONVOLUTIONS[2]
    jobs = [convolutions.make_inputs(call, seed=seed) for seed in range(4)]
    jobs = [(inputs, convolutions.run_own(call, inputs)) for inputs in jobs]

    def work(job):
        inputs, expected = job
        return all(
            all(map(torch.equal, convolutions.run_own(call, inputs), expected)) for _ in range(10)
        )

    with ThreadPoolExecutor(len(jobs)) as pool:
        assert all(pool.map(work, jobs))


@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_the_memory_between_the_maps_does_not_matter(layout, device):
    """The same maps in other places give the same bits: sums go by index, not by address."""
    case = BY_NAME["stage3"]
    inputs = make_inputs(case, layout=layout, device=device)
    expected = {True: run(psa_attention, inputs)}
    for offset in (1, 2, 3, 7, 4, 8, 12, 28):
        # A GPU reads aligned maps by 16 bytes and sums others element by element, in another order.
        aligned = device == "cpu" or offset % 4 == 0

        def moved(t, offset=offset):
            size = t.untyped_storage().nbytes() // t.element_size()
            memory = t.new_full((size + offset,), float("nan"))
            view = memory[offset:].as_strided(t.shape, t.stride())
            return view.copy_(t)

        results = run(psa_attention, inputs.map(moved))
        wanted = expected.setdefault(aligned, results)
        assert all(torch.equal(results[name], wanted[name]) for name in wanted), offset


def test_several_python_threads_at_once(device):
    """Each with inputs of its own, forward and backward."""
    case = BY_NAME["stage3"]
    jobs = []
    for seed in range(4):
        layout = PLAIN_LAYOUTS[seed % 2]
        inputs = make_inputs(case, layout=layout, seed=seed, device=device)
        cotangents = make_cotangents(case, torch.float32, layout.out_format, device)
        jobs.append((inputs, cotangents, run(psa_attention, inputs, *cotangents)))

    def work(job):
        inputs, cotangents, expected = job
        for _ in range(10):
            results = run(psa_attention, inputs, *cotangents)
            assert all(torch.equal(results[name], expected[name]) for name in expected)
        return True

    with ThreadPoolExecutor(len(jobs)) as pool:
        assert all(pool.map(work, jobs))


def test_the_extension_is_built_with_openmp():
    """Without it at::parallel_for is serial and does not say so."""
    assert _C.build_info()["openmp"] > 0


# ---- in a fresh process ----

SETUP = """
    import os, numpy, torch
    from epsa_fused import psa_attention

    def tensor(*shape):  # no torch operator that could use threads itself
        return torch.from_numpy(numpy.random.rand(*shape).astype("float32"))

    def tasks():
        return len(os.listdir("/proc/self/task"))

    feats = [tensor({batch}, 16, 56, 56) for _ in range(4)]
    weights = [tensor(1, 16), tensor(1), tensor(16, 1), tensor(16)]
    torch.set_num_threads({threads})
    before = tasks()
"""

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="counts threads in /proc, a Linux file system"
)


FORWARD = """
    out = psa_attention(feats, *weights)
"""
# called as an operator, since autograd's engine starts threads of its own
BACKWARD = """
    torch.set_num_threads(1)
    out, pooled, attention = torch.ops.epsa_fused.psa_attention(feats, *weights, True)
    torch.set_num_threads({threads})
    torch.ops.epsa_fused.psa_attention_backward(
        out, None, feats, *weights, pooled, attention, True, [True] * 8
    )
"""
COUNT = """
    print(tasks() - before)
"""


def threads_started(threads: int, batch: int, calls: str) -> int:
    code = SETUP + calls + COUNT
    return int(run_code(code.format(threads=threads, batch=batch)).split()[-1])


@linux
@pytest.mark.parametrize("batch", (1, 4), ids=("one_sample", "four_samples"))
@pytest.mark.parametrize("calls", (FORWARD, BACKWARD), ids=("forward", "backward"))
def test_as_many_threads_run_as_were_asked_for(calls, batch):
    """Within one sample too."""
    assert threads_started(3, batch, calls) == 2


# without gradients, since PyTorch's own operators start threads
CONVOLVE = """
    x = tensor({batch}, 64, 28, 28)
    kernels = [tensor(16, 64 // g, k, k) for k, g in ((3, 1), (5, 4), (7, 8), (9, 16))]
    args = [1, 4, 8, 16], 1, [1, 2, 3, 4], [1] * 4
    torch.ops.epsa_fused.spc_conv(x, kernels, *args)
"""


@linux
@pytest.mark.parametrize("batch", (1, 4), ids=("one_sample", "four_samples"))
def test_convolutions_run_on_as_many_threads_as_were_asked_for(batch):
    """Within one sample too."""
    assert threads_started(3, batch, CONVOLVE) == 2
    assert threads_started(1, batch, CONVOLVE) == 0


@linux
def test_a_forked_child_can_convolve():
    code = FORK.replace("psa_attention(feats, *weights)", "convolve()")
    setup = (
        SETUP
        + CONVOLVE
        + """
    def convolve():
        return torch.ops.epsa_fused.spc_conv(x, kernels, *args)[0][2]
    """
    )
    assert AGREES in run_code((setup + code).format(threads=2, batch=2, child="pass"))


@linux
def test_with_one_thread_no_other_is_ever_started():
    assert threads_started(1, 4, FORWARD + BACKWARD) == 0


FORK = """
    import os, signal, time
    expected = psa_attention(feats, *weights).numpy()
    child = os.fork()
    if child == 0:
        {child}
        same = (psa_attention(feats, *weights).numpy() == expected).all()
        os._exit(0 if same else 1)
    for _ in range(200):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise SystemExit("the child hangs")
    assert status == 0, status
    print("the child agrees")
"""
AGREES = "the child agrees"


@linux
@pytest.mark.parametrize(
    "child", ("pass", "torch.set_num_threads(1)"), ids=("as_it_is", "one_thread")
)
def test_a_forked_child_can_use_the_op(child):
    """Its parent has used the operator with two threads. DataLoader's workers set one thread."""
    assert AGREES in run_code((SETUP + FORK).format(threads=2, batch=2, child=child))
