"""Builds programs that run CUDA kernels on the CPU, plain or with a sanitizer.

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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from simt import broken

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
EMULATOR = sorted((HERE / "emulator").glob("*.cpp"))
SELF_TEST = sorted((HERE / "self_test").glob("*.cpp"))
CASES = sorted((HERE / "cases").glob("*.cpp"))
KERNELS = HERE / "emulated_launch.cpp"
CONV_KERNELS = HERE / "emulated_conv.cpp"
OPERATORS = [
    HERE / "emulated_op.cpp",
    *(
        ROOT / "csrc" / "ops" / f"{name}.cpp"
        for name in ("attention", "conv", "module", "calls", "library")
    ),
]
TEST_PLANS = HERE / "test_plans.cpp"
PLAN = ROOT / broken.PLAN
CONV_PLAN = ROOT / "csrc" / "cuda" / "conv_plan.cpp"

# nvcc lets a cast read an object as a vector; -fno-strict-aliasing makes g++ do the same.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra"]
# g++ does not know nvcc's `#pragma unroll`.
FLAGS += ["-Wno-unknown-pragmas", "-DEPSA_EMULATED"]
# What asan watches takes longer to compile than to run, and -O0 compiles it in half the time.
SANITIZERS = {
    "": [],
    "asan": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-fsanitize=thread"],
}


@dataclass(frozen=True)
class Program:
    """`name` is "self_test", "cases" or "library": the operators, for torch.ops.load_library."""

    name: str
    sanitizer: str = ""
    types: str = ""  # the element types of the kernels; "": all
    ucontext: bool = False  # switches fibers by ucontext instead of assembly
    bug: str = ""  # the name of a bug in broken.py that is planted


class Workshop:
    """Compiles each object once. Compilers run in parallel, and beside the tests."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.pool = ThreadPoolExecutor(os.cpu_count())
        self.objects: dict[tuple, Future[Path]] = {}
        self.programs: dict[Program, Path] = {}

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def start(self, program: Program) -> list[Future[Path]]:
        """Begins to compile the program's objects."""
        # The sanitizer must not watch the scheduler, which describes the threads to it instead.
        flags = [f"-DEPSA_{program.sanitizer.upper()}"] if program.sanitizer else []
        flags += ["-DEPSA_UCONTEXT"] if program.ucontext else []
        objects = [self._together(EMULATOR, flags)]
        watched = SANITIZERS[program.sanitizer]
        if program.name == "self_test":
            return [*objects, self._together(SELF_TEST, watched)]
        root = self._planted(program.bug) if program.bug else ROOT
        types = [f"-DEPSA_TYPES={program.types}"] if program.types else []
        # A bug in the plan changes no kernel.
        bug_in_plan = program.bug and broken.BY_NAME[program.bug].file == broken.PLAN
        objects.append(self._object(KERNELS, [*types, *watched], ROOT if bug_in_plan else root))
        objects.append(self._object(PLAN, [], root if bug_in_plan else ROOT))
        if program.name == "library":
            convolutions = [self._object(CONV_KERNELS, ["-O2"]), self._object(CONV_PLAN)]
            return [*objects, self._object(TEST_PLANS), *convolutions, *self._operators()]
        return [*objects, self._object(TEST_PLANS), self._together(CASES)]

    def path(self, program: Program) -> Path:
        """The program, linked."""
        if program not in self.programs:
            parts = [made.result() for made in self.start(program)]
            options = []
            if program.name == "library":
                parts += _torch_libraries()
                options.append("-shared")
            out = self.directory / f"{program.name}-{len(self.programs)}"
            _gxx(*SANITIZERS[program.sanitizer], *options, *parts, "-o", out)
            self.programs[program] = out
        return self.programs[program]

    def _together(self, sources: Sequence[Path], flags: Sequence[str] = ()) -> Future[Path]:
        """One object of several sources: most of a small file's time goes into its headers."""
        path = self.directory / f"{sources[0].parent.name}.cpp"
        if not path.exists():
            path.write_text("".join(f'#include "{source}"\n' for source in sources))
        return self._object(path, flags)

    def _object(self, path: Path, flags: Sequence[str] = (), root: Path = ROOT) -> Future[Path]:
        """`root` holds the copy of the project whose source is meant."""
        source = root / path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        key = (source, *flags)
        if key not in self.objects:
            out = self.directory / f"{source.stem}-{len(self.objects)}.o"
            include = [f"-I{root / 'csrc'}", f"-I{root / 'tests' / 'simt'}"]

            def compiled() -> Path:
                _gxx(*FLAGS, *include, *flags, "-c", source, "-o", out)
                return out

            self.objects[key] = self.pool.submit(compiled)
        return self.objects[key]

    def _operators(self) -> list[Future[Path]]:
        from torch.utils.cpp_extension import include_paths

        flags = [f"-I{HERE / 'shims'}", *(f"-isystem{path}" for path in include_paths())]
        return [self._together(OPERATORS, flags)]

    def _planted(self, bug: str) -> Path:
        """A copy of the sources with the bug."""
        root = self.directory / bug
        if not root.exists():
            for part in ("csrc", "tests/simt"):
                shutil.copytree(ROOT / part, root / part)
            broken.BY_NAME[bug].plant(root)
        return root


def run(program: Path, *args: str, timeout: float = 120) -> subprocess.CompletedProcess:
    """Runs a compiled program; both of its streams are in `stdout`."""
    command = [str(program), *args]
    result = _run(command, timeout)
    if "unexpected memory mapping" in result.stdout:
        # TSan's runtime rejects some addresses that newer kernels choose at random.
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


def _torch_libraries() -> list[Path]:
    import torch

    return [Path(torch.__file__).parent / "lib" / f"lib{name}.so" for name in ("torch_cpu", "c10")]


def _gxx(*args: str | Path) -> None:
    result = subprocess.run(["g++", *map(str, args)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(result.stderr)


def _run(command: list[str], timeout: float) -> subprocess.CompletedProcess:
    environment = os.environ | {
        # A failed launch never unwinds its threads' stacks: leaks mean nothing.
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
