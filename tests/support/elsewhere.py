"""Which copy of the package programs import that run in another folder than this checkout."""

from __future__ import annotations

import subprocess
import sys
import tempfile

FIND = """
from importlib.util import find_spec
found = find_spec("epsa_fused")
print(found and found.origin or "")
"""


def imported_elsewhere() -> str:
    """Its __init__.py; "" where there is none."""
    return subprocess.run(
        [sys.executable, "-c", FIND],
        cwd=tempfile.gettempdir(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()
