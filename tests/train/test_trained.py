"""What was trained is used: load_trained, its preprocessing, and python -m epsa_fused.predict."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.optional import optional
from support.training import CLASSES, images, saved, settings

import epsa_fused
from epsa_fused.predict import main
from epsa_fused.train import Config, InputError, train, training
from epsa_fused.train.data import open_data
from epsa_fused.train.processes import Processes


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(settings(out))
    return out


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    train(Config.of("digits", out=str(out), epochs=2, batch=128))
    return out


def held_out() -> list[Path]:
    return sorted(Path(images(), "val").rglob("*.png"))


def as_trained(data, index: int) -> torch.Tensor:
    """A held-out image as the evaluation of the training has it."""
    pixels = torch.from_numpy(np.array(data.held_out.image(index, None))).float()
    return ((pixels - torch.tensor(data.mean)) / torch.tensor(data.std)).permute(2, 0, 1)


def test_it_is_the_network_of_the_best_epoch(run):
    trained, best = epsa_fused.load_trained(run), saved(run, "best.pt")
    assert trained.classes == list(CLASSES) and trained.top1 == best["top1"]
    assert (trained.shape, trained.white, trained.centre) == ((8, 8, 3), 255, 224 / 256)
    assert not trained.model.training
    state = trained.model.state_dict()
    assert state.keys() == best["state_dict"].keys()
    assert all(torch.equal(value, best["state_dict"][name]) for name, value in state.items())
    assert any(isinstance(m, epsa_fused.FusedPSAModule) for m in trained.model.modules())


def test_files_are_prepared_as_the_evaluation_did(run):
    trained, data = epsa_fused.load_trained(run / "best.pt"), open_data(images(), 8)
    files = [Path(images(), "val", name.decode()) for name in data.held_out.files]
    prepared = trained.preprocess(files)
    right = torch.stack([as_trained(data, i) for i in range(len(files))])
    torch.testing.assert_close(prepared, right, rtol=0, atol=1e-6)
    with torch.no_grad():
        found = trained.model(prepared).argmax(1)
    share = (found == torch.from_numpy(data.held_out.labels)).float().mean().item()
    assert share == pytest.approx(trained.top1)


def test_any_picture_gives_the_same(run):
    trained, file = epsa_fused.load_trained(str(run)), held_out()[0]
    image = Image.open(file).convert("RGB")
    pictures = [str(file), file, image, np.asarray(image)]
    prepared = trained.preprocess(pictures)
    assert all(torch.equal(p, prepared[0]) for p in prepared)
    grey = np.asarray(image.convert("L"))
    assert trained.preprocess([grey]).shape == (1, 3, 8, 8)
    assert trained.preprocess([]).shape == (0, 3, 8, 8) and trained.predict([]) == []


def test_pillows_images_are_read_as_files_are(run, tmp_path):
    """Upright, and with the range of their format."""
    trained = epsa_fused.load_trained(run)
    ramp = np.linspace(0, 1, 16 * 12).reshape(12, 16)
    files = [tmp_path / name for name in ("turned.jpg", "wide.png", "grey.png", "alpha.png")]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray((ramp * 255).astype(np.uint8)).convert("RGB").save(files[0], exif=exif)
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(files[1])
    Image.fromarray((ramp * 255).astype(np.uint8)).save(files[2])
    Image.fromarray((ramp * 255).astype(np.uint8)).convert("LA").save(files[3])
    opened = [Image.open(file) for file in files]
    sizes = [image.size for image in opened]
    prepared = trained.preprocess(opened)
    assert torch.equal(prepared, trained.preprocess(files))
    assert [image.size for image in opened] == sizes  # they stay as they are
    floats = Image.fromarray(ramp.astype(np.float32))
    assert (trained.preprocess([floats]) - prepared[2]).abs().max() < 0.03
    for wrong, words in (
        (Image.fromarray((ramp * 65535).astype(np.uint16)), "no format with 16-bit integers"),
        (Image.fromarray(ramp.astype(np.float32) * 2), "expected floats from 0 to 1, got 0 to 2"),
    ):
        with pytest.raises(InputError, match=rf"pictures\[1\]: .*{words}"):
            trained.preprocess([files[0], wrong])


def test_predictions(run):
    trained, files = epsa_fused.load_trained(run), held_out()[:3]
    found = trained.predict(files, top=2)
    with torch.no_grad():
        shares = trained.model(trained.preprocess(files)).softmax(1)
    for row, classes in zip(shares, found, strict=True):
        best = row.argsort(descending=True)[:2].tolist()
        assert [name for name, _ in classes] == [trained.classes[i] for i in best]
        assert [share for _, share in classes] == pytest.approx(row[best].tolist(), rel=1e-6)
    assert [len(row) for row in trained.predict(files)] == [3] * 3  # no more than there are


def test_grey_images_of_another_range(digits):
    trained, data = epsa_fused.load_trained(digits), open_data("digits", 0)
    assert (trained.shape, trained.white, trained.centre) == ((8, 8, 1), 16, 1.0)
    raw = [data.held_out.image(i, None)[..., 0] for i in range(20)]
    prepared = trained.preprocess([np.rint(r * (255 / 16)).astype(np.uint8) for r in raw])
    right = torch.stack([as_trained(data, i) for i in range(20)])
    assert (prepared - right).abs().max() < 0.5 * 16 / 255 / data.std[0] + 1e-5


# ---- the command ----


def test_the_command(run, capsys):
    files = [str(file) for file in held_out()[:2]]
    assert main([str(run), *files, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = epsa_fused.load_trained(run).predict(files, 2)
    for line, file, classes in zip(lines, files, found, strict=True):
        shown = ", ".join(f"{name} {share:.1%}" for name, share in classes)
        assert line == f"{file}: {shown}"


def test_the_command_in_json(run, capsys):
    file = str(held_out()[0])
    assert main([str(run), file, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (classes,) = epsa_fused.load_trained(run).predict([file])
    assert json.loads(line) == {
        "image": file,
        "classes": [{"class": name, "probability": share} for name, share in classes],
    }


def test_what_the_command_refuses(run, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    good = str(held_out()[0])
    for given, words in (
        ([str(tmp_path / "none"), good], r"no such file"),
        ([str(run), good, str(broken)], rf"{broken}: UnidentifiedImageError"),
        ([str(run), str(tmp_path / "absent.png")], "absent.png: FileNotFoundError"),
        ([str(run / "checkpoint.pt"), good], "expected best.pt .* got a checkpoint to resume from"),
    ):
        assert main(given) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert re.search(words, error), error
    with pytest.raises(SystemExit):
        main([str(run), good, "--top", "0"])


# ---- refused files ----


def changed(run: Path, folder: Path, change) -> Path:
    best = saved(run, "best.pt")
    change(best)
    torch.save(best, folder / "best.pt")
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    (
        (lambda best: best.update(format=1), "expected a checkpoint of format 2, got 1"),
        (lambda best: best.pop("shape"), "got weights of another version, without shape"),
        (lambda best: best.pop("run"), "expected best.pt of this version's training"),
        (lambda best: best["run"].update(model="resnet50"), "expected a model of .*, got resnet50"),
        (lambda best: best["state_dict"].pop("fc.bias"), "its weights do not fit small_epsanet"),
        (
            lambda best: best["run"]["classes"].append("dog"),
            "small_epsanet: size mismatch for fc",
        ),
    ),
)
def test_files_of_other_kinds(run, tmp_path, change, words):
    with pytest.raises(InputError, match=f"(?s){words}"):
        epsa_fused.load_trained(changed(run, tmp_path, change))


def test_a_run_without_a_best_epoch(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"expected best.pt of a training, there is no such"):
            epsa_fused.load_trained(path)


def test_a_file_with_code_is_not_run(tmp_path):
    torch.save({"format": 2, "model": torch.nn.Linear(1, 1)}, tmp_path / "best.pt")
    with pytest.raises(InputError, match="more than tensors and plain values"):
        epsa_fused.load_trained(tmp_path)


@pytest.mark.parametrize(
    ("pictures", "words"),
    (
        ("a.png", "pictures: expected a sequence, got 'a.png'"),
        ([1], r"pictures\[0\]: expected a file, an image of pillow or an array, got 1"),
        ([np.zeros((4, 4, 3))], r"pictures\[0\]: expected uint8 .*, got float64 \[4, 4, 3\]"),
        ([np.zeros((4, 4, 4), np.uint8)], r"got uint8 \[4, 4, 4\]"),
        ([np.zeros(4, np.uint8)], r"got uint8 \[4\]"),
        ([np.zeros((0, 5), np.uint8)], r"got uint8 \[0, 5\]"),
    ),
)
def test_pictures_of_other_types(run, pictures, words):
    with pytest.raises(TypeError, match=words):
        epsa_fused.load_trained(run).preprocess(pictures)


# ---- a start from weights ----


@pytest.mark.parametrize("kind", ("best.pt", "state_dict", "model", "model_ema", "safetensors"))
def test_fine_tuning(kind, run, tmp_path, capsys):
    best = saved(run, "best.pt")["state_dict"]
    best["fc.weight"] = best["fc.weight"][:2].clone()  # of another number of classes
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        optional("safetensors.torch").save_file(best, path)
    else:
        whole = {"best.pt": {"format": 2, "state_dict": best}, "state_dict": best}
        torch.save(whole.get(kind, {"model": {}, kind: best}), path)
    config = settings(tmp_path / "out", weights=str(path), epochs=1, lr=0.0)
    with Processes("cpu") as processes:
        made = training.Training(config, processes)
        made.close()
    state = made.model.state_dict()
    for name, value in best.items():
        assert torch.equal(state[name], value) == (name != "fc.weight"), name
    said = capsys.readouterr().out
    taken = f"{path}, its averaged weights" if kind == "model_ema" else path
    assert f"--weights: {taken}: load_backbone: {len(state) - 1} of {len(state)} tensors" in said
    assert "not fitting: fc.weight [3, " in said


def test_a_resumed_run_has_its_own_weights(run, tmp_path, capsys):
    weights = {name: 0 * v for name, v in saved(run, "best.pt")["state_dict"].items()}
    torch.save(weights, tmp_path / "zeros.pt")
    out = tmp_path / "out"
    train(settings(out, epochs=1))
    before = saved(out, "checkpoint.pt")["state_dict"]
    with Processes("cpu") as processes:
        again = settings(out, epochs=2, resume="yes", weights=str(tmp_path / "zeros.pt"))
        made = training.Training(again, processes)
        made.close()
    assert all(torch.equal(v, before[name]) for name, v in made.model.state_dict().items())
    assert "load_backbone" not in capsys.readouterr().out


def test_weights_that_cannot_be_used(tmp_path):
    files = {"cut.pt": b"PK", "cut.safetensors": b"12345678", "text.pt": b"hello"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "code.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save({"fc.weight": 1}, tmp_path / "number.pt")
    for name, words in {
        "absent.pt": "there is no ",
        "cut.pt": "expected tensors and plain values|it is damaged",
        "cut.safetensors": "it is damaged, or of another kind",
        "text.pt": "expected tensors and plain values|it is damaged",
        "code.pt": "expected tensors and plain values",
        "list.pt": "expected a state_dict, got list",
        "other.pt": r"expected some tensor with the name and shape .* got other \[1\]",
        "number.pt": "expected Tensors by their names, got 'fc.weight': 1",
    }.items():
        with pytest.raises(InputError, match=rf"(?s)^--weights: .*{name}: .*({words})"):
            train(settings(tmp_path / "out", weights=str(tmp_path / name)))
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
