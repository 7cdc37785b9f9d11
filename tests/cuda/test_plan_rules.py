"""The rules that every launch plan of the CUDA kernels must obey; no GPU is needed.

Every candidate must be legal on its device and cut a sample as plan.h says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import ceil, gcd

import pytest
from devices import DEVICES
from support.cuda_plans import (
    EPSANET,
    SIZE,
    Problem,
    blocks_on_multiprocessor,
    combinations,
    piece_bytes,
    plans,
    stage_shapes,
)

from epsa_fused import _C

DETECTION = [(64, 200, 334), (128, 100, 167), (256, 50, 84), (512, 25, 42)]
ODD = [
    *itertools.product((1, 37), range(2, 9), (1, 3, 8, 40), (1, 15, 49, 64)),
    # planes larger than a part, whose rows begin between vectors
    *itertools.product((3,), (2, 8), (1, 8), (66801, 66802, 2**20)),
    # far more samples than blocks; few pixels with very many channels
    (100_000, 4, 16, 49),
    (5, 2, 2**20, 1),
    # close to the limits of size_error
    (2**29 - 1, 2, 1, 1),
    (2**28, 2, 2, 1024),
    (1, 2, 2**19, 2**20),
    (1, 2, 1, 2**29 - 1),
]


def part_sizes(split: dict) -> list[int]:
    """Units in each part: the first units % parts parts hold one more than the others."""
    least, more = divmod(split["units"], split["parts"])
    return [least + (part < more) for part in range(split["parts"])]


def check_split(problem: Problem, plan: dict) -> None:
    """The parts hold every element of a sample exactly once and begin at whole vectors."""
    split, vector = plan["split"], plan["vector"]
    parts, units = split["parts"], split["units"]
    planes, chunks, chunk = split["planes"], split["chunks"], split["chunk"]
    assert 1 <= parts <= units
    if problem.layout == "channels_last":
        assert (units, planes, chunks) == (problem.pixels, 1, 1)
        assert problem.channels % vector == 0
    elif chunks > 1:
        # all chunks of a plane are whole vectors, so the next plane begins at one too
        assert parts == units == problem.vector * chunks and planes == 1
        assert (chunks - 1) * chunk < problem.pixels <= chunks * chunk
        assert chunk % vector == problem.pixels % vector == 0
    else:
        # a unit lies in one branch and is whole vectors
        assert units * planes == problem.vector and chunk == problem.pixels
        assert problem.channels % planes == 0
        assert planes * problem.pixels % vector == 0
        assert planes <= vector // gcd(problem.pixels, vector)
    if parts <= 4096:
        assert sum(part_sizes(split)) == units


def needed_shared_bytes(problem: Problem, plan: dict) -> int:
    """The pieces of a block's shared memory that the kernels take, added up."""
    acc, message = problem.accumulator, 16

    def piece(size: int) -> int:
        return ceil(size / 16) * 16

    lanes = plan["vector"] if problem.layout == "channels_last" else 1
    meet = piece(plan["threads"] * lanes * acc)
    if plan["variant"] == "streaming":
        return message + meet
    forward = problem.pass_ == "forward"
    vectors = (4 if forward else 6) * piece(problem.vector * acc)
    hidden = piece(problem.branches * problem.hidden * acc)
    tail = hidden if forward else 2 * hidden + message
    return plan["pieces"] * piece(piece_bytes(problem, plan["split"])) + meet + vectors + tail


def check_limits(device: _C.CudaDevice, problem: Problem, plan: dict) -> None:
    """CUDA admits the launch, and the device can hold at least one block of it."""
    threads, cluster, resident = plan["threads"], plan["cluster"], plan["variant"] == "resident"
    assert threads % 32 == 0 and 8 * problem.branches <= threads <= 512
    assert plan["shared_bytes"] == needed_shared_bytes(problem, plan)
    assert plan["shared_bytes"] <= device.shared_per_block
    fit = blocks_on_multiprocessor(device, problem, plan)
    assert fit >= 1
    most = 1 if device.compute_capability < 90 else 8 if device.compute_capability >= 120 else 16
    assert cluster in (1, 2, 4, 8, 16) and cluster <= most
    assert cluster <= fit * device.multiprocessors
    assert 1 <= plan["blocks"] < 2**31
    # blocks beyond those that fit would find no ticket
    assert resident or plan["blocks"] <= fit * device.multiprocessors
    full = 1 if problem.dtype == "float64" else 16 // SIZE[problem.dtype]
    assert plan["vector"] in (1, full)
    assert plan["vector"] == 1 or (problem.may_align() and problem.aligned is not False)


def check_variant(problem: Problem, plan: dict) -> None:
    parts, n = plan["split"]["parts"], problem.samples
    assert plan["kernel"] == f"{problem.pass_}_{plan['variant']}"
    assert 1 <= plan["group"] <= n
    if plan["variant"] == "resident":
        assert plan["blocks"] == n * plan["cluster"] and parts == plan["cluster"]
        assert plan["split"]["chunks"] == 1
        assert plan["pieces"] in ((1,) if problem.pass_ == "forward" else (1, 2))
    else:
        assert plan["cluster"] == 1 and 1 <= plan["lag"] <= n
        assert plan["pieces"] == 0
        tickets = n * 2 * parts
        assert plan["blocks"] <= tickets < 2**31


def check_workspace(problem: Problem, plan: dict) -> None:
    """The pieces follow each other inside the workspace. Only streaming's counters are cleared."""
    space, split = plan["workspace"], plan["split"]
    streaming, backward = plan["variant"] == "streaming", problem.pass_ == "backward"
    weights = backward and problem.weights_wanted
    n, acc = problem.samples, problem.accumulator
    groups = ceil(n / plan["group"])
    sets = 1 if problem.shared else problem.branches
    elements = sets * (2 * problem.hidden * problem.channels + problem.hidden + problem.channels)
    sums = split["parts"] if problem.layout == "channels_last" else split["chunks"]
    vectors = n * problem.vector * acc
    hidden = n * problem.branches * problem.hidden * acc
    counters = {
        "ticket": 8 * streaming,
        "arrived": 4 * n * streaming,
        "ready": 4 * n * streaming,
    }
    pieces = counters | {
        "groups_arrived": 8 * (groups + 1) * (weights and n > 1),
        "partial": n * problem.vector * sums * acc * streaming,
        "hidden": hidden * (streaming or weights),
        "scratch": vectors * streaming,
        "grad_v": vectors * (backward and (streaming or weights)),
        "grad_u": hidden * (backward and (streaming or weights)),
        "grad_pooled": vectors * (backward and streaming),
        "group_sums": groups * ceil(elements * acc / 16) * 16 * (weights and groups > 1),
    }
    end = 0
    for name, size in pieces.items():
        assert space[name] % 16 == 0 and end <= space[name] < end + 16, name
        end = space[name] + size
        if name == list(counters)[-1]:
            assert end <= space["cleared"] < end + 16
    assert end <= space["bytes"] < end + 16
    # A counter of arrivals has 16 bits. It counts a group's samples, or the groups.
    assert max(groups, plan["group"]) < 2**16
    # a part has few sums beside its elements
    assert not streaming or sums <= ceil(problem.pixels / 16)


def check(device: _C.CudaDevice, problem: Problem) -> list[dict]:
    found = plans(device, problem)
    assert found[-1]["variant"] == "streaming"
    assert all(plan["variant"] == "resident" for plan in found[:-1])
    assert len({(plan["cluster"], plan["pieces"]) for plan in found[:-1]}) == len(found) - 1
    for plan in found:
        try:
            check_limits(device, problem, plan)
            check_split(problem, plan)
            check_variant(problem, plan)
            check_workspace(problem, plan)
        except AssertionError as error:
            raise AssertionError(f"{device.name}: {problem}: {plan}: {error}") from error
    return found


@pytest.mark.parametrize("name", DEVICES)
def test_every_stage_of_epsanet_has_legal_plans(name):
    shapes = stage_shapes(EPSANET, (1, 32, 256))
    for problem in combinations(shapes, ("float32", "bfloat16")):
        check(DEVICES[name], problem)


@pytest.mark.parametrize("name", DEVICES)
def test_maps_of_detection_size_have_legal_plans(name):
    for problem in combinations(stage_shapes(DETECTION, (1, 2, 16)), tuple(SIZE)):
        check(DEVICES[name], problem)


@pytest.mark.parametrize("name", DEVICES)
def test_odd_shapes_have_legal_plans(name):
    for problem in combinations(ODD, ("float32", "float64", "float16")):
        check(DEVICES[name], problem)
        check(DEVICES[name], replace(problem, aligned=False))


@pytest.mark.parametrize("name", DEVICES)
def test_what_is_given_or_wanted_keeps_plans_legal(name):
    flags = ("shared", "pooled_given", "grad_out_given", "feats_wanted", "weights_wanted")
    for problem in combinations([(1, 4, 16, 3136), (40, 3, 32, 49)], ("float32",)):
        for values in itertools.product((False, True), repeat=len(flags)):
            check(DEVICES[name], replace(problem, **dict(zip(flags, values, strict=True))))


# ---- the elements of each part, one by one ----


def parts_of(problem: Problem, split: dict) -> Iterator[list[tuple[int, int, int]]]:
    """The elements (s, c, pixel) of each part, as plan.h describes them."""
    maps = [(s, c) for s in range(problem.branches) for c in range(problem.channels)]
    if split["chunks"] > 1:
        for s, c in maps:
            for m in range(0, problem.pixels, split["chunk"]):
                end = min(m + split["chunk"], problem.pixels)
                yield [(s, c, pixel) for pixel in range(m, end)]
        return
    first = 0
    for size in part_sizes(split):
        if problem.layout == "channels_last":
            yield [(s, c, m) for m in range(first, first + size) for s, c in maps]
        else:
            begin, end = (unit * split["planes"] for unit in (first, first + size))
            yield [(s, c, m) for s, c in maps[begin:end] for m in range(problem.pixels)]
        first += size


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 4, 16, 784), "bfloat16"),
        ((2, 3, 8, 49), "float32"),
        ((2, 8, 3, 49), "float16"),
        ((2, 2, 3, 20000), "float32"),
        ((2, 2, 2, 17001), "float32"),
        ((2, 5, 4, 1), "float64"),
    ],
)
def test_a_cut_holds_every_element_once(shape, dtype):
    for problem in combinations([shape], (dtype,)):
        sizes = set()
        for plan in plans(DEVICES["h100"], problem):
            seen = list(parts_of(problem, plan["split"]))
            assert len(seen) == plan["split"]["parts"]
            elements = list(itertools.chain.from_iterable(seen))
            assert len(elements) == len(set(elements)) == problem.vector * problem.pixels
            # a branch's run begins and ends at whole vectors in memory
            if problem.layout == "contiguous":
                for part, s in itertools.product(seen, range(problem.branches)):
                    run = [c * problem.pixels + m for branch, c, m in part if branch == s]
                    assert not run or run[0] % plan["vector"] == len(run) % plan["vector"] == 0
            largest = max(map(len, seen)) * SIZE[dtype]
            if plan["split"]["chunks"] == 1:
                assert largest == piece_bytes(problem, plan["split"])
            sizes.add(len(seen))
        assert sizes
