"""`python -m epsa_fused`: what was built, what runs, and a self-check."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.isa import cpu_flags
from support.processes import python

import epsa_fused
from epsa_fused import _C
from epsa_fused.__main__ import main

# A program that runs main() with a part replaced.
BROKEN = """
import sys, epsa_fused.__main__ as program
program.psa_attention = lambda *tensors: program.psa_attention_reference(*tensors) * 1.001
sys.exit(program.main())
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_it_tells_the_build_and_checks_itself():
    output = python("-m", "epsa_fused")
    for isa in _C.build_info()["cpu_isas"]:
        assert isa in output
    assert torch.__version__ in output
    assert f"{epsa_fused.__version__} in {Path(epsa_fused.__file__).parent}" in output
    assert re.search(r"\d(\.\d+)?e-\d\d", output), f"no errors of the self-check in:\n{output}"


def test_a_wrong_result_is_an_error():
    result = run("-c", BROKEN)
    assert result.returncode == 1
    assert result.stdout.count("WRONG") > 4 and not result.stderr


def test_a_report_to_paste(capsys):
    assert main(["--report"]) == 0
    output = capsys.readouterr().out
    first, *lines, last = output.rstrip("\n").split("\n")
    assert first == last == "```"
    facts = {line[:15].strip(): line[15:] for line in lines}
    assert epsa_fused.__version__ in facts["epsa_fused"]
    assert _C.build_info()["compiler"] in facts["built with"]
    assert f"torch {torch.__version__}" in facts["running with"]
    assert facts["CPU kernels"].endswith(f"this machine uses {_C.cpu_isa()}")
    assert facts["CPU threads"].startswith(f"{torch.get_num_threads()} ")
    assert " ".join(platform.libc_ver()) in facts["system"]
    assert {"avx2", "fma", "f16c"} & cpu_flags() <= set(facts["CPU flags"].split())
    assert facts["CUDA of torch"] == (torch.version.cuda or "none")
    assert facts["CUDA kernels"] in ("built", "not built") and facts["CUDA devices"]
    assert "self-check on cpu" in output and "WRONG" not in output


def test_a_report_names_variables_and_installations(monkeypatch, capsys, tmp_path):
    for version in ("0.1.0", "0.2.0+torch2.13cpu"):
        folder = tmp_path / version / f"epsa_fused-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: epsa_fused\nVersion: {version}\n"
        )
        monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setenv("EPSA_CUDA", "auto")
    main(["--report"])
    output = capsys.readouterr().out
    installed = re.search("^installed as +(.+)$", output, re.MULTILINE)[1]
    assert installed.startswith(f"0.2.0+torch2.13cpu in {tmp_path}") and "0.1.0 in" in installed
    assert re.search("^variables .*EPSA_CUDA=auto", output, re.MULTILINE)


@pytest.mark.parametrize(
    ("argument", "code", "message"),
    (("--help", 0, "--report"), ("--wrong", 2, "unrecognized arguments: --wrong")),
)
def test_its_arguments(argument, code, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([argument])
    assert stopped.value.code == code
    printed = capsys.readouterr()
    assert message in printed.out + printed.err and "self-check" not in printed.out


@pytest.mark.parametrize("arguments", ((), ("--report",)))
def test_a_wrong_choice_of_winograd_is_one_line(arguments):
    result = run("-m", "epsa_fused", *arguments, EPSA_WINOGRAD="2")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr == "error: EPSA_WINOGRAD: expected 0 or 1, got '2'\n"


@pytest.mark.parametrize("arguments", ((), ("--report",)))
def test_a_wrong_instruction_set_is_one_line(arguments):
    result = run("-m", "epsa_fused", *arguments, EPSA_CPU_ISA="sse2")
    assert result.returncode == 2 and not result.stdout
    assert re.fullmatch(
        r"error: EPSA_CPU_ISA: expected one of \{baseline.*\} .*, got 'sse2'\n", result.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "buffered"),
    (
        (("epsa_fused",), True),
        (("epsa_fused",), False),
        (("epsa_fused", "--help"), True),
        (("epsa_fused.predict", "--help"), True),
        (("epsa_fused.train", "--help"), True),
    ),
)
def test_a_reader_that_ends_first_ends_it_quietly(arguments, buffered):
    """As `| head -1` does. argparse ignores it, so that --help may end with 0."""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", *arguments],
        env=os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    os.close(writer)
    assert not result.stderr
    unread = 141  # the shells' code for a pipe without a reader
    assert result.returncode in ((unread, 0) if "--help" in arguments else (unread,))


def test_an_error_is_shown_although_nobody_reads_the_output():
    code = "from epsa_fused._commands import while_read\nwhile_read(lambda: print() or 1 // 0)"
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    os.close(writer)
    assert result.returncode == 1
    assert result.stderr.endswith("ZeroDivisionError: integer division or modulo by zero\n")
