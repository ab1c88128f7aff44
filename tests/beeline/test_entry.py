"""Errors and signals end a command with one line and the right status, from its first import to its last clean-up."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, wait_for

from beeline.entry import SIGNALS

PREAMBLE = """
import signal, sys, time
from beeline.entry import guard, run_main
from beeline.errors import BeelineError
def bad(): raise BeelineError("what, and the fix")
def bug(): raise ValueError("a bug")
def wait(): print("ready", flush=True); time.sleep(60)
def swallow():
    try: wait()
    except KeyboardInterrupt: raise RuntimeError("what a library makes of it")
def slow(): print("cleaning", flush=True); time.sleep(60)
def many():
    while True: print("line")
"""
APART = ("spot_notice", "dashboard")  # scripts that run without the project
Process = subprocess.Popen[str]


def start(code: str) -> Process:
    command = [sys.executable, "-W", "error", "-c", PREAMBLE + code]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def line_of(process: Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("code", "status", "out", "error"),
    [
        ("run_main(lambda: print('done'), lambda: print('clean'))", 0, "done\nclean\n", ""),
        ("run_main(bad, lambda: print('clean'))", 1, "clean\n", "error: what, and the fix\n"),
        ("run_main(lambda: sys.exit(2))", 2, "", ""),
        ("run_main(lambda: sys.exit('words'))", 1, "", "words\n"),
    ],
)
def test_how_calls_end(code: str, status: int, out: str, error: str) -> None:
    process = start(code)
    assert process.communicate(timeout=60) == (out, error)
    assert process.returncode == status


def test_bugs_keep_their_traceback() -> None:
    process = start("run_main(bug, lambda: print('clean'))")
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "clean\n")
    assert error.startswith("Traceback")
    assert error.endswith("ValueError: a bug\n")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("code", ["guard(); wait()", "run_main(wait)", "run_main(swallow)"])
def test_signals(number: signal.Signals, code: str) -> None:
    process = start(code)
    assert line_of(process) == "ready"
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", f"error: {SIGNALS[number]}\n")
    assert process.returncode == 128 + number


def test_a_second_signal_does_not_wait_for_the_clean_up() -> None:
    process = start("run_main(wait, slow)")
    assert line_of(process) == "ready"
    process.send_signal(signal.SIGTERM)
    assert line_of(process) == "cleaning"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == f"error: {SIGNALS[signal.SIGTERM]}\n"
    assert process.returncode == 143


def test_a_background_job_goes_on_ignoring_ctrl_c() -> None:
    process = start("signal.signal(signal.SIGINT, signal.SIG_IGN); guard(); run_main(wait)")
    assert line_of(process) == "ready"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == f"error: {SIGNALS[signal.SIGTERM]}\n"


@pytest.mark.parametrize("code", ["run_main(many)", "run_main(lambda: print('x' * 100_000))"])
def test_a_reader_that_has_gone_is_no_error(code: str) -> None:
    process = start(code)
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""


def entrances() -> list[Path]:
    """List the scripts and modules that are commands."""
    folders = ("beeline", "pipeline", "evaluation", "trainers", "cluster")
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if '\nif __name__ == "__main__":' in path.read_text() and path.stem not in APART]


def catches(process: Process, number: int) -> bool:
    """Return whether a process handles a signal."""
    caught = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("path", entrances(), ids=lambda path: path.stem)
def test_ctrl_c_while_a_command_imports_its_modules(path: Path) -> None:
    """Python itself handles SIGINT from the start, but only the guard handles SIGTERM; once it does, imports are still to
    come."""
    after = ast.parse(path.read_text()).body[2]  # the docstring and __future__ come first
    assert "guard" in ast.dump(after), "the guard must come before all other imports"
    module = path.parent.name == "beeline"
    command = ["-m", f"beeline.{path.stem}"] if module else [str(path.relative_to(ROOT))]
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: catches(process, signal.SIGTERM) or process.poll() is not None, 60, "the guard")
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (130, "", f"error: {SIGNALS[signal.SIGINT]}\n")
