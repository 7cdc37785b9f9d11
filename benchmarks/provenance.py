"""What was measured: the commit and the kernels' sources. Needs nothing but Python."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent


def commit() -> str:
    """The measured commit, followed by + if files differ from it.

    It is unknown where Python takes an installed copy of the package, not this checkout's.
    """
    found = importlib.util.find_spec("epsa_fused")
    if found and found.origin and HERE.parent not in Path(found.origin).resolve().parents:
        return "unknown"

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments), cwd=HERE, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # A benchmark that adds rows to a committed file changes nothing that is measured.
        changed = git(
            *("status", "--porcelain", "--untracked-files=no"),
            *("--", "..", ":(top,exclude)benchmarks/results"),
        )
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def sources() -> str:
    """A digest of the kernels' sources. It works where no commit is known, too."""
    return digest_of(sorted((HERE.parent / "csrc").rglob("*.*")))


def programs() -> str:
    """A digest of the Python code that a GPU's figures depend on."""
    package = sorted((HERE.parent / "epsa_fused").rglob("*.py"))
    return digest_of(
        [*package, *sorted(HERE.glob("gpu*.py")), HERE / "exact.py", HERE / "opponents.py"]
    )


def digest_of(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
