"""best.safetensors beside best.pt, and what reads it."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support.optional import optional
from support.training import differences, images, saved, settings

import epsa_fused
from epsa_fused import predict
from epsa_fused.train import InputError, train, weights

FILE = "best.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    optional("safetensors.torch")
    out = tmp_path_factory.mktemp("run")
    train(settings(out, channels_last=True, epochs=1))  # safetensors takes contiguous tensors only
    return out


def test_it_holds_what_best_pt_holds(run):
    best, found = saved(run, "best.pt"), weights.read_best(run / FILE)
    assert differences(best.pop("state_dict"), found.tensors) == []
    assert found.facts == json.loads(json.dumps(best))  # tuples become lists


def test_other_programs_read_it(run):
    tensors = optional("safetensors.torch").load_file(run / FILE)
    assert epsa_fused.models.small_epsanet(3).load_state_dict(tensors)
    with optional("safetensors").safe_open(run / FILE, "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_load_trained_and_predict_read_it(run, tmp_path, capsys):
    """The file itself, and a folder that has no other."""
    shutil.copy(run / FILE, tmp_path)
    picture = str(next(Path(images()).rglob("*.png")))
    wanted = epsa_fused.load_trained(run)
    for path in (run / FILE, tmp_path):
        trained = epsa_fused.load_trained(path)
        state = trained.model.state_dict()
        assert differences(dict(wanted.model.state_dict()), dict(state)) == []
        assert vars(trained) | {"model": 0} == vars(wanted) | {"model": 0}
        assert predict.main([str(path), picture]) == 0
    assert len(set(capsys.readouterr().out.splitlines())) == 1


def test_a_fine_tuning_starts_from_it(run, tmp_path, capsys):
    train(settings(tmp_path, weights=str(run / FILE), epochs=1, lr=0.0))
    before, after = saved(run, "best.pt")["state_dict"], saved(tmp_path)["state_dict"]
    assert torch.equal(before["fc.weight"], after["fc.weight"])
    assert f"{FILE}: load_backbone: {len(before)} of {len(before)}" in capsys.readouterr().out


def test_it_is_whole_or_absent(run, tmp_path, monkeypatch):
    """As best.pt: a failed write leaves the one before, and nothing beside it."""
    shutil.copy(run / FILE, tmp_path)
    replace = os.replace

    def full(source, target):
        if Path(target).name == FILE:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=rf"{FILE}: cannot save .*the last one .* is untouched"):
        weights.write_best(tmp_path / "best.pt", saved(run, "best.pt"))
    assert (tmp_path / FILE).read_bytes() == (run / FILE).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", FILE]


def test_without_the_package(run, tmp_path, monkeypatch):
    """Nothing is left beside best.pt: it would be an earlier epoch's."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / FILE).write_bytes(b"of an earlier epoch")
    weights.write_best(tmp_path / "best.pt", saved(run, "best.pt"))
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]
    words = "reading safetensors needs the package safetensors, .*: pip install safetensors"
    with pytest.raises(InputError, match=f"{FILE}: {words}"):
        epsa_fused.load_trained(run / FILE)
    with pytest.raises(InputError, match=f"--weights: .*{FILE}: {words}"):
        train(settings(tmp_path / "out", weights=str(run / FILE)))


def written(path: Path, **metadata: str) -> Path:
    optional("safetensors.torch").save_file({"fc.bias": torch.zeros(3)}, path, metadata or None)
    return path


@pytest.mark.parametrize(
    ("facts", "words"),
    (
        (None, "expected best.safetensors of a training, got weights without its metadata"),
        ("[1]", "got weights without its metadata"),
        ("{", "it is damaged, or of another kind"),
        ('{"format": 1}', "expected a checkpoint of format 2, got 1"),
        (
            '{"format": 2, "run": {"model": "a"}}',
            "of another version, without centre, classes, drop",
        ),
    ),
)
def test_files_of_other_kinds(tmp_path, facts, words):
    path = written(tmp_path / FILE, **({} if facts is None else {"epsa_fused": facts}))
    with pytest.raises(InputError, match=rf"^{path}: .*{words}"):
        epsa_fused.load_trained(path)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(InputError, match=r"expected best\.pt of a training, there is no such file"):
        epsa_fused.load_trained(tmp_path / FILE)
    optional("safetensors")
    (tmp_path / FILE).write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="it is damaged, or of another kind"):
        epsa_fused.load_trained(tmp_path)
