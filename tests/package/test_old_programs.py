"""Exported programs of older versions still load, and compute what they did.

A schema may only gain arguments with defaults. Each file in programs/ was exported before it gained
some, from `Net` with torch.manual_seed(0):

before_bias.pt2: before spc_conv and psa_forward took a bias; with torch 2.13.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from epsa_fused import FusedPSAModule, psa_attention
from epsa_fused.functional import spc_conv

PROGRAMS = sorted((Path(__file__).parent / "programs").glob("*.pt2"))


class Net(nn.Module):
    """Every operator that inference leaves in a program."""

    def __init__(self) -> None:
        super().__init__()
        self.psa = FusedPSAModule(8, 16, conv_groups=(1, 2, 4, 4), reduction=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        psa = self.psa
        maps, means = spc_conv(x, [psa.conv_1.weight, psa.conv_2.weight], [1, 2], padding=[1, 2])
        fc1, fc2 = psa.se.fc1, psa.se.fc2
        pair = psa_attention(maps, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return psa(x), pair, means


@pytest.mark.skipif(torch.__version__ < "2.13", reason="the files are of torch 2.13")
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_an_old_program_computes_what_it_did(path):
    program = torch.export.load(path)
    called = {str(node.target) for node in program.graph.nodes if "epsa_fused" in str(node.target)}
    names = {"psa_attention", "psa_forward", "spc_conv"}
    assert called == {f"epsa_fused.{name}.default" for name in names}
    net = Net().eval()
    net.load_state_dict(program.state_dict)
    x = torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        assert all(map(torch.equal, program.module()(x), net(x)))


def test_there_are_some():
    assert PROGRAMS
