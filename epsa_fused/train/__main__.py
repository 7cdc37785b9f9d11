"""`python -m epsa_fused.train`, also under torchrun; `--help` lists the options."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .errors import InputError

# As shells have it for a program that Ctrl-C ended: what follows in a script should not run.
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 when the training is done, 130 when it was interrupted and saved, 2 for
    what the user can mend."""
    try:
        from .config import Config
        from .training import train

        return INTERRUPTED if train(Config.of_command_line(arguments)).interrupted else 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _forget_unread() -> None:
    """What could not be written to a reader that is gone: Python would try again at the end, fail,
    and exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    code = main()
    _forget_unread()
    sys.exit(code)
