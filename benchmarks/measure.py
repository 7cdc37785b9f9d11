"""Time, memory and launches of callables. Several callables are timed in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile
from torch.utils.benchmark import Timer


@dataclass
class Timing:
    """Seconds per call, with one median per round: contenders are compared round by round."""

    rounds: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # every block of every round

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def iqr(self) -> float:
        if len(self.times) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return high - low


def settle_allocator() -> None:
    """Bring glibc's malloc to its state in a program that ran larger tensors.

    Until a large block is freed once, malloc returns freed memory to the system and gets it back
    zeroed page by page. A contender's time would then depend on what ran before it.
    """
    torch.ones(31 * 2**20, dtype=torch.uint8)


def time_in_turn(
    runs: dict[str, Callable[[], object]], threads: int, rounds: int, seconds: float
) -> dict[str, Timing]:
    """Time each callable for `seconds` in every round, by blocked_autorange.

    The machine's speed drifts: contenders of one round meet the same machine.
    """
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=threads)
        for name, run in runs.items()
    }
    timings = {name: Timing() for name in runs}
    for timer in timers.values():
        timer.timeit(3)
    for _ in range(rounds):
        for name, timer in timers.items():
            block = timer.blocked_autorange(min_run_time=seconds)
            timings[name].rounds.append(block.median)
            timings[name].times.extend(block.times)
    return timings


def ratio(of: Timing, over: Timing) -> float:
    """Median over the rounds of time(of) / time(over)."""
    pairs = zip(of.rounds, over.rounds, strict=True)
    return statistics.median(a / b for a, b in pairs)


def memory_and_launches(run: Callable[[], object], device: str) -> tuple[int, int]:
    """The bytes that one call allocates at its peak, and its launches.

    Launches are kernel launches on a GPU. On the CPU they are operators that call no operator.
    """
    run()
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with profile(activities=activities, profile_memory=True) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    if device == "cuda":
        kernels = sum(e.device_type == DeviceType.CUDA for e in profiler.events())
        return torch.cuda.max_memory_allocated() - before, kernels

    operators = 0
    changes: list[tuple[int, int]] = []

    def is_operator(event) -> bool:
        return event.name.startswith(("aten::", "epsa_fused::", "mkldnn::"))

    def visit(events) -> None:
        nonlocal operators
        for event in events:
            if event.name == "[memory]":
                changes.append((event.start_time_ns, event.extra_fields.alloc_size))
            operators += is_operator(event) and not any(is_operator(c) for c in event.children)
            visit(event.children)

    visit(profiler.profiler.kineto_results.experimental_event_tree())
    current = peak = 0
    for _, size in sorted(changes):
        current += size
        peak = max(peak, current)
    return peak, operators
