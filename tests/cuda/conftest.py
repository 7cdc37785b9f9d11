"""Programs that run the CUDA kernels on the CPU, each built once for a file of tests."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from simt import build


def programs_of(item: pytest.Item) -> Iterator[build.Program]:
    """The programs that a test needs and that can be built here."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    for program in values:
        if isinstance(program, build.Program) and not build.missing(program.sanitizer):
            yield program
    if "library" in getattr(item, "fixturenames", ()):
        yield build.Program("library")


@pytest.fixture(scope="module")
def workshop(request, tmp_path_factory) -> Iterator[build.Workshop]:
    """Compiles the programs of the file's selected tests in the background."""
    if reason := build.missing():
        pytest.skip(reason)
    with build.Workshop(tmp_path_factory.mktemp("simt")) as workshop:
        items = [item for item in request.session.items if item.path == request.path]
        for program in itertools.chain.from_iterable(map(programs_of, items)):
            workshop.start(program)
        yield workshop


@pytest.fixture
def built(workshop, program) -> Path:
    """The executable of the test's parameter `program`."""
    if reason := build.missing(program.sanitizer):
        pytest.skip(reason)
    return workshop.path(program)
