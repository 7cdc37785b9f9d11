"""Helpers of the tests of torch.compile."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode


@pytest.fixture(autouse=True)
def _no_caches():
    """Cached graphs hold strides that fake kernels promised in an earlier run."""
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


def describe(tensors) -> list[tuple]:
    return [(t.shape, t.dtype, t.stride()) for t in tensors]


def meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def assert_fakes_look_real(outputs: Callable[[Callable[[Tensor], Tensor]], Iterable[Tensor]]):
    """`outputs` applies a function to its inputs. Strides decide what torch.compile emits."""
    real = describe(outputs(lambda t: t))
    with FakeTensorMode() as mode:
        assert describe(outputs(mode.from_tensor)) == real
    assert describe(outputs(meta)) == real


SIZES = ((2, 8, 9), (3, 10, 7), (5, 6, 6))


def assert_one_graph_serves_every_size(function: Callable, channels: int, device="cpu") -> None:
    """mark_dynamic raises where an operator's fake kernel fixes a size."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(function, fullgraph=True, backend=count)
    for n, h, w in SIZES:
        x = torch.randn(n, channels, h, w, device=device)
        for d in (0, 2, 3):
            torch._dynamo.mark_dynamic(x, d)
        for actual, expected in zip(compiled(x), function(x), strict=True):
            assert torch.equal(actual, expected)
    assert len(graphs) == 1
