"""The launch plan of the CUDA kernels; no GPU is needed.

Every candidate must be legal on its device and cut a sample as plan.h says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, gcd, prod

import pytest
from devices import BRANCHES, DEVICES, LARGE_STAGES, STAGES

from epsa_fused import _C

SIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
LAYOUTS = ("contiguous", "channels_last")
PASSES = ("forward", "backward")

# The registers of a multiprocessor on all these devices, and the shared memory that the system adds
# to each block.
REGISTERS = 65536
SYSTEM_SHARED = 1024


@dataclass(frozen=True)
class Problem:
    pass_: str
    samples: int
    branches: int
    channels: int
    pixels: int
    hidden: int
    shared: bool = True
    dtype: str = "float32"
    layout: str = "contiguous"
    aligned: bool | None = None
    pooled_given: bool = False
    grad_out_given: bool = True
    feats_wanted: bool = True
    weights_wanted: bool = True

    @property
    def vector(self) -> int:
        return self.branches * self.channels

    @property
    def accumulator(self) -> int:
        return 8 if self.dtype == "float64" else 4

    def may_align(self) -> bool:
        """Are the slots of one [N, S*C, H, W] tensor whole multiples of 16 bytes?"""
        run = self.channels * (self.pixels if self.layout == "contiguous" else 1)
        return self.dtype != "float64" and run * SIZE[self.dtype] % 16 == 0


def plans(device: _C.CudaDevice, problem: Problem) -> list[dict]:
    return _C.cuda_plans(device, **vars(problem))


def combinations(shapes: list[tuple[int, ...]], dtypes: tuple[str, ...]) -> Iterator[Problem]:
    """Every pass, layout and dtype for (samples, branches, channels, pixels)."""
    for shape, dtype, layout, pass_ in itertools.product(shapes, dtypes, LAYOUTS, PASSES):
        hidden = max(1, min(64, shape[2] // 16))
        yield Problem(pass_, *shape, hidden, dtype=dtype, layout=layout)


def stage_shapes(stages, batches: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [
        (n, BRANCHES, planes // BRANCHES, height * width)
        for n in batches
        for planes, height, width in stages
    ]


EPSANET = [(planes, size, size) for planes, size in (*STAGES, *LARGE_STAGES)]
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


# ---- the rules that every candidate must obey ----


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


def piece_bytes(problem: Problem, split: dict) -> int:
    """The bytes of the largest part."""
    pixels_last = problem.layout == "channels_last"
    unit = problem.vector if pixels_last else split["planes"] * problem.pixels
    return ceil(split["units"] / split["parts"]) * unit * SIZE[problem.dtype]


def needed_shared_bytes(problem: Problem, plan: dict) -> int:
    """The pieces of a block's shared memory that the kernels take, added up."""
    acc, message = problem.accumulator, 16

    def piece(size: int) -> int:
        return ceil(size / 16) * 16

    lanes = plan["vector"] if problem.layout == "channels_last" else 1
    meet = piece(plan["threads"] * lanes * acc)
    if plan["variant"] == "streaming":
        return message + meet
    vectors = 4 * piece(problem.vector * acc)
    hidden = piece(problem.branches * problem.hidden * acc)
    tail = hidden if problem.pass_ == "forward" else 2 * hidden + message
    return plan["pieces"] * piece(piece_bytes(problem, plan["split"])) + meet + vectors + tail


def blocks_on_multiprocessor(device: _C.CudaDevice, problem: Problem, plan: dict) -> int:
    registers = plan["threads"] * (128 if problem.dtype == "float64" else 64)
    return min(
        REGISTERS // registers,
        device.threads_per_multiprocessor // plan["threads"],
        device.shared_per_multiprocessor // (plan["shared_bytes"] + SYSTEM_SHARED),
        device.blocks_per_multiprocessor,
    )


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
    """The pieces follow each other inside the workspace. Only counters are cleared."""
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
        "groups_arrived": 4 * (groups + 1) * weights,
    }
    pieces = counters | {
        "partial": n * problem.vector * sums * acc * streaming,
        "hidden": hidden * (streaming or weights),
        "scratch": vectors * streaming,
        "grad_v": vectors * (backward and (streaming or weights)),
        "grad_u": hidden * (backward and (streaming or weights)),
        "grad_pooled": vectors * (backward and streaming),
        "group_sums": groups * elements * acc * (weights and groups > 1),
    }
    end = 0
    for name, size in pieces.items():
        assert space[name] % 16 == 0 and end <= space[name] < end + 16, name
        end = space[name] + size
        if name == list(counters)[-1]:
            assert end <= space["cleared"] < end + 16
    assert end <= space["bytes"] < end + 16
    if not streaming and not weights:
        assert space["cleared"] == 0
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
            for part in seen:
                # a branch's run begins and ends at whole vectors in memory
                for s in range(problem.branches):
                    run = [(c, m) for branch, c, m in part if branch == s]
                    if run and problem.layout == "contiguous":
                        c, m = run[0]
                        assert (c * problem.pixels + m) % plan["vector"] == 0
                        assert len(run) % plan["vector"] == 0
            largest = max(map(len, seen)) * SIZE[dtype]
            if plan["split"]["chunks"] == 1:
                assert largest == piece_bytes(problem, plan["split"])
            sizes.add(len(seen))
        assert sizes


# ---- the order of the plans ----


def stage(planes: int, height: int, width: int, n: int, pass_: str, **options) -> Problem:
    channels = planes // BRANCHES
    return Problem(pass_, n, BRANCHES, channels, height * width, channels // 16, **options)


@pytest.mark.parametrize("name", ("h100", "h200", "b200"))
def test_a_sample_is_read_once_where_a_cluster_can_hold_it(name):
    """The data-centre parts from sm_90 on hold all stages and batches. Clusters hold the samples
    that are too large for one block's shared memory."""
    device = DEVICES[name]
    for problem in combinations(
        stage_shapes(EPSANET[: len(STAGES)], (1, 32, 64, 256)), ("float32", "bfloat16")
    ):
        best = plans(device, problem)[0]
        assert best["variant"] == "resident", problem
        sample = problem.vector * problem.pixels * SIZE[problem.dtype]
        assert best["cluster"] > 1 or sample < device.shared_per_block, problem


@pytest.mark.parametrize("name", ("h100", "h200", "b200"))
def test_a_backward_reads_no_rows_between_vectors_from_device_memory(name):
    """With the features in shared memory, planes of 49 pixels are fetched by 16 bytes."""
    for n, layout in itertools.product((1, 64, 256), LAYOUTS):
        for dtype in ("float32", "bfloat16"):
            best = plans(
                DEVICES[name], stage(512, 7, 7, n, "backward", dtype=dtype, layout=layout)
            )[0]
            assert best["vector"] > 1
            assert best["pieces"] == 2 or layout == "channels_last"


def test_maps_are_held_twice_only_where_blocks_still_overlap():
    """In stage 1 in float, a block of a cluster of 8 has 100 KB of each map. It holds the gradient
    alone: with both maps it would have its multiprocessor to itself."""
    problem = stage(64, 56, 56, 64, "backward")
    device = DEVICES["h100"]
    found = plans(device, problem)
    assert (found[0]["cluster"], found[0]["pieces"]) == (16, 1)
    held = next(plan for plan in found if plan["pieces"] == 2)
    assert held["cluster"] == 16 and blocks_on_multiprocessor(device, problem, held) == 2
    assert not [plan for plan in found if (plan["cluster"], plan["pieces"]) == (8, 2)]


def test_stage_1_in_float_is_eight_blocks_of_a_hundred_kilobytes():
    """A sample has 802 816 bytes. In a cluster of 8, the portable size, a block holds 100 352."""
    found = plans(DEVICES["h100"], stage(64, 56, 56, 64, "forward"))
    assert found[0]["cluster"] == 16
    eight = next(plan for plan in found if plan["cluster"] == 8)
    assert piece_bytes(stage(64, 56, 56, 64, "forward"), eight["split"]) == 802816 // 8
    assert eight["blocks"] == 512


@pytest.mark.parametrize("pass_", PASSES)
def test_devices_before_sm_90_have_no_clusters(pass_):
    """One block holds a sample, or the sample is read twice."""
    for name in ("a100", "rtx4090"):
        for (planes, size), dtype in itertools.product(STAGES, ("float32", "bfloat16")):
            found = plans(DEVICES[name], stage(planes, size, size, 64, pass_, dtype=dtype))
            assert all(plan["cluster"] == 1 for plan in found)
    a100 = DEVICES["a100"]
    assert plans(a100, stage(64, 56, 56, 64, pass_))[0]["variant"] == "streaming"
    half = stage(512, 7, 7, 64, pass_, dtype="bfloat16")
    assert plans(a100, half)[0]["variant"] == "resident"
    # In float the backward has no room for the features. One block on a multiprocessor is too few
    # for their short loads.
    float_ = plans(a100, stage(512, 7, 7, 64, pass_))[0]
    assert float_["variant"] == ("resident" if pass_ == "forward" else "streaming")


@pytest.mark.parametrize("name", DEVICES)
def test_maps_of_detection_size_are_streamed(name):
    """A sample has 17 MB. No cluster holds it; the L2 cache does."""
    for layout, pass_ in itertools.product(LAYOUTS, PASSES):
        problem = stage(64, 200, 334, 2, pass_, layout=layout)
        assert [plan["variant"] for plan in plans(DEVICES[name], problem)] == ["streaming"]


def test_nothing_to_sum_is_streamed():
    """A resident kernel computes its sums from the maps that it holds."""
    given = stage(64, 56, 56, 8, "forward", pooled_given=True)
    none = stage(64, 56, 56, 8, "backward", grad_out_given=False)
    for problem in (given, none):
        assert [p["variant"] for p in plans(DEVICES["h100"], problem)] == ["streaming"]


def test_rows_that_begin_between_vectors_are_cut_by_elements():
    """100 x 167 pixels are whole vectors of 4, but not of 8. 25 x 42 pixels fit into one part."""

    def last(dtype: str, planes: int, height: int, width: int) -> dict:
        return plans(DEVICES["a100"], stage(planes, height, width, 2, "forward", dtype=dtype))[-1]

    assert last("float32", 128, 100, 167)["vector"] == 4
    assert last("float32", 128, 100, 167)["split"]["chunks"] > 1
    assert last("bfloat16", 64, 200, 334)["vector"] == 8
    assert last("bfloat16", 64, 195, 334)["vector"] == 1
    assert last("float32", 512, 25, 42)["split"]["chunks"] == 1


def test_the_forward_of_a_resident_sample_clears_nothing():
    for problem in combinations(stage_shapes(EPSANET, (1, 64)), ("float32", "bfloat16")):
        for plan in plans(DEVICES["h100"], problem):
            clears = plan["workspace"]["cleared"] > 0
            assert clears == (plan["variant"] == "streaming" or problem.pass_ == "backward")
            if not clears:
                assert plan["workspace"]["bytes"] == 0


def test_a_plan_depends_on_its_arguments_alone():
    """Neither the order of the questions matters nor which of two equal devices is asked. Shared
    weights do not matter either: launch.cu remembers plans without them."""
    fields = [f for f in dir(_C.CudaDevice) if not f.startswith("_")]
    copies = {
        name: _C.CudaDevice(**{f: getattr(device, f) for f in fields})
        for name, device in DEVICES.items()
    }
    problems = list(combinations(stage_shapes(EPSANET, (1, 32)), ("float32",)))
    first = [plans(d, p) for d in DEVICES.values() for p in problems]
    last = [plans(d, p) for d in reversed(copies.values()) for p in reversed(problems)]
    assert first == last[::-1]

    def layout_of(plan: dict) -> dict:
        return {key: value for key, value in plan.items() if key != "workspace"}

    for problem in problems:
        apart = plans(DEVICES["h100"], replace(problem, shared=False))
        together = plans(DEVICES["h100"], problem)
        assert list(map(layout_of, apart)) == list(map(layout_of, together))


# ---- bad values ----

GOOD = {"pass_": "forward", "samples": 2, "branches": 4, "channels": 16, "pixels": 49, "hidden": 1}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pass_": "both"}, r"pass_: expected one of \{forward, backward\}, got 'both'"),
        ({"dtype": "int8"}, r"dtype: expected one of \{float32, .*, float16\}, got 'int8'"),
        ({"layout": "NHWC"}, r"layout: expected one of \{contiguous, channels_last\}, got 'NHWC'"),
        ({"samples": 0}, "samples: expected at least 1, got 0"),
        ({"branches": 1}, "branches: expected 2 to 8, got 1"),
        ({"branches": 9}, "branches: expected 2 to 8, got 9"),
        ({"channels": -3}, "channels: expected at least 1, got -3"),
        ({"pixels": 0}, "pixels: expected at least 1, got 0"),
        ({"hidden": 0}, "hidden: expected at least 1, got 0"),
        ({"channels": 3, "aligned": True}, "aligned: expected False for 3 channels of 49 pixels"),
        ({"samples": 2**29}, r"batch N is 536870912, expected less than 2\^29"),
        ({"pixels": 2**29}, r"pixels H\*W is 536870912, expected"),
        ({"channels": 2**27}, r"channels S\*C is 536870912, expected"),
        ({"hidden": 2**25}, r"SE weights r\*C is 536870912, expected"),
        ({"hidden": 2**27, "channels": 1}, r"hidden units S\*r is 536870912, expected"),
        ({"samples": 2**20, "pixels": 2**15}, r"N\*S\*C\*H\*W / 4096 is 536870912, expected"),
    ],
)
def test_a_wrong_problem_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        _C.cuda_plans(DEVICES["h100"], **(GOOD | wrong))


def test_sizes_whose_product_overflows_are_refused():
    """2^68 elements: in 64 bits, the product of the sizes is 0."""
    sizes = {"samples": 2**20, "channels": 2**20, "pixels": 2**26}
    assert prod(sizes.values()) * 4 % 2**64 == 0
    with pytest.raises(ValueError, match=r"N\*S\*C\*H\*W / 4096"):
        _C.cuda_plans(DEVICES["h100"], **(GOOD | sizes))


def test_a_wrong_device_is_refused():
    good = {f: getattr(DEVICES["h100"], f) for f in dir(_C.CudaDevice) if not f.startswith("_")}
    for field, value, message in [
        ("compute_capability", 75, "compute_capability: expected at least 80, got 75"),
        ("multiprocessors", 0, "multiprocessors: expected at least 1, got 0"),
        ("shared_per_block", 0, "shared_per_block: expected at least 1, got 0"),
        ("l2", -1, "l2: expected at least 1, got -1"),
        ("threads_per_multiprocessor", 2**31, r"expected less than 2\^31, got 2147483648"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.CudaDevice(**(good | {field: value}))
