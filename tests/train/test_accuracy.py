"""benchmarks/accuracy.py, by short trainings."""

from __future__ import annotations

import csv
import sys

import pytest
import torch
from support.paths import ROOT
from support.tolerance import assert_no_worse, relative_error
from support.training import saved

from epsa_fused.models import MODELS
from epsa_fused.train import train

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture
def accuracy(monkeypatch):
    import accuracy

    for network, given in accuracy.NETWORKS.items():
        monkeypatch.setitem(accuracy.NETWORKS, network, given | {"batch": 449})  # 3 steps
    return accuracy


def test_a_row_has_the_commit_at_which_it_was_measured(tmp_path, monkeypatch, accuracy):
    """A later commit that finds the training done keeps the row."""
    arguments = ["--epochs", "1", "--seeds", "1", "--out", str(tmp_path)]
    arguments += ["--runs", str(tmp_path / "runs")]

    def rows():
        with (tmp_path / "accuracy-digits.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    # interrupted in the second training
    trainings = []

    def interrupted(config):
        trainings.append(config)
        result = train(config)
        return result if len(trainings) < 2 else type(result)(None, 0, 0.0, True)

    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "train", interrupted)
        patch.setattr(accuracy, "commit", lambda: "first")
        assert accuracy.main(arguments) == 130
    monkeypatch.setattr(accuracy, "commit", lambda: "second")
    assert accuracy.main(arguments) == 0
    first = rows()
    assert [row["network"] for row in first] == list(accuracy.NETWORKS)
    assert [row["commit"] for row in first] == ["first", "second", "second"]
    assert 0 <= float(first[-1]["same_answers"]) <= 1
    monkeypatch.setattr(accuracy, "commit", lambda: "third")
    assert accuracy.main(arguments) == 0
    assert rows() == first

    # another setting is another training
    assert accuracy.main([*arguments, "--epochs", "2"]) == 2


def test_the_answers_are_those_of_the_trained_weights(tmp_path, accuracy):
    arguments = ["--epochs", "1", "--seeds", "1", "--runs", str(tmp_path)]
    options = accuracy.parse_arguments(arguments)
    config = accuracy.settings(options, "PSA, fused", 0)
    result = train(config)
    data = accuracy.open_data("digits", 0)
    measured = accuracy.measure(config, data, {}, result)
    right = torch.tensor(measured["answers"]) == torch.from_numpy(data.held_out.labels)
    assert right.double().mean().item() == result.accuracy.top1
    fused, reference = (
        accuracy.logits(config, data, psa).double() for psa in ("fused", "reference")
    )
    assert measured["row"]["logits_error"] == pytest.approx(relative_error(reference, fused))
    weights = saved(config.folder)["state_dict"]
    exact = MODELS[config.model](10, fused=False, in_chans=1).double().eval()
    exact.load_state_dict(weights)
    x = torch.from_numpy(data.held_out.images).reshape(-1, 1, 8, 8).double()
    with torch.no_grad():
        exact = exact((x - data.mean[0]) / data.std[0])
    assert_no_worse(fused.float(), reference.float(), exact, terms=9 * 128)


def test_the_starts(tmp_path, accuracy, capsys):
    arguments = ["--start", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path)]
    assert accuracy.main([*arguments, "--runs", str(tmp_path / "runs")]) == 0
    with (tmp_path / "start-digits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["start"] for row in rows] == list(accuracy.STARTS)
    assert {row["images"] for row in rows} == {"100"}
    assert all(0 <= float(row["epoch_30"]) <= 1 and row["commit"] for row in rows)
    output = capsys.readouterr().out
    assert output.count("load_backbone: 52 of 70 tensors taken") == 1
    assert output.index("another network, seed 0") < output.index("load_backbone")
    with pytest.raises(SystemExit):
        accuracy.parse_arguments(["--start", "--data", "cifar-10-batches-py"])


def test_the_docs_give_the_committed_starts(accuracy, capsys):
    with (ROOT / "benchmarks/results/start-digits.csv").open(newline="") as file:
        rows = [
            {name: float(v) if name.startswith("epoch_") else v for name, v in row.items()}
            for row in csv.DictReader(file)
        ]
    accuracy.summarize_starts(rows)
    table, ahead = capsys.readouterr().out.strip().split("|\nafter", 1)
    assert table in (ROOT / "docs/training.md").read_text()
    assert ahead.count("ahead from 5 of 5 seeds") == len(accuracy.SHOWN)


def test_the_few_images_of_each_class_are_not_among_the_others(accuracy):
    data = accuracy.open_data("digits", 0)
    whole = accuracy.of_classes(data.train, data, range(5, 10))
    few, others = accuracy.few_of_each(whole)
    assert few.tensors[1].bincount().tolist() == [accuracy.SHOTS] * 5
    assert len(few) + len(others) == len(whole) == sum(label > 4 for label in data.train.labels)
    seen, unseen = ({i.numpy().tobytes() for i in part.tensors[0]} for part in (few, others))
    assert len(seen) == len(few) and not seen & unseen
