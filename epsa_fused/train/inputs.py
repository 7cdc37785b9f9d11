"""Batches as a network takes them: checked, on its device and normalised."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import Config
from .errors import InputError
from .loading import Batch
from .messages import Messages

AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Inputs:
    """The batches of a training or an evaluation, for the network.

    Args:
        config: its device apart, which may be "auto".
        device: the network's.
        mean, std: of each channel, in units of a pixel's value; () leaves images as they are.
        messages: where images that are left out are named.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
        messages: Messages,
    ) -> None:
        self.device, self.skip, self.messages = device, config.corrupt == "skip", messages
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.dtype = AUTOCAST[config.amp]
        self.mean, self.std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std)
        )
        self.named: set[str] = set()  # the corrupt images that were reported

    def check(self, batch: Batch) -> None:
        """Raise InputError for images that cannot be used, or name those that are left out."""
        if batch.failed:
            raise InputError(batch.failed)
        for message in batch.corrupt:
            if not self.skip:
                raise InputError(
                    f"an image cannot be read: {message} (--corrupt skip leaves such images out)"
                )
            if message not in self.named:
                self.named.add(message)
                self.messages.write(f"left out, cannot be read: {message}", sys.stderr)

    def prepared(self, batch: Batch) -> Tensor:
        """The normalised images, float32 [N, C, H, W] on the device."""
        images = batch.images.to(self.device, non_blocking=True)
        images = images.to(torch.float32, memory_format=self.layout)
        return images.sub_(self.mean).div_(self.std) if self.mean.numel() else images

    def autocast(self) -> torch.autocast:
        """The context in which the network computes."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)
