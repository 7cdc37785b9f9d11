"""The types that the package promises to a program that is checked by mypy."""

from __future__ import annotations

import re

import pytest
from support.paths import ROOT

CACHE = ROOT / "build" / "mypy"
PROGRAM = """
from torch import Tensor, nn

import epsa_fused
from epsa_fused import epsanet50, fuse, prepack, psa_attention, psa_attention_reference, unpack
from epsa_fused.convolution import spc_conv
from epsa_fused.detection import foreground_only, fpn_backbone

class Network(nn.Module): ...

def attend(feats: list[Tensor], w: Tensor, wanted: bool) -> None:
    reveal_type(psa_attention(feats, w, w, w, None))  # Tensor
    reveal_type(psa_attention(feats, w, w, w, w, return_attention=False))  # Tensor
    reveal_type(psa_attention(feats, w, w, w, w, return_attention=True))  # tuple[Tensor, Tensor]
    reveal_type(
        psa_attention(feats, w, w, w, w, return_attention=wanted)
    )  # Tensor | tuple[Tensor, Tensor]
    reveal_type(psa_attention_reference(feats, w, w, w, w))  # Tensor
    reveal_type(
        psa_attention_reference(feats, w, w, w, w, return_attention=True)
    )  # tuple[Tensor, Tensor]
    reveal_type(spc_conv(w, [w], [1], padding=[1]))  # tuple[list[Tensor], Tensor]

reveal_type(fuse(Network()))  # Network
reveal_type(fuse(Network(), inplace=True))  # Network
reveal_type(prepack(Network(), 1))  # Network
reveal_type(unpack(Network()))  # Network
reveal_type(epsanet50(10, in_chans=1, norm_layer=nn.BatchNorm2d))  # EPSANet
reveal_type(epsa_fused.FusedPSAModule(64, 64).unpack())  # FusedPSAModule
reveal_type(foreground_only(Network()))  # Network
reveal_type(fpn_backbone(epsanet50()))  # Module
reveal_type(epsa_fused.__version__)  # str
"""
WRONG = """
from epsa_fused import epsanet50

epsanet50(in_chans="3")
epsanet50(in_channels=3)
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[str]:
    """mypy's output for both programs, in a folder outside of the clone.

    It takes the settings and the cache of `make lint`, so that it need not analyse torch again.
    """
    api = pytest.importorskip("mypy.api")
    folder = tmp_path_factory.mktemp("programs")
    (folder / "right.py").write_text(PROGRAM)
    (folder / "wrong.py").write_text(WRONG)
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(CACHE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MYPYPATH", str(ROOT))
        output, errors, _ = api.run([*options, "right.py", "wrong.py"])
    assert not errors
    return output.splitlines()


def test_the_promised_types(lines):
    found = [line for line in lines if line.startswith("right.py")]
    revealed = [m[1] for line in found if (m := re.search(r'Revealed type is "(.+)"', line))]
    assert len(revealed) == len(found), found
    short = [re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", name) for name in revealed]
    assert short == re.findall(r"# (.+)", PROGRAM)


def test_wrong_options_are_errors(lines):
    first, second = (line for line in lines if line.startswith("wrong.py") and "error" in line)
    assert re.match(r'wrong.py:4: error: .*"in_chans" .*"str"; expected "int"', first)
    assert re.match(r'wrong.py:5: error: Unexpected keyword argument "in_channels"', second)
