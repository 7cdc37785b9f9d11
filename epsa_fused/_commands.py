"""What commands of the package do about output that nobody reads any more, as under `| head`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

# The shells' exit code for a program that wrote to a pipe without a reader.
UNREAD = 141


def forget_unread() -> bool:
    """Drop output that has no reader any more. Returns whether there was none.

    Python would try to write it again at exit, fail, and return 120.
    """
    try:
        print(end="", flush=True)  # unlike a flush, it does without a stdout
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def while_read(main: Callable[[], int]) -> int:
    """Run main, and end quietly where the reader of its output ends first."""
    try:
        code = main()
    except BrokenPipeError:
        forget_unread()
        return UNREAD
    except BaseException:  # what went wrong counts more; argparse leaves --help by SystemExit
        forget_unread()
        raise
    return code if forget_unread() else UNREAD
