"""FusedSplitPSA by itself."""

import pytest
import torch
from support.lookalikes.parts import external_psa
from support.tolerance import assert_near
from torch import nn

from epsa_fused import FusedSplitPSA, fuse


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("order", ("reversed", "forward"))
def test_split_psa(order, bias):
    """Against the module that it is made from; biases and the order are its own."""
    theirs = external_psa(branches=3).double()
    if bias:
        for se in theirs.se_blocks:
            se[1], se[3] = nn.Conv2d(16, 4, 1).double(), nn.Conv2d(4, 16, 1).double()
    fused = FusedSplitPSA(theirs.convs, theirs.se_blocks, branch_order=order)
    x = torch.randn(2, 48, 5, 6, dtype=torch.float64)
    expected = theirs(x)
    if order == "reversed":
        expected = torch.cat(expected.chunk(3, 1)[::-1], 1)
    assert_near(fused(x).detach(), expected.detach())
    assert f"branch_order='{order}'" in repr(fused)


def test_split_psa_refuses_what_it_would_leave_out():
    theirs = external_psa()
    with pytest.raises(ValueError, match=r"branch_order: expected one of"):
        FusedSplitPSA(theirs.convs, theirs.se_blocks, branch_order="other")
    with pytest.raises(ValueError, match=r"FusedSplitPSA: it has 3 convs and 4 se_blocks"):
        FusedSplitPSA(theirs.convs[:3], theirs.se_blocks)


def test_split_psa_compiles():
    fused = fuse(nn.Sequential(external_psa()))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 64, 6, 6)
    assert torch.equal(compiled(x), fused(x))
