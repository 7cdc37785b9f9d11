"""The processes of a training: one alone, or those that torchrun started."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Self

from .errors import InputError


class Processes:
    """A context in which the processes of a training can communicate.

    Under torchrun (WORLD_SIZE is set) they use the default process group: NCCL for CUDA tensors,
    Gloo on the CPU. Without torchrun there is one process, and nothing is set up.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        InputError: this process has no CUDA device, and needs one.
    """

    def __init__(self, device: str) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.launched = "WORLD_SIZE" in os.environ
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        available = torch.cuda.device_count()
        if device == "cpu" or (device == "auto" and available == 0):
            self.device = torch.device("cpu")
        elif local_rank >= available:
            raise InputError(
                f"--device {device}: expected a CUDA device for each process of this machine, got "
                f"{available} for process {local_rank + 1}"
            )
        else:
            self.device = torch.device("cuda", local_rank)

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.launched:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            # Gloo carries everything but CUDA tensors: it waits for no kernel.
            self._host = dist.new_group(backend="gloo")
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        # After an error the other processes may wait in a collective that this one skipped.
        if self.launched and kind is None:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, with gradients averaged over the processes."""
        if not self.launched:
            return model
        return DistributedDataParallel(
            model, device_ids=[self.device] if self.device.type == "cuda" else None
        )

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.launched:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; every process gets the same answer."""
        if not self.launched:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._host)
        return bool(flags)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the first process; [] in the others."""
        if not self.launched:
            return [value]
        values = [None] * self.count if self.first else None
        dist.gather_object(value, values, group=self._host)
        return values or []

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the first process's buffers to the others: BatchNorm's statistics differ."""
        if self.launched:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
