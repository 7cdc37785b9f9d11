"""--config: options from a TOML file."""

import re
import sys

import pytest
from support.optional import optional
from support.pages import block
from support.training import settings

from epsa_fused.train import Config
from epsa_fused.train.__main__ import main


@pytest.fixture
def file(tmp_path):
    if sys.version_info < (3, 11):
        optional("tomli")

    def written(text: str) -> list[str]:
        path = tmp_path / "run.toml"
        path.write_text(text)
        return ["--config", str(path)]

    return written


def test_the_command_line_wins_over_the_file_and_the_file_over_the_recipe(file):
    arguments = file(
        'batch = 32\nimage-size = 16\nlr = 1\nchannels-last = true\nmodel = "small_senet"'
    )
    config = Config.of_command_line([*arguments, "--batch", "16", "--no-channels-last"])
    recipe = Config.of("digits")
    assert config == Config.of(
        "digits", batch=16, image_size=16, lr=1.0, channels_last=False, model="small_senet"
    )
    assert config.schedule == recipe.schedule == "cosine" and recipe.batch == 64


def test_the_recipe_is_that_of_the_data_in_the_file(file, tmp_path):
    config = Config.of_command_line(file(f'data = "{tmp_path}"\nresume = "auto"'))
    assert config == Config.of(str(tmp_path), resume="auto")


def test_every_option_can_be_in_it(file, tmp_path):
    wanted = settings(tmp_path, warmup=1, ema=0.5, tensorboard=True, weights="a.pt", evaluate=True)
    lines = []
    for name, value in vars(wanted).items():
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        lines.append(f"{name.replace('_', '-')} = {shown}")
    assert Config.of_command_line(file("\n".join(lines))) == wanted


def test_the_file_in_the_docs(file, tmp_path):
    text = block("toml", "channels-last").code.replace('"imagenet"', repr(str(tmp_path)))
    config = Config.of_command_line(file(text))
    assert config == Config.of(
        str(tmp_path), batch=512, lr=0.2, warmup=5, amp="bf16", channels_last=True
    )


@pytest.mark.parametrize(
    ("text", "words"),
    (
        ("bath = 3\nimage_size = 8\nlr = 1", "such as image-size, got bath, image_size$"),
        ('config = "other.toml"', "got config$"),
        ("[model]\nname = 1", "--model: expected a value of type str, got {'name': 1}"),
        ('epochs = "3"', "--epochs: expected a value of type int, got '3'"),
        ("epochs = 3.0", r"--epochs: expected a value of type int, got 3\.0"),
        ("epochs = 0", "--epochs: expected at least 1, got 0"),
        ("lr = nan", "--lr: expected at least 0, got nan"),
        ("resume = true", "--resume: expected a value of type str, got True"),
        ('model = "resnet"', "--model: expected one of epsanet50, .*, got 'resnet'"),
        ("epochs =", "expected TOML: Invalid value"),
    ),
)
def test_what_a_file_may_not_hold(file, capsys, text, words):
    assert main(file(text)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(rf"^error: --config: .*run\.toml: .*{words}", error.rstrip()), error


def test_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "latin").write_bytes(b'out = "\xe9"')
    for name, words in {
        "none.toml": "cannot be read: No such file or directory",
        ".": "cannot be read: Is a directory",
        "latin": "expected TOML: 'utf-8' codec",
    }.items():
        assert main(["--config", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err


def test_python_3_10_asks_for_tomli(file, capsys, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    monkeypatch.setitem(sys.modules, "tomli", None)
    assert main(file("epochs = 3")) == 2
    assert "--config needs the package tomli, which is not installed: pip install tomli" in (
        capsys.readouterr().err
    )
