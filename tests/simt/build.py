"""Compiles kernels and the emulator that runs them on the CPU, plain or with a sanitizer.

`asan` stands for the address and the undefined-behaviour sanitizers together, `tsan` for the thread
sanitizer.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
EMULATOR = HERE / "emulator.cpp"

# What a vector's cast does is no aliasing that C++ allows, but CUDA's compiler does.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fno-strict-aliasing", "-Wall", "-Wextra"]
# nvcc's `#pragma unroll` means nothing to g++.
FLAGS += ["-Wno-unknown-pragmas", "-DEPSA_EMULATED"]
SANITIZERS = {
    "": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-fsanitize=thread"],
}


def compile(
    sources: Sequence[Path], out: Path, sanitizer: str = "", *, flags: Sequence[str] = ()
) -> Path:
    """A program of `sources` and the emulator."""
    pairs = [(source, out.with_suffix(f".{source.stem}.o")) for source in [*sources, EMULATOR]]
    compile_objects(pairs, sanitizer, flags=flags)
    return link([made for _, made in pairs], out, sanitizer)


def compile_objects(
    pairs: Sequence[tuple[Path, Path]],
    sanitizer: str = "",
    *,
    root: Path = ROOT,
    flags: Sequence[str] = (),
) -> None:
    """An object of each source, in pairs (source, object); `root`: a copy of the project's."""

    def one(source: Path, out: Path) -> None:
        watched = SANITIZERS[sanitizer]
        if source == EMULATOR and sanitizer:
            # The sanitizer must not watch the scheduler, which tells it of the threads instead.
            watched = [f"-DEPSA_{sanitizer.upper()}"]
        include = [f"-I{root / 'csrc'}", f"-I{root / 'tests' / 'simt'}"]
        _gxx(*FLAGS, *include, *flags, *watched, "-c", source, "-o", out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: one(*pair), pairs))


def link(objects: Sequence[Path], out: Path, sanitizer: str = "", *, shared: bool = False) -> Path:
    """A program, or a `shared` library, of objects and libraries."""
    _gxx(*SANITIZERS[sanitizer], *(["-shared"] if shared else []), *objects, "-o", out)
    return out


def run(program: Path, *args: str, timeout: float = 120) -> subprocess.CompletedProcess:
    """Runs a compiled program; both of its streams are in `stdout`."""
    command = [str(program), *args]
    result = _run(command, timeout)
    if "unexpected memory mapping" in result.stdout:
        # TSan's runtime does not know the addresses that a newer kernel gives out at random.
        result = _run(["setarch", "-R", *command], timeout)
    return result


@functools.cache
def missing(sanitizer: str = "") -> str | None:
    """Why programs with this sanitizer cannot be built or run here; None where they can."""
    if shutil.which("g++") is None:
        return "g++ is missing"
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "empty.cpp"
        source.write_text("int main() {}\n")
        program = source.with_suffix("")
        try:
            _gxx(*FLAGS, *SANITIZERS[sanitizer], source, "-o", program)
        except RuntimeError as error:
            return f"g++ {' '.join(SANITIZERS[sanitizer])} does not work: {error}"
        result = run(program)
        if result.returncode != 0:
            return f"programs with {sanitizer or 'no sanitizer'} do not run: {result.stdout}"
    return None


def _gxx(*args: str | Path) -> None:
    result = subprocess.run(["g++", *map(str, args)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(result.stderr)


def _run(command: list[str], timeout: float) -> subprocess.CompletedProcess:
    environment = os.environ | {
        # Leaks are not looked for: an abandoned launch never unwinds its threads' stacks.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    return subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
