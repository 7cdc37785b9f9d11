"""python -m epsa_fused.train --evaluate: what was trained, on the held-out images."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.optional import optional
from support.training import CLASSES, command_line, evaluated, image_folder, saved, settings

from epsa_fused.models import MODELS
from epsa_fused.train import InputError, train
from epsa_fused.train.__main__ import INTERRUPTED, main
from epsa_fused.train.interrupts import Interrupts


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(settings(out, ema=0.9))
    return out


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_it_evaluates_best_pt_and_changes_nothing(run, capsys):
    before = content(run)
    assert main([*command_line(run), "--evaluate"]) == 0
    assert content(run) == before
    loss, top1 = evaluated(saved(run, "best.pt"))
    assert top1 == saved(run, "best.pt")["top1"]
    said = capsys.readouterr().out
    assert said == f"{run}/best.pt, held out: loss {loss:.4f}, top-1 {top1:.2%}, top-5 100.00%\n"


@pytest.mark.parametrize("kind", ("best.pt", "best.safetensors", "state_dict"))
def test_it_evaluates_given_weights(run, tmp_path, kind):
    path = run / kind
    if kind == "best.safetensors":
        optional("safetensors")
    if kind == "state_dict":
        path = tmp_path / "weights.pt"
        torch.save(saved(run, "best.pt")["state_dict"], path)
    out = tmp_path / "out"
    result = train(settings(out, weights=str(path), evaluate=True, workers=1, batch=9))
    loss, top1 = evaluated(saved(run, "best.pt"))
    assert result.accuracy.loss == pytest.approx(loss, rel=1e-6)
    assert (result.accuracy.top1, result.steps, result.interrupted) == (top1, 0, False)
    assert not out.exists()


def test_it_takes_the_averaged_weights_of_a_checkpoint(run, tmp_path, capsys):
    """As the training evaluates them, and best.pt holds them; it says so."""
    state, best = saved(run), saved(run, "best.pt")
    average = {
        name.removeprefix("module."): value
        for name, value in state["ema"].items()
        if name != "n_averaged"
    }
    loss, top1 = evaluated(best | {"state_dict": average})
    torch.save({"model": state["state_dict"], "state_dict_ema": average}, tmp_path / "timm.pt")
    for path in (run / "checkpoint.pt", tmp_path / "timm.pt"):
        train(settings(tmp_path / "out", weights=str(path), evaluate=True))
        said = capsys.readouterr().out
        assert said.startswith(f"{path}, its averaged weights, held out: loss {loss:.4f}, ")
        assert f"top-1 {top1:.2%}" in said
    others, _ = evaluated(best | {"state_dict": state["state_dict"]})
    assert others != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("average", (None, {}, {"decay": 0.9}, {1: torch.ones(1)}), ids=str)
def test_it_takes_the_weights_of_a_checkpoint_without_averages(run, tmp_path, capsys, average):
    path, state = tmp_path / "checkpoint.pt", saved(run)
    torch.save(state | {"ema": average}, path)
    train(settings(tmp_path / "out", weights=str(path), evaluate=True))
    loss, _ = evaluated(saved(run, "best.pt") | {"state_dict": state["state_dict"]})
    assert capsys.readouterr().out.startswith(f"{path}, held out: loss {loss:.4f}, ")


def test_it_normalises_as_the_training_did(run, tmp_path):
    """By the mean and the deviation in best.pt, which CIFAR-10's subsets differ in."""
    best = saved(run, "best.pt")
    best["mean"] = (0.0, 10.0, 20.0)
    torch.save(best, tmp_path / "best.pt")
    result = train(settings(tmp_path, evaluate=True))
    assert result.accuracy.loss == pytest.approx(evaluated(best)[0], rel=1e-6)


def test_an_interrupt_ends_it(run, monkeypatch, capsys):
    noted = Interrupts.__enter__

    def at_once(self):
        self.pending = True
        return noted(self)

    monkeypatch.setattr(Interrupts, "__enter__", at_once)
    assert main([*command_line(run), "--evaluate"]) == INTERRUPTED
    assert capsys.readouterr().out == "interrupted\n"


@pytest.mark.parametrize(
    ("given", "words"),
    (
        ({"model": "epsanet50"}, "model: small_epsanet in the checkpoint, now epsanet50"),
        ({"image_size": 16}, r"images: \(\[8, 8, 3\], .*\) in the checkpoint, now \(\[16, 16, 3\]"),
        ({"out": "nowhere"}, r"nowhere: expected best\.pt of a training, there is no such file"),
        ({"weights": "nowhere.pt"}, "--weights: nowhere.pt: .*there is no nowhere.pt"),
    ),
)
def test_what_it_refuses(run, capsys, given, words):
    assert main([*command_line(**{"out": run} | given), "--evaluate"]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"^error: .*{words}", error) and error.count("\n") == 1, error


def test_weights_that_fit_in_part_are_refused(run, tmp_path):
    """A fine-tuning would start from them. Their accuracy would be that of random numbers."""
    state = saved(run, "best.pt")["state_dict"]
    del state["fc.bias"]
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"weights do not fit small_epsanet: .*fc\.bias"):
        train(settings(tmp_path, weights=str(tmp_path / "weights.pt"), evaluate=True))


def test_other_classes_are_refused(run, tmp_path):
    folder = image_folder(tmp_path / "data")
    for part in ("train", "val"):
        (folder / part / "ant").rename(folder / part / "ape")
    with pytest.raises(InputError, match=r"classes: \['ant', .* in the checkpoint, now \['ape',"):
        train(settings(run, data=str(folder), evaluate=True))


def test_more_classes_than_weights(tmp_path):
    model = MODELS["small_epsanet"](len(CLASSES) + 1)
    torch.save(model.state_dict(), tmp_path / "four.pt")
    with pytest.raises(InputError, match="do not fit small_epsanet: size mismatch for fc"):
        train(settings(tmp_path, weights=str(tmp_path / "four.pt"), evaluate=True))


@pytest.mark.parametrize(
    ("change", "words"),
    (
        (lambda s: s.pop("mean"), "another version, without mean"),
        (lambda s: s["run"].pop("model"), "another version, without model"),
        (lambda s: s.update(run="x"), "another version, without classes, dropout, model, psa"),
        (lambda s: s["run"].update(model=["small_epsanet"]), "without the name of a model"),
        (lambda s: s.update(format=1), "checkpoint of format 2, got"),
    ),
)
def test_a_run_of_another_version_is_refused(run, tmp_path, change, words):
    state = saved(run, "best.pt")
    change(state)
    torch.save(state, tmp_path / "best.pt")
    best = str(tmp_path / "best.pt")
    for config in (settings(tmp_path), settings(run, weights=best)):
        with pytest.raises(InputError, match=words):
            train(replace(config, evaluate=True))
