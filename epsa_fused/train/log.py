"""Logs: CSV files that a resumed run continues, and TensorBoard events."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import InputError, required


class CsvLog:
    """A CSV file of numbers, one row per call of :meth:`write`; its first column is "step".

    Rows of steps after `step` are dropped: a run resumed there writes them again. Incomplete rows,
    as a machine that stopped may leave them, are dropped too.
    """

    def __init__(self, path: Path, columns: Sequence[str], step: int) -> None:
        kept = []
        if path.exists():
            lines = path.read_bytes().decode("ascii", "replace").splitlines(keepends=True)
            rows = [line.rstrip("\r\n").split(",") for line in lines if line.endswith("\n")]
            kept = [
                row
                for row in rows[1:]
                if len(row) == len(columns) and row[0].isdecimal() and int(row[0]) <= step
            ]
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *kept])
        os.replace(partial, path)
        self.path, self.columns = path, columns
        # Unbuffered: a written row is in the file, and closing has nothing left to write.
        self.file = path.open("ab", buffering=0)

    def write(self, row: Mapping[str, float | int]) -> None:
        """Append a row, floats in full precision; InputError if the disk is full."""
        line = ",".join(repr(row[name]) for name in self.columns) + "\r\n"
        try:
            self.file.write(line.encode())
        except OSError as error:
            raise InputError(f"{self.path}: cannot write a row: {error.strerror}") from error

    def close(self) -> None:
        self.file.close()


class Logs:
    """steps.csv, epochs.csv and, if asked for, TensorBoard events, in one folder.

    Args:
        folder: where they are.
        step: the steps done; steps.csv continues after it.
        evaluated: the steps of the last evaluated epoch's end; epochs.csv continues after it.
        tensorboard: whether to write TensorBoard events too.

    Raises:
        InputError: TensorBoard is asked for and not installed.
    """

    STEPS = (
        "step",
        "epoch",
        "lr",
        "loss",
        "images_per_s",
        "loader_images_per_s",
        "share_waiting",
    )
    EPOCHS = ("step", "epoch", "lr", "loss", "held_out_loss", "top1", "top5", "seconds")

    def __init__(self, folder: Path, step: int, evaluated: int, tensorboard: bool) -> None:
        self.board = None
        if tensorboard:
            required("tensorboard", "--tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=step + 1)
        self.steps = CsvLog(folder / "steps.csv", self.STEPS, step)
        self.epochs = CsvLog(folder / "epochs.csv", self.EPOCHS, evaluated)

    def step(self, row: Mapping[str, float | int]) -> None:
        self.steps.write(row)
        self._show("step", row)

    def epoch(self, row: Mapping[str, float | int]) -> None:
        self.epochs.write(row)
        self._show("epoch", row)

    def _show(self, kind: str, row: Mapping[str, float | int]) -> None:
        if self.board is None:
            return
        for name, value in row.items():
            if name != "step":
                self.board.add_scalar(f"{kind}/{name}", value, row["step"])

    def close(self) -> None:
        self.steps.close()
        self.epochs.close()
        if self.board is not None:
            self.board.close()
