"""Which launch plan of the CUDA kernels comes first, and which problems are refused.

No GPU is needed. test_plan_rules.py checks the rules that every plan must obey.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from statistics import mean

import pytest
from devices import DEVICES, STAGES
from support.cuda_plans import (
    EPSANET,
    LAYOUTS,
    PASSES,
    SIZE,
    Problem,
    blocks_on_multiprocessor,
    combinations,
    piece_bytes,
    plans,
    stage,
    stage_shapes,
)

from epsa_fused import _C

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"


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
            # One round of single blocks, which have no room for both maps, costs as much as four of
            # pairs that have (81 and 79 us on an H200).
            single = (n, layout, dtype) == (256, "contiguous", "float32") and best["cluster"] == 1
            assert best["pieces"] == 2 or layout == "channels_last" or single


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
    eight = found[0]
    assert eight["cluster"] == 8
    assert piece_bytes(stage(64, 56, 56, 64, "forward"), eight["split"]) == 802816 // 8
    assert eight["blocks"] == 512


def measured_on(name: str) -> Iterator[tuple[Problem, dict[tuple[int, int], tuple[int, float]]]]:
    """The problems of benchmarks/results/<name>-plans.csv: (cluster, pieces) -> the blocks that the
    device holds at once, and the microseconds of the plan."""
    with (RESULTS / f"{name}-plans.csv").open() as file:
        rows = list(csv.DictReader(file))
    fields = ("mode", "layout", "dtype", "n", "planes", "size")
    for key, plans_ in itertools.groupby(rows, lambda row: tuple(row[f] for f in fields)):
        pass_, layout, dtype, n, planes, size = key
        problem = stage(
            int(planes), int(size), int(size), int(n), pass_, dtype=dtype, layout=layout
        )
        yield (
            problem,
            {
                (int(r["cluster"]), int(r["held"])): (int(r["resident"]), float(r["us"]))
                for r in plans_
            },
        )


def test_the_first_plan_is_nearly_the_fastest_that_was_measured():
    """The true number of resident blocks ranks the plans of an H200."""
    lost = []
    for problem, measured in measured_on("nvidia-h200"):
        resident = {key: blocks for key, (blocks, _) in measured.items()}
        first = _C.cuda_plans(DEVICES["h200"], **vars(problem), resident=resident)[0]
        assert first["resident"] == resident[first["cluster"], first["pieces"]]
        times = [us for _, us in measured.values()]
        lost.append(measured[first["cluster"], first["pieces"]][1] / min(times))
        assert lost[-1] < 1.25, (problem, first)
    assert len(lost) == 96
    assert mean(lost) < 1.03


def test_a_cluster_more_than_the_device_holds_costs_a_round():
    """At N = 64, clusters of 4 are 256 blocks. An H200's 132 multiprocessors could hold 264, but
    there is room for 62 clusters only: 248 blocks. Then clusters of 2 come first."""
    problem = stage(128, 28, 28, 64, "forward")
    fits = _C.cuda_plans(DEVICES["h200"], **vars(problem), resident={(4, 1): 264})
    assert fits[0]["cluster"] == 4
    short = _C.cuda_plans(
        DEVICES["h200"], **vars(problem), resident={(2, 1): 132, (4, 1): 248, (8, 1): 496}
    )
    assert short[0]["cluster"] == 2
    with pytest.raises(ValueError, match="resident: expected at least 1, got 0"):
        _C.cuda_plans(DEVICES["h200"], **vars(problem), resident={(4, 1): 0})


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


def test_only_streaming_clears_counters():
    for problem in combinations(stage_shapes(EPSANET, (1, 64)), ("float32", "bfloat16")):
        for plan in plans(DEVICES["h100"], problem):
            assert (plan["workspace"]["cleared"] > 0) == (plan["variant"] == "streaming")
            if plan["variant"] == "resident" and problem.pass_ == "forward":
                assert plan["workspace"]["bytes"] == 0


@pytest.mark.parametrize(
    ("samples", "dtype", "layout", "cluster", "pieces", "group"),
    [
        (64, "float32", "contiguous", 2, 2, 8),  # all eight fit
        (256, "float32", "contiguous", 1, 1, 16),
        # 50,176 bytes of maps hold eleven samples' vectors. An eighth of that holds one: no gain.
        (256, "bfloat16", "channels_last", 1, 1, 11),
        (256, "bfloat16", "channels_last", 8, 1, 16),
    ],
)
def test_a_group_of_weight_gradients_fits_the_room_of_the_maps(
    samples, dtype, layout, cluster, pieces, group
):
    shape = Problem("backward", samples, 4, 128, 49, 8, dtype=dtype, layout=layout)
    found = {
        (p["variant"], p["cluster"], p["pieces"]): p["group"] for p in plans(DEVICES["h100"], shape)
    }
    assert found["resident", cluster, pieces] == group


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
