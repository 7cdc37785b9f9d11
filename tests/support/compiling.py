"""Helpers of the tests of torch.compile."""

import pytest
import torch


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
