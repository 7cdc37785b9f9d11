"""What a function allocates from PyTorch's CPU allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.profiler import ProfilerActivity, profile


def allocations(function: Callable[[], object]) -> list[int]:
    """The sizes in bytes of all allocations while `function` runs, in order. Memory that is freed
    again counts, and so does memory of C++ code."""
    function()  # the first call sets up caches
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    sizes: list[int] = []

    def visit(events: Iterable) -> None:
        for event in events:
            if event.name == "[memory]" and event.extra_fields.alloc_size > 0:
                sizes.append(event.extra_fields.alloc_size)
            visit(event.children)

    visit(profiler.profiler.kineto_results.experimental_event_tree())
    assert sizes, "the profiler saw no allocation at all"
    return sizes
