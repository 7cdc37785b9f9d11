"""What the tests of torch.compile share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_caches():
    """Graphs of an earlier run, with the strides that fake kernels promised then."""
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


def describe(tensors) -> list[tuple]:
    return [(t.shape, t.dtype, t.stride()) for t in tensors]
