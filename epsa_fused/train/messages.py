"""What a training prints, and its progress bars."""

from __future__ import annotations

import errno
import sys
from typing import Any, TextIO

from .errors import required
from .processes import Processes


class Messages:
    """Lines and progress bars in a terminal, which may be closed while the training runs.

    Raises:
        InputError: tqdm is not installed.
    """

    def __init__(self, processes: Processes) -> None:
        self.first = processes.first
        self.tqdm = required("tqdm", "training", "tqdm").tqdm

    def say(self, line: str) -> None:
        """Print a line in the first process."""
        if self.first:
            self.write(line, sys.stdout)

    def write(self, line: str, file: TextIO) -> None:
        """Print a line beside the bars, in every process that calls it."""
        try:
            self.tqdm.write(line, file=file)
            file.flush()
        except OSError as error:
            # EIO is a closed terminal, EPIPE a reader that ended (Ctrl-C ends tee too).
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise

    def bar(self, *args: Any, **options: Any) -> Any:
        """A progress bar of the first process."""
        # None draws bars only in a terminal.
        return self.tqdm(*args, leave=False, disable=None if self.first else True, **options)
