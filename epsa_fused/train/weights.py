"""Files of weights: best.pt, best.safetensors beside it, and those of other programs."""

from __future__ import annotations

import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from . import checkpoint, files
from .errors import InputError, required

BEST = "best.pt"
SAFETENSORS = ".safetensors"
# the metadata of best.safetensors that has, as JSON, what best.pt holds beside the weights
FACTS = "epsa_fused"
# what load_trained and --evaluate read of it
_NEEDED = {"run", "top1", "mean", "std", "shape", "white", "centre"}
_NEEDED_OF_RUN = {"model", "classes", "psa", "dropout"}
# where checkpoints keep averaged weights: this training's, torchvision's and timm's
_AVERAGES = ("ema", "model_ema", "state_dict_ema")


class Weights(NamedTuple):
    """Weights, and what best.pt tells about them; {} where the file is no best.pt."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    averaged: bool = False  # taken instead of others in the same file

    def named(self, path: Path) -> str:
        """The file, for messages, and which of its weights were taken."""
        return f"{path}, its averaged weights" if self.averaged else str(path)


def write_best(path: Path, best: dict[str, Any]) -> None:
    """Save best.pt, and best.safetensors where that package is installed.

    Raises:
        InputError: a file cannot be written.
    """
    checkpoint.write(path, best)
    twin = path.with_suffix(SAFETENSORS)
    if importlib.util.find_spec("safetensors") is None:
        twin.unlink(missing_ok=True)  # it would be an earlier epoch's
        return
    from safetensors.torch import save

    facts = {name: value for name, value in best.items() if name != "state_dict"}
    tensors = {name: value.contiguous() for name, value in best["state_dict"].items()}
    # "pt" is what transformers and other programs look for.
    files.write(twin, save(tensors, {"format": "pt", FACTS: json.dumps(facts)}))


def best_of(run: str | Path) -> Path:
    """The file of a run's best epoch: best.pt or, without it, best.safetensors.

    Args:
        run: the folder of the run, or the file itself.
    """
    path = Path(run)
    if not path.is_dir():
        return path
    best = path / BEST
    twin = best.with_suffix(SAFETENSORS)
    return twin if twin.exists() and not best.exists() else best


def read_best(path: Path) -> Weights:
    """Read best.pt or best.safetensors, to the CPU.

    Raises:
        InputError: the file is missing, damaged, of another version, or holds something else.
    """
    if path.suffix == SAFETENSORS and path.exists():
        try:
            weights = _of_safetensors(path)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        if not weights.facts:
            raise InputError(
                f"{path}: expected best{SAFETENSORS} of a training, got weights without its "
                f"metadata {FACTS!r}"
            )
    else:
        weights = _split(checkpoint.read(path, f"{BEST} of a training"))
    check_facts(path, weights.facts)
    return weights


def check_facts(path: Path, facts: dict[str, Any]) -> None:
    """Raise InputError unless these are the facts of a training by this version."""
    checkpoint.check_format(path, facts)
    run = facts.get("run")
    settings = run if isinstance(run, dict) else {}
    missing = (_NEEDED - facts.keys()) | (_NEEDED_OF_RUN - settings.keys())
    if not missing and not isinstance(settings["model"], str):
        missing = {"the name of a model"}
    if missing:
        found = f"weights of another version, without {', '.join(sorted(missing))}"
        if "optimizer" in facts:
            found = "a checkpoint to resume from"
        raise InputError(f"{path}: expected {BEST} of this version's training, got {found}")


def read_weights(path: Path) -> Weights:
    """Read the weights of any network, to the CPU: a state_dict, or one under "state_dict" or
    "model". Averaged weights beside them are taken instead, as evaluation in a training does.
    Files of safetensors have that ending. No code of the file is run.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    if not path.exists():
        raise InputError(f"expected a file of weights, there is no {path}")
    if path.suffix == SAFETENSORS:
        return _of_safetensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError("expected tensors and plain values, got a file that holds more") from error
    except Exception as error:  # a damaged file may raise anything
        raise _damaged(error) from error
    if isinstance(state, dict) and {"format", "run", "shape", "state_dict"} <= state.keys():
        return _split(state)
    if isinstance(state, dict) and (average := _average_in(state)):
        return Weights(average, {}, averaged=True)
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not state:
        raise InputError(f"expected a state_dict, got {type(state).__name__}")
    return Weights(state, {})


def read_given(path: Path) -> Weights:
    """:func:`read_weights` for `--weights`, whose errors name it."""
    try:
        return read_weights(path)
    except InputError as error:
        raise InputError(f"--weights: {path}: {error}") from error


def load_whole(model: nn.Module, tensors: dict[str, Tensor], path: Path, name: str) -> None:
    """Load weights that must fit the model `name` to the last tensor; InputError otherwise."""
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, AttributeError) as error:  # the last two: values of no tensor
        last = str(error).splitlines()[-1].strip()
        raise InputError(f"{path}: its weights do not fit {name}: {last}") from error


def _split(saved: dict[str, Any]) -> Weights:
    facts = {name: value for name, value in saved.items() if name != "state_dict"}
    return Weights(saved.get("state_dict", {}), facts)


def _average_in(state: dict[str, Any]) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint, by the network's names; {} without any."""
    for found in (state.get(name) for name in _AVERAGES):
        if isinstance(found, dict) and all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
        ):
            average = {name: value for name, value in found.items() if name != "n_averaged"}
            consume_prefix_in_state_dict_if_present(average, "module.")  # AveragedModel's
            return average
    return {}


def _of_safetensors(path: Path) -> Weights:
    required("safetensors", f"reading {SAFETENSORS[1:]}", "safetensors")
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads((file.metadata() or {}).get(FACTS, "{}"))
    except Exception as error:  # a damaged file may raise anything
        raise _damaged(error) from error
    return Weights(tensors, facts if isinstance(facts, dict) else {})


def _damaged(error: Exception) -> InputError:
    return InputError(f"it is damaged, or of another kind ({error})")
