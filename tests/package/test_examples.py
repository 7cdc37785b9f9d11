"""The scripts of examples/, as users run them, with short settings.

test_deployment.py makes its package by serve.py, and runs it by run_package.cpp.
"""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import serve
import torch
from support.optional import optional
from support.pages import PAGES, environment
from support.paths import ROOT

from epsa_fused.models import small_epsanet

EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: object, folder: Path) -> str:
    """What the script prints; it runs in `folder`."""
    command = [sys.executable, EXAMPLES / script, *arguments]
    result = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return result.stdout


def test_the_page_lists_every_script():
    scripts = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".cpp")}
    assert scripts == set(re.findall(r"\(\.\./examples/([\w.]+)\)", PAGES["docs/examples.md"]))


def test_fuse_your_model(tmp_path):
    printed = run("fuse_your_model.py", folder=tmp_path)
    assert "fuse: 16 replaced, 0 left alone" in printed
    (error,) = re.findall(r"^largest difference: (.+)$", printed, re.MULTILINE)
    assert 0 < float(error) < 1e-5  # rounding in float32 over 50 layers


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a training by fine_tune.py, from weights for other classes; what it printed."""
    for package in ("numpy", "tqdm", "PIL"):
        optional(package)
    import fine_tune
    from support.training import SHORT, images

    folder, printed = tmp_path_factory.mktemp("fine_tuned"), io.StringIO()
    torch.save(small_epsanet(7).state_dict(), folder / "weights.pt")
    with contextlib.redirect_stdout(printed):
        fine_tune.main(images(), str(folder / "weights.pt"), out=str(folder / "run"), **SHORT)
    return folder / "run", printed.getvalue()


def test_fine_tune(fine_tuned):
    run, printed = fine_tuned
    tensors = len(small_epsanet(3).state_dict())
    assert f"{tensors - 2} of {tensors} tensors taken" in printed  # all but the classifier's
    top1 = torch.load(run / "best.pt", weights_only=True)["top1"]
    assert f"{top1:.1%} of the held-out images are named right" in printed


def test_scales(fine_tuned, tmp_path):
    optional("matplotlib")
    from support.training import images

    files = sorted(Path(images(), "val", "bee").iterdir())[:2]
    run("scales.py", fine_tuned[0], *files, folder=tmp_path)
    pictures = {path.name for path in tmp_path.iterdir()}
    assert pictures == {"depth.png", *(f"{file.stem}-scales.png" for file in files)}


def test_serve():
    """In Python; the package for C++ is test_deployment.py's."""
    model, images = small_epsanet(10).eval(), torch.randn(2, 3, 16, 16)
    served = serve.compiled(model, images)
    with torch.no_grad():
        torch.testing.assert_close(served(images), model(images), rtol=1e-4, atol=1e-4)


def test_detection(tmp_path):
    """It finds the flower that it was shown."""
    optional("torchvision.models.detection")
    optional("sklearn")
    (overlap,) = re.findall(r"IoU (\S+)$", run("detection.py", folder=tmp_path), re.MULTILINE)
    assert float(overlap) > 0.5
