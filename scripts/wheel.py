"""Builds the wheel of this checkout for the torch that is installed, and repairs it.

wheel.py FOLDER                   builds, and puts the repaired wheel into FOLDER
wheel.py FOLDER --repair WHEEL    repairs one that cibuildwheel built
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# They come with torch, which has loaded them before the extension.
LIBRARIES_OF_TORCH = ("libc10*.so", "libtorch*.so", "libcudart.so.*")


def run(*command: str | Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | {"PATH": path})
    if result.returncode:
        sys.exit(result.returncode)  # the command has said why


def build() -> Path:
    """The wheel, tagged for Linux in general. It takes what an earlier build compiled."""
    # cibuildwheel sets it, too; see setup.py
    os.environ["EPSA_LOCAL_VERSION"] = "1"
    setup = runpy.run_path(str(ROOT / "setup.py"))
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and setup["cuda_wanted"]():
        # for other machines than this one, whatever GPU it has
        os.environ["TORCH_CUDA_ARCH_LIST"] = setup["default_architectures"]()
    base = Path("build", "wheel")
    shutil.rmtree(ROOT / base, ignore_errors=True)  # modules that are gone would be packed too
    run(
        *("setup.py", "build", "--build-base", base, "--build-temp", "build/temp"),
        *("bdist_wheel", "--skip-build", "--dist-dir", base),
    )
    (wheel,) = (ROOT / base).glob("*.whl")
    return wheel


def repair(wheel: Path, folder: Path) -> None:
    """Give the wheel the oldest manylinux tag that its symbols allow."""
    excluded = [f"--exclude={name}" for name in LIBRARIES_OF_TORCH]
    run("-m", "auditwheel", "repair", *excluded, "--wheel-dir", folder.resolve(), wheel.resolve())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the repaired wheel goes")
    parser.add_argument("--repair", type=Path, metavar="WHEEL", help="a wheel that is built")
    options = parser.parse_args()
    repair(options.repair or build(), options.folder)


if __name__ == "__main__":
    main()
