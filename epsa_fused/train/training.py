"""The training loop: steps, evaluation, and the moments to save."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..backbone import load_backbone
from ..models import MODELS
from . import checkpoint
from .config import Config
from .data import kind_of_data, open_data
from .errors import InputError, required
from .interrupts import Interrupts
from .loading import Batch, EvaluationBatches, Speed, TrainingBatches, loader
from .log import Logs
from .processes import Processes

CHECKPOINT, PREVIOUS, BEST = "checkpoint.pt", "checkpoint.previous.pt", "best.pt"
AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Accuracy:
    """Loss and accuracy on the held-out images."""

    loss: float
    top1: float  # share, 0 to 1
    top5: float  # share with the label among the five likeliest


@dataclass(frozen=True)
class Result:
    """The result of a training."""

    accuracy: Accuracy | None  # of the last epoch that ended
    steps: int
    seconds: float  # of all steps, also before the training was resumed
    interrupted: bool


def train(config: Config) -> Result:
    """Train as `config` says, alone or as one of the processes that torchrun started.

    It writes into `config.out`:

    - checkpoint.pt at the start, every `checkpoint_every` steps, and before and after each epoch's
      evaluation; checkpoint.previous.pt is the checkpoint of an earlier step;
    - best.pt, the weights of the epoch with the best top-1;
    - steps.csv and epochs.csv.

    Ctrl-C, SIGTERM and SIGHUP save after the current step and return. They cut an evaluation off:
    the resumed run repeats it. Outside the main thread signals are left alone.

    Returns:
        The accuracy of the last epoch, the steps, their seconds, and whether it was interrupted.

    Raises:
        InputError: data, settings or a checkpoint cannot be used, an image is unreadable and
            `config.corrupt` is "fail", the disk cannot be written, or a loss is not finite. The
            last saved checkpoint stays.
    """
    with Processes(config.device) as processes, _algorithms(config.deterministic):
        training = Training(config, processes)
        # Signals stay noted until the end: SIGTERM may come twice.
        with Interrupts() as interrupts, contextlib.closing(training):
            return training.run(interrupts)


@contextlib.contextmanager
def _algorithms(deterministic: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it
    torch.use_deterministic_algorithms(deterministic or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Training:
    """The state of one training; it stands at step `step` of epoch `epoch`."""

    def __init__(self, config: Config, processes: Processes) -> None:
        self.config, self.processes = config, processes
        self.device = processes.device
        self.tqdm = required("tqdm", "training", "tqdm").tqdm
        # The first process draws progress bars; None draws them only in a terminal.
        self.hide_bars = None if processes.first else True

        parts = config.accumulate * processes.count
        if config.batch % parts:
            raise InputError(
                f"--batch: expected a multiple of {parts} ({processes.count} processes x "
                f"{config.accumulate} micro-batches each), got {config.batch}"
            )
        self.micro_batch = config.batch // parts
        self.data = open_data(config.data, config.image_size)
        images = len(self.data.train.labels)
        if images < config.batch:
            raise InputError(
                f"--batch: expected at most the {images} training images, got {config.batch}"
            )
        self.path, self.previous = config.folder / CHECKPOINT, config.folder / PREVIOUS
        # A resumed run must have the same.
        self.binding = config.binding() | {
            "device": self.device.type,  # not "auto"
            "processes": processes.count,
            **self.data.description(),
        }
        saved = self._checkpoint()
        self._build(parts, fresh=saved is None)
        self._check_normalised()
        self.epoch = self.step = self.steps_done = 0
        self.best_top1 = -1.0
        self.accuracy: Accuracy | None = None
        self.seconds = 0.0
        self.last_speed = "resumed for the evaluation"
        self.saved_at = -1  # steps done at the last checkpoint
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        if saved is not None:
            self._restore(saved)
        self.logs = None
        if processes.first:
            try:
                config.folder.mkdir(parents=True, exist_ok=True)
                evaluated = self.steps_done - self.step
                self.logs = Logs(config.folder, self.steps_done, evaluated, config.tensorboard)
            except OSError as error:
                raise InputError(f"--out: cannot write to {config.out}: {error}") from error
        if saved is None:
            self._save()  # shows a bad --out now; later runs always have one to resume from

    def _build(self, parts: int, fresh: bool) -> None:
        config, device, data = self.config, self.device, self.data
        torch.manual_seed(config.seed)  # equal initial weights in every process
        model = MODELS[config.model](
            len(data.classes),
            fused=config.psa == "fused",
            in_chans=len(data.mean),
            drop_rate=config.dropout,
        )
        if config.weights and fresh:
            self._start_from(Path(config.weights), model)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=self.layout)
        checkpoint.seed(config.seed + self.processes.rank)  # each process its own dropout
        self.parallel = self.processes.parallel(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.scheduler = (
            StepLR(self.optimizer, config.decay_every, config.decay)
            if config.schedule == "step"
            else CosineAnnealingLR(self.optimizer, config.epochs)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.ema = None
        if config.ema:
            average = get_ema_multi_avg_fn(config.ema)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)

        shape = (1, len(data.mean), 1, 1)
        self.mean = torch.tensor(data.mean, device=device).view(shape)
        self.std = torch.tensor(data.std, device=device).view(shape)
        place = {"rank": self.processes.rank, "processes": self.processes.count}
        pin = device.type == "cuda"
        self.batches = TrainingBatches(
            len(data.train.labels), config.batch, parts, seed=config.seed, **place
        )
        self.loader = loader(data.train, self.batches, config.workers, pin)
        self.held_out = EvaluationBatches(len(data.held_out.labels), self.micro_batch, **place)
        self.held_out_loader = loader(data.held_out, self.held_out, config.workers, pin)
        self.named: set[str] = set()  # the corrupt images that were reported

    # ---- running ----

    def run(self, interrupts: Interrupts) -> Result:
        config = self.config
        stopped = False
        while self.epoch < config.epochs and not stopped:
            # A run that was cut off in an evaluation has no steps left in this epoch.
            if self.step < self.batches.steps:
                stopped = self._steps(interrupts)
            if not stopped:
                stopped = self._end_epoch(interrupts)
        unfinished = self.epoch < config.epochs
        if unfinished:
            self._say(
                f"interrupted and saved after {self.steps_done:,} steps (epoch {self.epoch + 1} of "
                f"{config.epochs}); the same command with --resume goes on"
            )
        else:
            assert self.accuracy is not None  # an epoch has ended
            self._say(
                f"done: {self.steps_done:,} steps, held out: top-1 {self.accuracy.top1:.2%}; "
                f"the best epoch's {self.best_top1:.2%} are in {config.folder / BEST}"
            )
        return Result(self.accuracy, self.steps_done, self.seconds, unfinished)

    def _steps(self, interrupts: Interrupts) -> bool:
        """Train to the epoch's end or an interrupt, and save; returns whether interrupted."""
        self.parallel.train()
        self.batches.start_at(self.epoch, self.step)
        batches = iter(self.loader)
        config, speed = self.config, Speed(self.config.workers)
        bar = self.tqdm(
            desc=f"epoch {self.epoch + 1}/{config.epochs}",
            total=self.batches.steps,
            initial=self.step,
            unit="step",
            leave=False,
            disable=self.hide_bars,
        )
        with bar:
            while self.step < self.batches.steps:
                loss = self._one_step(batches, speed)
                self.step += 1
                self.steps_done += 1
                bar.update()
                ends = self.step == self.batches.steps
                if ends or self.steps_done % config.log_every == 0:
                    bar.set_postfix_str(self._log_step(loss, speed))
                    self.seconds += speed.seconds
                    speed.reset()
                stopped = self.processes.any(interrupts.pending)
                # Save at the epoch's end too: the evaluation may take long.
                if stopped or ends or self.steps_done % config.checkpoint_every == 0:
                    self.seconds += speed.seconds
                    self._save()
                    speed.reset()
                if stopped:
                    return True
        return False

    def _one_step(self, batches: Iterator[Batch], speed: Speed) -> Tensor:
        """Train one step; returns this process's loss, a scalar."""
        accumulate = self.config.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for i in range(accumulate):
            start = time.perf_counter()
            batch = next(batches)
            speed.count(batch, time.perf_counter() - start)
            self._check_images(batch)
            self._check_readable(len(batch.labels))
            with self._gradients_shared(i + 1 == accumulate):
                with self._autocast():
                    logits = self.parallel(self._prepared(batch))
                    labels = batch.labels.to(self.device, non_blocking=True)
                    loss = F.cross_entropy(logits, labels, label_smoothing=self.config.smoothing)
                    loss = loss / accumulate
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.loss_sum += total
        return total

    def _gradients_shared(self, shared: bool) -> contextlib.AbstractContextManager[None]:
        """A context whose backward pass averages gradients over the processes, or does not."""
        if shared or not isinstance(self.parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return cast(contextlib.AbstractContextManager[None], self.parallel.no_sync())

    def _end_epoch(self, interrupts: Interrupts) -> bool:
        """Evaluate and save; returns whether interrupted. The resumed run then evaluates."""
        result = self._evaluate(interrupts)
        if result is None:
            return True
        lr = float(self.scheduler.get_last_lr()[0])
        loss = self._finite_mean_loss()
        with warnings.catch_warnings():  # after resuming, it warns of the order of the calls
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self._check_loss(result.loss)  # before its weights are saved
        self.accuracy = result
        self.epoch += 1
        if self.logs is not None:
            self.logs.epoch(
                {
                    "step": self.steps_done,
                    "epoch": self.epoch,
                    "lr": lr,
                    "loss": loss,
                    "held_out_loss": result.loss,
                    "top1": result.top1,
                    "top5": result.top5,
                    "seconds": round(self.seconds, 3),
                }
            )
        self._say(
            f"epoch {self.epoch}/{self.config.epochs}  loss {loss:.4f}  held out: "
            f"loss {result.loss:.4f}, top-1 {result.top1:.2%}, top-5 {result.top5:.2%}  "
            f"{self.last_speed}"
        )
        self.step = 0
        self.loss_sum.zero_()
        if result.top1 > self.best_top1:
            self.best_top1 = result.top1
            if self.processes.first:
                checkpoint.write(self.config.folder / BEST, self._best())
        self._save()
        return self.processes.any(interrupts.pending)

    @torch.no_grad()
    def _evaluate(self, interrupts: Interrupts) -> Accuracy | None:
        """Evaluate the held-out images; None at an interrupt."""
        model = self.model if self.ema is None else self.ema.module
        self.processes.share_buffers(model)
        model.eval()
        # loss, top 1, top 5, images
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        batches = iter(self.held_out_loader)
        for _ in self.tqdm(
            range(self.held_out.longest), "held out", leave=False, disable=self.hide_bars
        ):
            if self.processes.any(interrupts.pending):
                return None
            batch = next(batches, None)  # some processes have one batch less
            if batch is None:
                continue
            self._check_images(batch)
            if not len(batch.labels):
                continue
            with self._autocast():
                logits = model(self._prepared(batch))
            labels = batch.labels.to(self.device)
            ranks = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            sums += torch.stack(
                [
                    F.cross_entropy(logits.double(), labels, reduction="sum"),
                    ranks[:, 0].sum(),
                    ranks.sum(),
                    torch.tensor(len(labels), device=self.device),
                ]
            )
        loss, top1, top5, images = self.processes.total(sums).tolist()
        if not images:
            raise InputError("evaluation: expected at least one readable held-out image, got none")
        return Accuracy(loss / images, top1 / images, top5 / images)

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.config.amp]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _prepared(self, batch: Batch) -> Tensor:
        """The normalised images, float32 [N, C, H, W] on the device."""
        images = batch.images.to(self.device, non_blocking=True)
        images = images.to(torch.float32, memory_format=self.layout)
        return images.sub_(self.mean).div_(self.std)

    # ---- messages and checks ----

    def _start_from(self, path: Path, model: nn.Module) -> None:
        try:
            report = load_backbone(model, checkpoint.read_weights(path))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"--weights: {path}: {error}") from error
        self._say(f"--weights: {path}: {report}")

    def _say(self, line: str) -> None:
        if self.processes.first:
            self._write(line, sys.stdout)

    def _write(self, line: str, file: TextIO) -> None:
        try:
            self.tqdm.write(line, file=file)
            file.flush()
        except OSError as error:
            # EIO is a closed terminal, EPIPE a reader that ended (Ctrl-C ends tee too).
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise

    def _check_images(self, batch: Batch) -> None:
        if batch.failed:
            raise InputError(batch.failed)
        for message in batch.corrupt:
            if self.config.corrupt == "fail":
                raise InputError(
                    f"an image cannot be read: {message} (--corrupt skip leaves such images out)"
                )
            if message not in self.named:
                self.named.add(message)
                self._write(f"left out, cannot be read: {message}", sys.stderr)

    def _check_normalised(self) -> None:
        """InputError if every micro-batch is one image, and BatchNorm needs two."""
        config, count = self.config, self.processes.count
        if self.micro_batch > 1 or not self._one_image_is_too_few:
            return
        would_do = [f"--batch {2 * config.batch}"]
        if config.accumulate > 1:
            would_do.append("--accumulate 1")
        if kind_of_data(config.data) == "folder":
            would_do.append(f"--image-size {self._image_size_of_two_values()}")
        raise InputError(
            f"--batch: expected at least 2 images in a micro-batch, got {config.batch} for "
            f"{count} processes x {config.accumulate} micro-batches each; "
            f"{self._why_two()}; {' or '.join(would_do)} would do"
        )

    def _check_readable(self, images: int) -> None:
        """InputError if a micro-batch has too few readable images to train on."""
        step = f"step {self.steps_done + 1}: expected at least"
        got = f"in a micro-batch of {self.micro_batch}, got"
        if images == 0:
            raise InputError(f"{step} one readable image {got} none")
        if images == 1 and self._one_image_is_too_few:
            raise InputError(
                f"{step} 2 readable images {got} 1; {self._why_two()}; restore the images that "
                "were left out, or start another run with a larger --batch"
            )

    def _why_two(self) -> str:
        height, width, _ = self.data.train.shape
        return (
            f"images of {height} x {width} give maps of 1 x 1 in {self.config.model}, and "
            "BatchNorm cannot train on a single value"
        )

    @functools.cached_property
    def _one_image_is_too_few(self) -> bool:
        return self._fewest_values(*self.data.train.shape[:2]) == 1

    def _image_size_of_two_values(self) -> int:
        """A larger --image-size, at which one image is enough for BatchNorm."""
        size = self.config.image_size
        while self._fewest_values(size, size) == 1:
            size *= 2
        return size

    @torch.no_grad()
    def _fewest_values(self, height: int, width: int) -> int:
        """The fewest values per channel that a BatchNorm of the network gets from one image."""
        values: list[int] = []
        hooks = [
            module.register_forward_pre_hook(lambda _, given: values.append(given[0][0, 0].numel()))
            for module in self.model.modules()
            if isinstance(module, _BatchNorm)
        ]
        was_training = self.model.training
        weight = next(self.model.parameters())
        try:
            # In eval mode no statistics and no random numbers change.
            self.model.eval()(weight.new_zeros(1, len(self.data.mean), height, width))
        finally:
            self.model.train(was_training)
            for hook in hooks:
                hook.remove()
        return min(values, default=2)

    def _log_step(self, loss: Tensor, speed: Speed) -> str:
        """Write a row of steps.csv; returns the text of the progress bar."""
        count = self.processes.count
        mean = self.processes.total(loss.double()).item() / count  # waits for the step
        self._check_loss(mean)
        row: dict[str, float] = {
            "step": self.steps_done,
            "epoch": self.epoch + 1,
            "lr": float(self.scheduler.get_last_lr()[0]),
            "loss": mean,
            "images_per_s": round(speed.of_steps * count, 1),
            "loader_images_per_s": round(speed.of_loader * count, 1),
            "share_waiting": round(speed.share_waiting, 4),
        }
        if self.logs is not None:
            self.logs.step(row)
        self.last_speed = (
            f"{row['images_per_s']:,.0f} images/s (loader {row['loader_images_per_s']:,.0f}, "
            f"waited for {row['share_waiting']:.0%})"
        )
        return f"loss {mean:.4f}, {self.last_speed}"

    def _finite_mean_loss(self) -> float:
        """The mean loss of the epoch so far, over all processes; InputError if not finite."""
        total = self.processes.total(self.loss_sum.clone()).item()
        mean = total / max(1, self.step) / self.processes.count
        self._check_loss(mean)
        return mean

    def _check_loss(self, loss: float) -> None:
        if not abs(loss) < float("inf"):
            self._stop_for(f"expected a finite loss, got {loss}")

    def _stop_for(self, reason: str) -> NoReturn:
        """Raise InputError with the reason and the checkpoints that exist."""
        kept = f"{self.path} is the last checkpoint"
        if self.previous.exists():
            kept += f", {self.previous} one of an earlier step"
        raise InputError(f"step {self.steps_done}: {reason} (--lr is {self.config.lr}); {kept}")

    # ---- saving and resuming ----

    def _checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint to resume from, checked; None for a new run."""
        config = self.config
        # All processes read the checkpoint if one sees it. A process that cannot reports it.
        exists = self.processes.any(self.path.exists())
        if config.resume == "yes" or (config.resume == "auto" and exists):
            saved = checkpoint.read(self.path)
            if "optimizer" not in saved:
                raise InputError(
                    f"{self.path}: expected a checkpoint to resume from, got weights alone, "
                    "as best.pt holds them"
                )
            checkpoint.check_same(self.path, saved["run"], self.binding)
            begun = saved["epoch"] + (saved["step"] > 0)
            if begun > config.epochs:
                raise InputError(
                    f"--epochs: expected at least the {begun} that the run in {config.out} has "
                    f"begun, got {config.epochs}"
                )
            return saved
        if exists:
            raise InputError(
                f"--out: {config.out} holds a run already ({self.path}); "
                "expected --resume to go on with it, or another --out"
            )
        if self.previous.exists():
            raise InputError(
                f"--out: {config.out} holds {self.previous} and no {CHECKPOINT}; "
                f"expected a copy of it as {CHECKPOINT} to go on from it, or another --out"
            )
        return None

    def _save(self) -> None:
        """Save a checkpoint; every process takes part."""
        # Never overwrite a good checkpoint by weights that are known to be lost.
        self._finite_mean_loss()
        if not all(bool(values.isfinite().all()) for values in self.model.state_dict().values()):
            self._stop_for("expected finite weights and statistics, got others")
        own = {
            "random": checkpoint.random_state(self.device),
            "loss_sum": self.loss_sum.cpu(),
        }
        every = self.processes.gather(own)
        # The earlier checkpoint stays too: finite weights may be lost all the same. A save without
        # a new step replaces only the last checkpoint.
        keep = self.previous if self.steps_done > self.saved_at else None
        self.saved_at = self.steps_done
        if not self.processes.first:
            return
        checkpoint.write(
            self.path,
            {
                "format": checkpoint.FORMAT,
                "run": self.binding,
                "epoch": self.epoch,
                "step": self.step,
                "steps_done": self.steps_done,
                "seconds": self.seconds,
                "best_top1": self.best_top1,
                "accuracy": self.accuracy and vars(self.accuracy),
                "state_dict": self.model.state_dict(),
                "ema": self.ema and self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "processes": every,
            },
            keep,
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["state_dict"])
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.step = saved["epoch"], saved["step"]
        self.steps_done, self.seconds = saved["steps_done"], saved["seconds"]
        self.saved_at = self.steps_done
        self.best_top1 = saved["best_top1"]
        self.accuracy = saved["accuracy"] and Accuracy(**saved["accuracy"])
        own = saved["processes"][self.processes.rank]
        self.loss_sum.copy_(own["loss_sum"])
        checkpoint.set_random_state(own["random"], self.device)
        self._say(f"resumed after {self.steps_done:,} steps, in epoch {self.epoch + 1}")

    def _best(self) -> dict[str, Any]:
        """The evaluated weights, and the facts that their use needs."""
        model = self.model if self.ema is None else self.ema.module
        return {
            "format": checkpoint.FORMAT,
            "run": self.binding,
            "epoch": self.epoch,
            "top1": self.best_top1,
            "state_dict": model.state_dict(),
            # what load_trained prepares other images by
            "mean": self.data.mean,  # in units of a pixel's value
            "std": self.data.std,
            "shape": self.data.train.shape,
            "white": self.data.white,
            "centre": self.data.centre,
        }

    def close(self) -> None:
        if self.logs is not None:
            self.logs.close()
        for images in (self.loader, self.held_out_loader):
            # After an error its traceback keeps the workers alive. At exit Python would send
            # SIGTERM, which they ignore, and wait for ever.
            workers: Any = images._iterator
            if workers is not None:
                workers._shutdown_workers()
