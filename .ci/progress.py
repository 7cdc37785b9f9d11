"""Runs a command and never lets the screen stand still for long.

progress.py COMMAND...                 its own lines, and the seconds while it is silent
progress.py --bars COMMAND...          the same, but a terminal is left to the command: pip
progress.py --compile LOG COMMAND...   ninja's counter alone; everything goes into LOG
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

SILENCE = 10.0  # seconds until the next sign of life
TAIL = 50  # lines of the log that a failed build shows
COMPILED = re.compile(r"(\[\d+/\d+\]).* -c (?:-c )?(\S+\.(?:cpp|cu))\b")


def lines_of(process: subprocess.Popen) -> queue.Queue[str | None]:
    """The lines of its output as they come; None is the end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def show(process: subprocess.Popen, log: Path | None) -> None:
    lines, counter = lines_of(process), ""
    start = shown = time.monotonic()
    with open(log or os.devnull, "w") as file:
        while True:
            # since something was shown: lines that go into the log alone are silence, too
            rest = shown + SILENCE - time.monotonic()
            if rest <= 0:
                shown = time.monotonic()
                print(f"  ... {shown - start:.0f} s {counter}", flush=True)
                continue
            try:
                line = lines.get(timeout=rest)
            except queue.Empty:
                continue
            if line is None:
                return
            file.write(line)
            match = COMPILED.match(line)
            if log is None:
                print(line, end="", flush=True)
            elif match:
                counter = match[1]
                print(f"  {counter} {os.path.relpath(match[2])}", flush=True)
            else:
                continue
            shown = time.monotonic()


def main(arguments: list[str]) -> int:
    log = None
    if arguments[0] == "--compile":
        log, arguments = Path(arguments[1]), arguments[2:]
        log.parent.mkdir(parents=True, exist_ok=True)
    elif arguments[0] == "--bars":
        arguments = arguments[1:]
        if sys.stdout.isatty():
            os.execvp(arguments[0], arguments)
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        text=True,
        errors="replace",
    )
    try:
        show(process, log)
    except KeyboardInterrupt:
        process.wait()
        return 130
    code = process.wait()
    if code and log is not None:
        print("".join(log.read_text().splitlines(keepends=True)[-TAIL:]))
        print(f"the build failed; all of its output is in {log}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
