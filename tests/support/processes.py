"""Fresh Python processes: instruction set, thread pool and forks cannot be undone in this one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def python(*args: str, timeout: int = 300, check: bool = True, **environment: str) -> str:
    """What `python args...` prints (both streams); AssertionError where it fails."""
    result = subprocess.run(
        [sys.executable, *args],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert not check or result.returncode == 0, f"exit code {result.returncode}:\n{result.stdout}"
    return result.stdout


def run_code(code: str, **environment: str) -> str:
    return python("-c", textwrap.dedent(code), timeout=60, **environment)
