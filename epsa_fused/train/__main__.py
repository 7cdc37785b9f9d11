"""`python -m epsa_fused.train` and `epsa-train`, also under torchrun.

`--help` lists the options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .._commands import forget_unread
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


def command() -> int:
    """Train as the command line says; pyproject.toml names this for `epsa-train`."""
    try:
        return main()
    finally:  # argparse leaves --help by SystemExit
        forget_unread()


if __name__ == "__main__":
    sys.exit(command())
