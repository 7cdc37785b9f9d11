"""`python -m epsa_fused.train` and `epsa-train`, also under torchrun.

`--help` lists the options.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .errors import InputError

# The shells' exit code after Ctrl-C: a script stops here.
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and return the exit code.

    0: the training is done. 130: it was interrupted, and saved. 2: an input cannot be used.
    """
    try:
        from .config import Config
        from .training import train

        return INTERRUPTED if train(Config.of_command_line(arguments)).interrupted else 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _forget_unread() -> None:
    """Drop output that has no reader any more.

    Python would try to write it again at exit, fail, and return 120.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command() -> int:
    """Train as the command line says; pyproject.toml names this for `epsa-train`."""
    code = main()
    _forget_unread()
    return code


if __name__ == "__main__":
    sys.exit(command())
