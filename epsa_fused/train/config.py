"""The options of a training, each with its default, limits and help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..models import MODELS
from .config_file import read_options
from .data import kind_of_data
from .errors import InputError

AMP = ("none", "bf16", "fp16")
SCHEDULES = ("step", "cosine")

# The options of these data that differ from ImageNet's, which are the defaults below.
RECIPES: dict[str, dict[str, Any]] = {
    "folder": {},
    "digits": {
        "model": "small_epsanet",
        "epochs": 30,
        "batch": 64,
        "lr": 0.05,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "workers": 0,  # another process costs more than cropping 8x8 pixels
    },
    "cifar10": {
        "model": "small_epsanet",
        "batch": 128,
        "weight_decay": 5e-4,
        "schedule": "cosine",
    },
}


def _option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    below: float | None = None,
    alone: str | None = None,
    free: bool = False,
) -> Any:
    """A field of :class:`Config`.

    Args:
        default: its type is the option's type.
        help: the text of `--help`.
        choices: the allowed values.
        least, below: the value must be in [least, below).
        alone: the value of the flag without a value on the command line.
        free: whether a resumed run may change it.
    """
    limits = {"choices": choices, "least": least, "below": below}
    return field(default=default, metadata={"help": help, "alone": alone, "free": free} | limits)


@dataclass(frozen=True)
class Config:
    """The options of one training.

    The defaults are the paper's recipe for ImageNet (arXiv 2105.14447, section 4.1); :meth:`of`
    gives the recipe for other data.

    Raises:
        InputError: a value is outside its limits; the message names the option.
    """

    data: str = _option(
        "digits",
        "a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, one with CIFAR-10's Python pickles, "
        "or 'digits': scikit-learn's",
        free=True,  # the folder may move: a resumed run compares its contents
    )
    out: str = _option("run", "folder of the checkpoints and logs", free=True)
    resume: str = _option(
        "no",
        "go on with the run in --out, bitwise as if uncut; auto: where there is one, else start",
        choices=("no", "yes", "auto"),
        alone="yes",
        free=True,
    )
    evaluate: bool = _option(
        False,
        "train nothing: evaluate best.pt of --out, or --weights, on the held-out images",
        free=True,
    )

    model: str = _option("epsanet50", "the network", choices=tuple(MODELS))
    psa: str = _option("fused", "the PSA modules", choices=("fused", "reference"))
    dropout: float = _option(0.0, "dropout in front of the classifier", least=0, below=1)
    image_size: int = _option(224, "height and width that a folder's images are cut to", least=1)

    weights: str = _option(
        "",
        "a file of weights to start from, as far as they fit; a resumed run has its own",
        free=True,
    )

    epochs: int = _option(
        120,
        "passes over the training images; with the step schedule a run may go on to more",
        least=1,
    )
    batch: int = _option(256, "images per step, of all processes together", least=1)
    accumulate: int = _option(1, "micro-batches per step, one after another", least=1)
    lr: float = _option(0.1, "learning rate of SGD at the start", least=0)
    momentum: float = _option(0.9, "of SGD", least=0, below=1)
    weight_decay: float = _option(1e-4, "of every parameter", least=0)
    schedule: str = _option("step", "of the learning rate, by epochs", choices=SCHEDULES)
    decay_every: int = _option(30, "epochs between two decays of the step schedule", least=1)
    decay: float = _option(0.1, "factor of each decay of the step schedule", least=0)
    warmup: int = _option(
        0, "epochs in which the learning rate rises to --lr, before the schedule", least=0
    )
    smoothing: float = _option(0.1, "label smoothing", least=0, below=1)
    ema: float = _option(
        0.0,
        "decay of the moving average of the weights that is evaluated; 0: none",
        least=0,
        below=1,
    )

    seed: int = _option(
        0, "of the weights, the order of the images and their crops", least=0, below=2**31
    )
    device: str = _option("auto", "auto: CUDA where there is one", choices=("auto", "cpu", "cuda"))
    amp: str = _option("none", "autocast; fp16 scales the loss", choices=AMP)
    channels_last: bool = _option(False, "the memory format of network and images")
    deterministic: bool = _option(
        False, "only deterministic algorithms: what bitwise resuming needs on a GPU"
    )

    workers: int = _option(2, "loading processes of each process; 0: itself", least=0, free=True)
    corrupt: str = _option(
        "fail",
        "images that cannot be read: stop at the first, or name them and leave them out",
        choices=("fail", "skip"),
        free=True,
    )
    checkpoint_every: int = _option(
        500, "steps between checkpoints, of which each epoch ends in one", least=1, free=True
    )
    log_every: int = _option(10, "steps between rows of steps.csv", least=1, free=True)
    tensorboard: bool = _option(False, "also log for TensorBoard, in --out", free=True)

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            _check(option, value)
            # NumPy's numbers and strings would not be read from a checkpoint.
            object.__setattr__(self, option.name, _kind(option)(value))
        if self.warmup >= self.epochs:
            raise InputError(
                f"--warmup: expected less than the {self.epochs} --epochs, got {self.warmup}"
            )

    @classmethod
    def of(cls, data: str = "digits", **given: Any) -> Config:
        """The recipe for these data, changed by the options in `given`."""
        return cls(**({"data": data} | RECIPES[kind_of_data(data)] | given))

    @classmethod
    def of_command_line(cls, arguments: Sequence[str] | None = None) -> Config:
        """The options of a command line, and of the file that its --config names.

        SystemExit if argparse refuses them.
        """
        given = vars(_parser().parse_args(arguments))
        if (path := given.pop("config", None)) is not None:
            options = {option.name: option for option in fields(cls)}
            in_file = read_options(Path(path), options)
            try:
                for name, value in in_file.items():
                    _check(options[name], value)
            except InputError as error:
                raise InputError(f"--config: {path}: {error}") from error
            given = in_file | given  # the command line wins
        return cls.of(**given)

    def binding(self) -> dict[str, Any]:
        """The options that a resumed run must keep."""
        free = {option.name for option in fields(self) if option.metadata["free"]}
        if self.schedule == "step":
            free.add("epochs")  # only the cosine schedule depends on their number
        return {name: value for name, value in asdict(self).items() if name not in free}

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def network(self, classes: int, channels: int) -> Any:
        """The network with its random start, for so many classes and channels of an image.

        Any, since the types of nn.Module.to know no memory_format.
        """
        return MODELS[self.model](
            classes, fused=self.psa == "fused", in_chans=channels, drop_rate=self.dropout
        )


def _flag(option: Field[Any]) -> str:
    return "--" + option.name.replace("_", "-")


def _kind(option: Field[Any]) -> type[Any]:
    return type(option.default)


def _check(option: Field[Any], value: Any) -> None:
    if wrong := _what_was_expected(option, value):
        raise InputError(f"{_flag(option)}: expected {wrong}, got {value!r}")


def _what_was_expected(option: Field[Any], value: Any) -> str:
    """The value that the option expects instead of `value`; "" if `value` is allowed."""
    kind = _kind(option)
    if not isinstance(value, (int, float) if kind is float else kind) or (
        isinstance(value, bool) and kind is not bool
    ):
        return f"a value of type {kind.__name__}"
    limits = option.metadata
    if limits["choices"] and value not in limits["choices"]:
        return f"one of {', '.join(limits['choices'])}"
    # Written with `not`, so that NaN is refused.
    if limits["least"] is not None and not limits["least"] <= value:
        return f"at least {limits['least']}"
    if limits["below"] is not None and not value < limits["below"]:
        return f"less than {limits['below']}"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m epsa_fused.train",
        description="Train a network of PSA modules on images. Under torchrun, every process "
        "takes its share of each batch.",
        epilog="Defaults in brackets are ImageNet's; "
        + "; ".join(
            f"{data}: " + ", ".join(f"{name} {value}" for name, value in recipe.items())
            for data, recipe in RECIPES.items()
            if recipe
        ),
        argument_default=argparse.SUPPRESS,  # the recipe supplies the other options
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE.toml", help="a file of options, such as image-size = 160"
    )
    for option in fields(Config):
        help = f"{option.metadata['help']} [{option.default}]"
        alone = option.metadata["alone"]
        if isinstance(option.default, bool):
            parser.add_argument(_flag(option), action=argparse.BooleanOptionalAction, help=help)
        else:
            parser.add_argument(
                _flag(option),
                type=type(option.default),
                choices=option.metadata["choices"],
                help=help,
                **({} if alone is None else {"nargs": "?", "const": alone}),
            )
    return parser
