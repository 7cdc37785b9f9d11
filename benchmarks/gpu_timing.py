"""Time, memory and launches of calls on a GPU."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

Call = Callable[[], object]
# The least number of calls before a capture. The first one compiles and chooses cuDNN's algorithms.
# An optimizer makes its state in the first step, and takes another path from the second on.
WARM_UP = 3


class Meter:
    """Measures calls on the current GPU and stream.

    What touches the device is in methods of their own: tests replace these where no GPU is.
    """

    device = "cuda"

    def __init__(self, repeats: int = 15) -> None:
        self.repeats = repeats

    # ---- the device ----

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def sets(self, nbytes: int) -> int:
        """The number of input sets: each has left the L2 cache before its turn comes again.

        It is at most 64, which is too few for a single image.
        """
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return min(64, max(2, -(-4 * cache // nbytes)))

    @contextmanager
    def without_search(self) -> Iterator[None]:
        """cuDNN takes the algorithm that it guesses: for what runs once, untimed.

        cuDNN's plans are remembered by shape and dtype. So nothing of a timed row's may run here:
        the row would keep the guess.
        """
        searches = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = False
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = searches

    def capture(self, calls: Sequence[Call]) -> Call:
        """Runs all calls, one after another, by one launch; RuntimeError if that can't be."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            kept = [call() for call in calls]
        del kept
        return graph.replay

    def elapsed(self, run: Call) -> float:
        """Seconds on the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()  # keeps the device busy while the host launches what is timed
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def launches(self, call: Call) -> tuple[int, int]:
        """Kernels and memsets of one call."""
        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            call()
            self.synchronize()
        names = [
            e.name
            for e in profiler.events()
            if e.device_type == DeviceType.CUDA
            and not e.is_user_annotation
            and not e.name.lower().startswith("memcpy")
        ]
        memsets = sum(name.lower().startswith("memset") for name in names)
        return len(names) - memsets, memsets

    def peak_memory(self, call: Call) -> int:
        """Bytes beyond those that were allocated before the call."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak

    # ---- figures ----

    def device_times(self, calls: Sequence[Call]) -> tuple[list[float], str]:
        """Seconds of one call on the device, once per repeat, and how they were taken.

        The calls run one after another inside one captured graph, so that the host's time to
        launch them does not count. What can't be captured is timed as it is launched, and says so.
        """

        def launch() -> None:
            for call in calls:
                call()

        for _ in range(-(-WARM_UP // len(calls))):
            launch()
        self.synchronize()
        run, timing = launch, "launched"
        try:
            run, timing = self.capture(calls), "graph"
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a broken capture fails, too
            print(f"  not captured, timed as launched: {cause}", file=sys.stderr, flush=True)
            self.synchronize()
        return [self.elapsed(run) / len(calls) for _ in range(self.repeats)], timing

    def wall_time(self, call: Call) -> float:
        """Median seconds from the call to its result on the device."""
        times = []
        for _ in range(self.repeats):
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def time_columns(self, calls: Sequence[Call]) -> dict:
        """A row's times on the device."""
        times, timing = self.device_times(calls)
        return {
            "device_us": round(statistics.median(times) * 1e6, 2),
            "iqr_us": round(spread(times) * 1e6, 2),
            "timing": timing,
        }

    def columns(self, calls: Sequence[Call]) -> dict:
        """A row's figures. The first call stands for all but in the times on the device."""
        times = self.time_columns(calls)
        kernels, memsets = self.launches(calls[0])
        return times | {
            "wall_us": round(self.wall_time(calls[0]) * 1e6, 2),
            "peak_mb": round(self.peak_memory(calls[0]) / 1e6, 3),
            "kernels": kernels,
            "memsets": memsets,
        }


def spread(times: list[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low
