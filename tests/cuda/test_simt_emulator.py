"""The emulator that runs CUDA kernels on the CPU: healthy kernels pass, each planted bug is found.

Every build named beside a bug must report it, in the words that stand there.
"""

from __future__ import annotations

import re

import pytest
from simt import build

BUILDS = {
    "native": build.Program("self_test"),
    "ucontext": build.Program("self_test", ucontext=True),
    "asan": build.Program("self_test", "asan"),
    "tsan": build.Program("self_test", "tsan"),
}
every_build = pytest.mark.parametrize("program", BUILDS.values(), ids=BUILDS.keys())

HEALTHY = [
    "block_sum_float",
    "block_sum_double",
    "block_sum_int",
    "copies",
    "clusters",
    "clusters_two_resident",
    "clusters_larger_than_the_device",
    "last_block",
    "begun_counter",
    "launch_numbers",
    "tickets",
    "tickets_two_resident",
    "tickets_one_resident",
    "unlike_launches",
    "schedule",
    "after_failure",
    "halves",
]

WRONG = "wrong result"
RACE = "ThreadSanitizer: data race"
ASAN = "AddressSanitizer: "

# Mistakes that the emulator itself reports, in every build.
REPORTED = {
    "exit_before_barrier": "exit before a barrier: block 0: 32 at a barrier, 32 exited",
    "divergent_barriers": "divergent barriers: block 0: 48 at a barrier, 16 at a shuffle",
    "no_copy_wait": "exit with a copy_async16 that was not waited for",
    "wait_for_a_later_block": "livelock: launch 0, block 0: 1 polling, 63 at a barrier",
    "wait_for_ever": "livelock: block 0: 64 polling",
    "peer_rank": "cluster_peer of a rank outside of the cluster",
    "peer_address": "cluster_peer of an address outside of the block's shared memory",
    "peer_before_cluster_barrier": "cluster_peer before any cluster barrier",
    "peer_after_exit": "cluster_peer after the peer's exit",
    "cluster_in_plain_launch": "a cluster's primitive in a launch without clusters",
    "cluster_wait_alone": "cluster_wait without a cluster_arrive",
    "cluster_arrive_twice": "cluster_arrive twice without a cluster_wait between",
    "exit_after_cluster_arrive": "exit between cluster_arrive and cluster_wait",
    "exit_before_cluster_barrier": "exit before a barrier: block 0: 64 at a cluster barrier",
    "shuffle_of_half_a_warp": "shuffle in a warp of fewer than 32 threads",
    "shuffle_of_some_lanes": "exit before a barrier: block 0: 31 at a shuffle, 33 exited",
    "misaligned_copy": "misaligned copy_async16",
    "misaligned_store": "misaligned store_evict_first",
    "copy_out_of_shared": "copy_async16 to outside of the block's shared memory",
    "copy_of_a_changed_source": "the source of a copy_async16 changed before its wait",
    "odd_shared_bytes": "invalid launch: shared memory is not a multiple of 16 bytes",
}

# Bugs that spoil the results in some order of the threads, or that a sanitizer reports.
FOUND = [
    ("missing_barrier", "native", WRONG),
    ("missing_barrier", "tsan", RACE),
    ("late_copy_wait", "native", WRONG),
    ("late_copy_wait", "tsan", RACE),
    ("uninitialised_shared", "native", WRONG),
    ("missing_cluster_barrier", "native", WRONG),
    ("missing_cluster_barrier", "tsan", RACE),
    ("exit_before_peers_read", "native", "cluster_peer after the peer's exit"),
    ("read_after_peers_exit", "native", WRONG),
    ("read_after_peers_exit", "asan", ASAN + "use-after-poison"),
    ("read_after_peers_exit", "tsan", RACE),
    ("relaxed_arrival", "tsan", RACE),
    # The scheduler runs one block after another; that must not count as an order of accesses.
    ("relaxed_arrival_one_resident", "tsan", RACE),
    ("counter_overwritten", "native", WRONG),
    ("counter_overwritten", "tsan", RACE),
    ("shared_out_of_bounds", "asan", ASAN + "heap-buffer-overflow"),
    ("peer_out_of_bounds", "asan", ASAN + "heap-buffer-overflow"),
    ("global_out_of_bounds", "asan", ASAN + "heap-buffer-overflow"),
    ("misaligned_vector", "asan", "runtime error: .*misaligned address"),
]


@every_build
def test_healthy_kernels_pass(built):
    result = build.run(built, *HEALTHY)
    assert result.stdout == "".join(f"{case}: ok\n" for case in HEALTHY)
    assert result.returncode == 0


@every_build
def test_misuse_is_reported(built):
    # One process runs all cases: a failed launch must leave nothing behind.
    result = build.run(built, *REPORTED)
    lines = result.stdout.splitlines()
    assert len(lines) == len(REPORTED), result.stdout
    for line, (case, report) in zip(lines, REPORTED.items(), strict=True):
        assert line.startswith(f"{case}: {report}")
    assert result.returncode == 1


@pytest.mark.parametrize(
    ("case", "program", "report"),
    [
        pytest.param(case, BUILDS[name], report, id=f"{case}-{name}-{report}")
        for case, name, report in FOUND
    ],
)
def test_planted_bugs_are_found(built, case, report):
    result = build.run(built, case)
    assert re.search(report, result.stdout), result.stdout
    assert result.returncode != 0


def test_every_case_is_listed():
    source = "".join(path.read_text() for path in build.SELF_TEST)
    cases = re.findall(r'^      \{"(\w+)"', source, re.MULTILINE)
    assert sorted(cases) == sorted({*HEALTHY, *REPORTED, *(case for case, _, _ in FOUND)})
