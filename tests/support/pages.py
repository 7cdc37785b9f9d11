"""README, CONTRIBUTING, the pages of docs/ and the folders' READMEs: their blocks of code and their
pictures' scripts, and running those."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from support.optional import optional
from support.paths import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))),
        *(ROOT / "csrc" / "README.md", ROOT / "tests" / "simt" / "README.md"),
    ]
}

# Runs blocks given as [[folder, code], ...] and prints a line of JSON for each. Every block has a
# namespace and a folder of its own, so that it works when it is copied alone.
RUNNER = """
import contextlib, io, json, os, sys, traceback
import torch
for folder, code in json.load(sys.stdin):
    os.chdir(folder)
    sys.path.insert(0, folder)
    modules, printed, result = set(sys.modules), io.StringIO(), {"error": None}
    names = {"__name__": "__main__"}
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "block", "exec"), names)
    except Exception:
        result["error"] = traceback.format_exc()
    result["shapes"] = {k: list(v.shape) for k, v in names.items() if isinstance(v, torch.Tensor)}
    result["stdout"] = printed.getvalue()
    print("RESULT" + json.dumps(result), flush=True)
    sys.path.remove(folder)
    for name in set(sys.modules) - modules:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
            del sys.modules[name]
"""


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    number: int  # among the page's blocks of this language
    code: str

    def __str__(self) -> str:
        return f"{self.page}-{self.language}-{self.number}"


def blocks(language: str) -> list[Block]:
    """Every block of the pages, once where pages repeat it."""
    found: dict[str, Block] = {}
    for page, text in PAGES.items():
        codes = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for number, code in enumerate(codes, 1):
            found.setdefault(code, Block(page, language, number, code))
    return list(found.values())


def block(language: str, marker: str) -> Block:
    """The only block that has `marker` in it."""
    found = [b for b in blocks(language) if marker in b.code]
    assert len(found) == 1, f"{len(found)} blocks have {marker!r}, expected one"
    return found[0]


def commands(page: str) -> list[str]:
    """The commands of a page's sh blocks, without comments; lines that go on are joined."""
    codes = re.findall(r"^```sh\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    lines = "".join(codes).replace("\\\n", "").splitlines()
    stripped = (re.sub(r"\s+", " ", re.sub(r"\s+#.*", "", line)).strip() for line in lines)
    return [line for line in stripped if line]


def environment() -> dict[str, str]:
    """As here, with this Python and this checkout's package first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PATH": path, "PYTHONPATH": python_path}


def run_python(found: dict[Path, Block]) -> dict[Block, dict]:
    """What each block printed, the shapes of its tensors and its error; one process for all."""
    given = json.dumps([[str(folder), block.code] for folder, block in found.items()])
    result = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=given,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    results = [json.loads(line.removeprefix("RESULT")) for line in lines]
    return dict(zip(found.values(), results, strict=True))


def run_shell(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=1200,
    )


def figure_script(name: str) -> ModuleType:
    """A script of docs/figures, imported."""
    optional("matplotlib")
    folder = str(ROOT / "docs" / "figures")
    sys.path.insert(0, folder)
    try:
        return optional(name)
    finally:
        sys.path.remove(folder)
