"""Build of epsa_fused's two extensions, version and dependencies; the rest is in pyproject.toml.

epsa_fused._ops: the operators, a plain shared library without Python.
epsa_fused._C:   facts about the build, a pybind11 module without torch.

A build needs the torch that it is made for, and names it in the wheel. Metadata and the source
distribution need no torch.

EPSA_CUDA=auto (default) builds the CUDA kernels where torch has CUDA and a
toolkit is there, 1 insists on them, 0 leaves them out.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

from setuptools import Distribution, Extension, setup

# The oldest versions. pyproject.toml names setuptools and pybind11 again, for pip.
NEEDED = {"torch": "2.11", "pybind11": "2.13"}
OLDEST_TORCH = NEEDED["torch"]
OLDEST_GCC = 11
VERSION = runpy.run_path(str(Path(__file__).with_name("epsa_fused") / "_version.py"))

# Commands that compile. Of the others, dist_info names the torch that it finds.
COMPILING = {"build", "build_ext", "bdist_wheel", "develop", "editable_wheel", "install"}

# The build isolation of pip hides the packages of the environment that it installs into. The torch
# there is the one to compile against.
sys.path.append(sysconfig.get_path("platlib"))

CSRC = Path("csrc")
INCLUDE = str(Path(__file__).resolve().parent / CSRC)  # absolute: ninja runs elsewhere

# What to compile for where there is no GPU to ask, the oldest first.
ARCHITECTURES = ("8.0", "9.0", "10.0", "11.0", "12.0")


def commands() -> set[str]:
    """The commands that setup.py is called with. Words after options are none."""
    asked = Distribution({"script_name": sys.argv[0], "script_args": sys.argv[1:]})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            asked.parse_command_line()
        except Exception:  # setup() is about to say what is wrong
            return set()
    return set(asked.commands)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def missing_packages() -> list[str]:
    """What a build needs and does not find, with the reason."""
    failures = []
    for name, oldest in NEEDED.items():
        try:
            found = str(import_module(name).__version__)
        except Exception as error:  # a torch that is torn may raise anything
            failures.append(f"{name} ({type(error).__name__}: {error})")
        else:
            if numbers(found) < numbers(oldest):
                failures.append(f"{name} ({found} is too old)")
    return failures


def check_compiler() -> None:
    """SystemExit unless the C++ compiler is a GCC that will do. clang's code would call an OpenMP
    of its own beside that of torch."""
    try:
        command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise SystemExit(f"CXX: expected a command, got {os.environ['CXX']!r}: {error}") from None
    asked = [*command, "-dM", "-E", "-x", "c++", os.devnull]
    try:
        result = subprocess.run(asked, capture_output=True, text=True)
    except OSError:
        got = f"no {command[0]}"
    else:
        macros = dict(re.findall(r"^#define (\w+) (.*)$", result.stdout, re.MULTILINE))
        # all of them say that they are a GCC
        others = {"__clang__": "clang", "__NVCOMPILER": "nvc++", "__INTEL_COMPILER": "Intel's icpc"}
        other = next((name for macro, name in others.items() if macro in macros), None)
        gcc = int(macros.get("__GNUC__", 0))
        if sys.platform != "linux" or (other is None and gcc >= OLDEST_GCC):
            return
        said = result.stderr.strip().splitlines()[-1:] or ["something else"]
        got = other or (f"GCC {gcc}" if gcc else said[0])
    raise SystemExit(
        f"epsa_fused is compiled by GCC {OLDEST_GCC} or newer: expected one as c++ on PATH, got "
        f"{got}; the variable CXX may name another"
    )


def nvcc_release(home: str) -> str:
    """13.0, say, as `nvcc --version` of a toolkit prints it; empty where it does not run."""
    nvcc = Path(home) / "bin" / "nvcc"
    try:
        result = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    except OSError:
        return ""
    found = re.search(r"release (\d+\.\d+)", result.stdout)
    return found[1] if found else ""


def cuda_wanted() -> bool:
    """Whether to build the CUDA kernels, from EPSA_CUDA, torch and the toolkit."""
    import torch
    from torch.utils import cpp_extension

    choice = os.environ.get("EPSA_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"EPSA_CUDA: expected auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return False
    missing = None
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is built without CUDA"
    elif cpp_extension.CUDA_HOME is None:
        missing = "no CUDA toolkit was found: set CUDA_HOME to its root folder"
    elif not (Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc").exists():
        missing = f"CUDA_HOME={cpp_extension.CUDA_HOME} holds no bin/nvcc"
    elif not (Path(cpp_extension.CUDA_HOME) / "include" / "cuda_runtime.h").exists():
        # torch guesses the root from the nvcc on PATH, which may be a wrapper elsewhere
        missing = f"CUDA_HOME={cpp_extension.CUDA_HOME} holds no include/cuda_runtime.h"
    elif major(release := nvcc_release(cpp_extension.CUDA_HOME)) != major(torch.version.cuda):
        missing = (
            f"nvcc in CUDA_HOME={cpp_extension.CUDA_HOME} is of CUDA {release or '(unknown)'}, "
            f"and torch {torch.__version__} is built with CUDA {torch.version.cuda}: set CUDA_HOME "
            f"to a toolkit of CUDA {major(torch.version.cuda)}"
        )
    if missing and choice == "1":
        raise SystemExit(f"EPSA_CUDA=1, but {missing}")
    if missing and torch.version.cuda:
        print(f"epsa_fused: CUDA kernels are left out: {missing}", file=sys.stderr)
    return missing is None


def major(version: str) -> str:
    return version.split(".")[0]


def architectures(listed: str) -> str:
    """TORCH_CUDA_ARCH_LIST of ARCHITECTURES as far as `nvcc --list-gpu-arch`, which printed
    `listed`, names them; PTX of the last is for newer GPUs. Empty where it names none of them."""
    names = listed.split()
    known = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in names]
    return ";".join(known) + "+PTX" if known else ""


def default_architectures() -> str:
    from torch.utils import cpp_extension

    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    try:
        result = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{error}\n{getattr(error, 'stderr', '')}".strip()) from None
    chosen = architectures(result.stdout)
    if not chosen:
        raise SystemExit(
            f"{nvcc} compiles for none of {', '.join(ARCHITECTURES)}: set TORCH_CUDA_ARCH_LIST to "
            "what `nvcc --list-gpu-arch` names, CUDA_HOME to a newer toolkit, or EPSA_CUDA=0 to "
            f"leave the CUDA kernels out. It named: {' '.join(result.stdout.split()) or 'nothing'}"
        )
    return chosen


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in CSRC.glob(pattern))


def together(name: str, files: list[str]) -> str:
    """A source that includes others: torch's headers take most of a small file's time."""
    path = Path("build", "together", f"{name}.cpp")
    text = "".join(f'#include "{Path(file).relative_to(CSRC).as_posix()}"\n' for file in files)
    if not path.exists() or path.read_text() != text:  # a new time would compile it again
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(path)


def extensions(with_cuda: bool) -> list[Extension]:
    import pybind11
    import torch
    from torch.utils import cpp_extension

    flags = ["-O3", "-g0", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]
    flags += ["-Wno-unknown-warning-option"]  # for clang, which lacks GCC's names
    # -fopenmp only when compiling: the OpenMP runtime is the one that torch has
    # loaded, so that torch.set_num_threads rules. Without it at::parallel_for
    # would be serial and not say so.
    ops_flags = [*flags, "-fopenmp"]
    common = {
        "include_dirs": [INCLUDE, *cpp_extension.include_paths()],
        "library_dirs": cpp_extension.library_paths(),
        "libraries": ["c10", "torch", "torch_cpu"],
        "extra_link_args": ["-s"],
        "language": "c++",
    }
    longest = sources("cpu/kernels/conv.cpp")
    without_torch = sources("cpu/*plan.cpp", "cpu/isa.cpp")
    cpu = [file for file in sources("cpu/*.cpp") if file not in without_torch]
    # setuptools sorts sources by name. The first ones take the longest.
    ops_sources = [
        together("1_conv_kernels", longest),
        together("2_autograd", sources("autocast.cpp", "autograd/*.cpp")),
        together("3_cpu", cpu),
        together("4_ops", sources("ops/*.cpp")),
        *(file for file in sources("cpu/kernels/*.cpp") if file not in longest),
        *without_torch,
    ]
    if with_cuda:
        # where there is a GPU, torch takes its architecture
        if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures()
        ops = cpp_extension.CUDAExtension(
            "epsa_fused._ops",
            ops_sources + sources("cuda/*.cpp", "cuda/*.cu"),
            include_dirs=[INCLUDE],
            extra_compile_args={"cxx": ops_flags, "nvcc": ["-O3", "--threads", "4"]},
            extra_link_args=["-s"],
            py_limited_api=True,  # leaves torch_python out of the libraries
        )
    else:
        ops = Extension("epsa_fused._ops", ops_sources, extra_compile_args=ops_flags, **common)
    info = Extension(
        "epsa_fused._C",
        [
            str(CSRC / path)
            for path in ("info.cpp", "cpu/isa.cpp", "cpu/conv_plan.cpp", "cuda/plan.cpp")
        ],
        include_dirs=[INCLUDE, pybind11.get_include()],
        define_macros=[
            ("EPSA_TORCH_VERSION", f'"{torch.__version__}"'),
            ("EPSA_WITH_CUDA", str(int(with_cuda))),
        ],
        extra_compile_args=[*ops_flags, "-O1", "-fvisibility=hidden"],  # nothing here is hot
        extra_link_args=["-s"],
        language="c++",
    )
    included = sources("**/*.h", "**/*.inc", "**/*.cuh", "**/*.cpp")
    for extension in (ops, info):
        extension.depends = included
    return [ops, info]


def builder() -> type:
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        """torch's builder, with a plain file name for the library that is no Python module."""

        def build_extensions(self) -> None:
            check_compiler()
            super().build_extensions()

        def get_ext_filename(self, ext_name: str) -> str:
            if ext_name.rpartition(".")[2] == "_ops":
                return os.path.join(*ext_name.split(".")) + ".so"
            return super().get_ext_filename(ext_name)

    return BuildExtension


def for_this_torch() -> dict:
    """What a wheel says of the torch that it is built with, and its extensions."""
    import torch

    with_cuda = cuda_wanted()
    version = VERSION["__version__"]
    # Wheels that are given to others name their torch. A source distribution cannot, and pip
    # wants the same version of what it builds from one.
    named = os.environ.get("EPSA_LOCAL_VERSION", "0")
    if named not in ("0", "1"):
        raise SystemExit(f"EPSA_LOCAL_VERSION: expected 0 or 1, got {named!r}")
    if named == "1":
        cuda = torch.version.cuda if with_cuda else None
        version = VERSION["built_for"](torch.__version__, cuda)
    return {
        "version": version,
        "install_requires": [f"torch=={VERSION['minor'](torch.__version__)}.*"],
        "ext_modules": extensions(with_cuda),
        "cmdclass": {"build_ext": builder()},
    }


def for_any_torch() -> dict:
    return {"version": VERSION["__version__"], "install_requires": [f"torch>={OLDEST_TORCH}"]}


def main() -> None:
    given = commands()
    compiling = not COMPILING.isdisjoint(given)
    missing = missing_packages() if compiling or "dist_info" in given else ["not needed"]
    if compiling and missing:
        raise SystemExit(
            "epsa_fused is compiled against the torch that it will run with: first `pip install "
            f'"torch>={OLDEST_TORCH}" "setuptools>=77" ninja "pybind11>={NEEDED["pybind11"]}"`, '
            "then `pip install --no-build-isolation .`; this build does not find "
            + ", ".join(missing)
        )
    setup(**(for_any_torch() if missing else for_this_torch()))


if __name__ == "__main__":  # not where a test looks at the functions above
    main()
