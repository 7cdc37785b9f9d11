"""The training loop: steps, evaluation, and the moments to save."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from ..backbone import load_backbone
from . import checkpoint, generators, weights
from .config import Config
from .data import Data, kind_of_data, open_data
from .errors import InputError
from .evaluation import Accuracy, accuracy_of, evaluate
from .inputs import Inputs
from .interrupts import Interrupts
from .loading import Batch, Speed
from .log import Logs
from .messages import Messages
from .own_data import OwnData, own_data
from .passes import held_out_of, micro_batch, passes_of
from .processes import Processes
from .schedule import Schedule

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


@dataclass(frozen=True)
class Result:
    """The result of a training."""

    accuracy: Accuracy | None  # of the last epoch that ended
    steps: int
    seconds: float  # of all steps, also before the training was resumed
    interrupted: bool


def train(
    config: Config,
    training: Dataset[Any] | DataLoader[Any] | None = None,
    validation: Dataset[Any] | DataLoader[Any] | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> Result:
    """Train as `config` says, alone or as one of the processes that torchrun started.

    It writes into `config.out`:

    - checkpoint.pt at the start, every `checkpoint_every` steps, and before and after each epoch's
      evaluation; checkpoint.previous.pt is the checkpoint of an earlier step;
    - best.pt, the weights of the epoch with the best top-1, and best.safetensors where that
      package is installed;
    - steps.csv and epochs.csv.

    Ctrl-C, SIGTERM and SIGHUP save after the current step and return. They cut an evaluation off:
    the resumed run repeats it. Outside the main thread signals are left alone.

    With `config.evaluate` it evaluates best.pt, or `config.weights`, and writes nothing.

    Args:
        config: its `data`, `image_size` and `corrupt` are not used with data of your own.
        training: a Dataset or DataLoader of your own. A sample is (image, label): a float Tensor
            [C, H, W] as the network takes it, and an integer. All images have one shape. A batch is
            (images [N, C, H, W], labels [N]). A DataLoader has a `batch_size`, that of a
            micro-batch, and under torchrun a DistributedSampler.
        validation: the same, to be evaluated on. `training` needs it; `config.evaluate` needs it
            alone.
        classes: their names, in the order of the labels; the Dataset's attribute `classes` by
            default.

    Returns:
        The accuracy of the last epoch, the steps, their seconds, and whether it was interrupted.

    Raises:
        InputError: data, settings or a checkpoint cannot be used, an image is unreadable and
            `config.corrupt` is "fail", the disk cannot be written, or a loss is not finite. The
            last saved checkpoint stays.
    """
    with Processes(config.device) as processes, _algorithms(config.deterministic):
        if training is None and (validation is None or not config.evaluate):
            if validation is not None:
                raise InputError("training: expected a Dataset or DataLoader, got None")
            data: Data | OwnData = open_data(config.data, config.image_size)
        else:
            data = own_data(training, validation, classes)
        # Signals stay noted until the end: SIGTERM may come twice.
        if config.evaluate:
            with Interrupts() as interrupts:
                accuracy = evaluate(config, data, processes, interrupts)
            return Result(accuracy, 0, 0.0, accuracy is None)
        made = Training(config, processes, data)
        with Interrupts() as interrupts, contextlib.closing(made):
            return made.run(interrupts)


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

    def __init__(
        self, config: Config, processes: Processes, data: Data | OwnData | None = None
    ) -> None:
        self.config, self.processes = config, processes
        self.device = processes.device
        self.messages = Messages(processes)
        self.micro_batch = micro_batch(config, processes)
        self.data = data or open_data(config.data, config.image_size)
        self.passes = passes_of(self.data, config, processes)
        self.held_out = held_out_of(self.data, config, processes)
        self.path, self.previous = config.folder / CHECKPOINT, config.folder / PREVIOUS
        # A resumed run must have the same.
        self.binding = config.binding() | {
            "device": self.device.type,  # not "auto"
            "processes": processes.count,
            **self.data.description(),
        }
        saved = self._checkpoint()
        self._build(fresh=saved is None)
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

    def _build(self, fresh: bool) -> None:
        config, device, data = self.config, self.device, self.data
        torch.manual_seed(config.seed)  # equal initial weights in every process
        model = config.network(len(data.classes), data.shape[2])
        if config.weights and fresh:
            self._start_from(Path(config.weights), model)
        self.inputs = Inputs(config, device, data.mean, data.std, self.messages)
        self.model = model.to(device, memory_format=self.inputs.layout)
        generators.seed(config.seed + self.processes.rank)  # each process its own dropout
        self.parallel = self.processes.parallel(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.schedule = Schedule(self.optimizer, config, self.passes.steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.ema = None
        if config.ema:
            average = get_ema_multi_avg_fn(config.ema)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)

    # ---- running ----

    def run(self, interrupts: Interrupts) -> Result:
        config = self.config
        stopped = False
        while self.epoch < config.epochs and not stopped:
            # A run that was cut off in an evaluation has no steps left in this epoch.
            if self.step < self.passes.steps:
                stopped = self._steps(interrupts)
            if not stopped:
                stopped = self._end_epoch(interrupts)
        unfinished = self.epoch < config.epochs
        if unfinished:
            self.messages.say(
                f"interrupted and saved after {self.steps_done:,} steps (epoch {self.epoch + 1} of "
                f"{config.epochs}); the same command with --resume goes on"
            )
        else:
            assert self.accuracy is not None  # an epoch has ended
            self.messages.say(
                f"done: {self.steps_done:,} steps, held out: top-1 {self.accuracy.top1:.2%}; "
                f"the best epoch's {self.best_top1:.2%} are in {config.folder / weights.BEST}"
            )
        return Result(self.accuracy, self.steps_done, self.seconds, unfinished)

    def _steps(self, interrupts: Interrupts) -> bool:
        """Train to the epoch's end or an interrupt, and save; returns whether interrupted."""
        self.parallel.train()
        batches = self.passes.epoch(self.epoch, self.step)
        config, speed = self.config, Speed(self.config.workers)
        bar = self.messages.bar(
            desc=f"epoch {self.epoch + 1}/{config.epochs}",
            total=self.passes.steps,
            initial=self.step,
            unit="step",
        )
        with bar:
            while self.step < self.passes.steps:
                loss = self._one_step(batches, speed)
                self.step += 1
                self.steps_done += 1
                bar.update()
                ends = self.step == self.passes.steps
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
        self.schedule.begin_step(self.steps_done)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for i in range(accumulate):
            start = time.perf_counter()
            batch = next(batches)
            speed.count(batch, time.perf_counter() - start)
            self.inputs.check(batch)
            self._check_readable(len(batch.labels))
            with self._gradients_shared(i + 1 == accumulate):
                with self.inputs.autocast():
                    logits = self.parallel(self.inputs.prepared(batch))
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
        lr = self.schedule.lr
        loss = self._finite_mean_loss()
        self.schedule.end_epoch(self.epoch + 1)
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
        self.messages.say(
            f"epoch {self.epoch}/{self.config.epochs}  loss {loss:.4f}  held out: {result}  "
            f"{self.last_speed}"
        )
        self.step = 0
        self.loss_sum.zero_()
        if result.top1 > self.best_top1:
            self.best_top1 = result.top1
            if self.processes.first:
                weights.write_best(self.config.folder / weights.BEST, self._best())
        self._save()
        return self.processes.any(interrupts.pending)

    def _evaluate(self, interrupts: Interrupts) -> Accuracy | None:
        """Evaluate the held-out images; None at an interrupt."""
        return accuracy_of(
            self._evaluated(), self.held_out, self.inputs, self.processes, self.messages, interrupts
        )

    def _evaluated(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module

    # ---- messages and checks ----

    def _start_from(self, path: Path, model: nn.Module) -> None:
        given = weights.read_given(path)
        try:
            report = load_backbone(model, given.tensors)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"--weights: {path}: {error}") from error
        self.messages.say(f"--weights: {given.named(path)}: {report}")

    def _check_normalised(self) -> None:
        """InputError if every micro-batch is one image, and BatchNorm needs two."""
        config, count = self.config, self.processes.count
        if self.micro_batch > 1 or not self._one_image_is_too_few:
            return
        would_do = [f"--batch {2 * config.batch}"]
        if config.accumulate > 1:
            would_do.append("--accumulate 1")
        if isinstance(self.data, Data) and kind_of_data(config.data) == "folder":
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
        height, width, _ = self.data.shape
        return (
            f"images of {height} x {width} give maps of 1 x 1 in {self.config.model}, and "
            "BatchNorm cannot train on a single value"
        )

    @functools.cached_property
    def _one_image_is_too_few(self) -> bool:
        return self._fewest_values(*self.data.shape[:2]) == 1

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
            self.model.eval()(weight.new_zeros(1, self.data.shape[2], height, width))
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
            "lr": self.schedule.lr,
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
            # runs from before there was a warm-up had none
            checkpoint.check_same(self.path, {"warmup": 0} | saved["run"], self.binding)
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
            "random": generators.random_state(self.device),
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
                "scheduler": self.schedule.state_dict(),
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
        self.schedule.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.step = saved["epoch"], saved["step"]
        self.steps_done, self.seconds = saved["steps_done"], saved["seconds"]
        self.saved_at = self.steps_done
        self.best_top1 = saved["best_top1"]
        self.accuracy = saved["accuracy"] and Accuracy(**saved["accuracy"])
        own = saved["processes"][self.processes.rank]
        self.loss_sum.copy_(own["loss_sum"])
        generators.set_random_state(own["random"], self.device)
        self.messages.say(f"resumed after {self.steps_done:,} steps, in epoch {self.epoch + 1}")

    def _best(self) -> dict[str, Any]:
        """The evaluated weights, and the facts that their use needs."""
        return {
            "format": checkpoint.FORMAT,
            "run": self.binding,
            "epoch": self.epoch,
            "top1": self.best_top1,
            "state_dict": self._evaluated().state_dict(),
            # what load_trained prepares other images by
            "mean": self.data.mean,  # in units of a pixel's value
            "std": self.data.std,
            "shape": self.data.shape,
            "white": self.data.white,
            "centre": self.data.centre,
        }

    def close(self) -> None:
        if self.logs is not None:
            self.logs.close()
        self.passes.close()
        self.held_out.close()
