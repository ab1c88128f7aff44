"""The device checks run on a CPU, need little more than PyTorch, and survive any behaviour of a check."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness import ROOT

from benchmarks.device import checks, runner
from benchmarks.device.__main__ import SECTIONS
from benchmarks.device.checks import Check, Outcome, Setting, Skip
from cluster.planning import speeds

SETTING = Setting(device=torch.device("cpu"), small=True, folder="")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run the whole command with small networks; return the result and its folder."""
    folder = tmp_path_factory.mktemp("device")
    command = [sys.executable, "-m", "benchmarks.device", "--device", "cpu", "--small", "--no-compile", "--budget", "3000"]
    command += ["--out", str(folder / "device.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3200), folder


def test_all_checks_pass_on_a_cpu(done: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    process, folder = done
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    result = json.loads((folder / "device.json").read_text())
    rows = result["checks"]
    assert {row["section"] for row in rows} == set(SECTIONS)
    assert {row["status"] for row in rows} == {"PASS", "SKIP"}
    skipped = {row["figure"] for row in rows if row["status"] == "SKIP"}
    assert skipped == {"left out by --no-compile", "a CPU has no TF32", "a CPU has no such flags"}
    for row in rows:
        assert f"{row['status']}  {row['section']}: {row['name']}: {row['figure']}" in process.stdout
    assert f"{sum(row['status'] == 'PASS' for row in rows)} passed, 0 failed" in process.stdout
    assert result["machine"]["torch"] == torch.__version__


def test_its_results_are_those_that_the_estimate_reads(
    done: tuple[subprocess.CompletedProcess[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speeds, "RESULTS", done[1])
    found = {(m.task.kind, m.task.precision): m.rate() for m in speeds.benchmarks("cpu")}
    assert found.keys() == {(kind, p) for kind in ("sampling", "reconstruction", "adversarial") for p in ("fp32", "bf16")}
    assert all(rate > 0 for rate in found.values())


BLOCKED = ("ray", "tyro", "botocore", "aiobotocore", "boto3", "s3fs", "fsspec", "pyarrow", "lpips", "torch_fidelity", "pandas")
IMPORTS = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED}))  # importing them then fails as if they were missing
import importlib, pkgutil
import beeline, benchmarks.device
names = []
for package in (beeline, benchmarks.device):
    names += [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    importlib.import_module(name)
from benchmarks.device.__main__ import SECTIONS
assert all("benchmarks.device." + section in names for section in SECTIONS), names
"""


def test_it_needs_neither_ray_nor_what_goes_with_it() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_what_a_check_raises_is_a_line_and_a_traceback() -> None:
    def fail() -> Outcome:
        raise ValueError("expected 1\nfound 2")

    def skip() -> Outcome:
        raise Skip("torch-fidelity is not installed")

    row = runner.run("solver", Check("one", fail), time.time() + 60)
    assert row.line().startswith("FAIL  solver: one: ValueError: expected 1  [")
    assert "expected 1\nfound 2" in row.traceback
    assert (
        runner.run("solver", Check("two", skip), time.time() + 60).line().startswith("SKIP  solver: two: torch-fidelity is not")
    )
    assert runner.run("solver", Check("late", fail), time.time() - 1).status == "SKIP"
    row = runner.run("solver", Check("three", lambda: checks.at_most(2.0, 1.0)), time.time() + 60)
    assert row.line().startswith("FAIL  solver: three: 2 (at most 1)")
    assert runner.run("solver", Check("four", lambda: checks.at_most(float("nan"), 1.0)), time.time() + 60).status == "FAIL"


UNBUILT = """
from benchmarks.device.checks import Check, measured
def checks(setting):
    yield Check("before", lambda: measured("fine"))
    raise ValueError("no network")
"""
SECTION = """
import os, time
from benchmarks.device.checks import Check, measured
def die(): os._exit(7)
def hang(): time.sleep(3600)
def checks(setting):
    yield Check("before", lambda: measured("fine"))
    yield Check("dies", die)
    yield Check("between", lambda: measured("fine"))
    yield Check("hangs", hang, 0.25)
    yield Check("after", lambda: measured("fine"))
"""


def test_a_crash_and_a_hang_cost_one_check_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "benchmarks" / "device"
    package.mkdir(parents=True)
    (package / "faulty.py").write_text(SECTION)
    (package / "unbuilt.py").write_text(UNBUILT)
    paths = f"import benchmarks.device; benchmarks.device.__path__.append({str(package)!r})"
    (tmp_path / "sitecustomize.py").write_text(paths)  # for the process of the lane
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    task = runner.Work(
        setting=SETTING, sections=("unbuilt", "faulty"), only=(), done=frozenset(), deadline=time.time() + 600, threads=1,
        log=str(tmp_path / "log"),
    )  # fmt: skip
    rows: list[runner.Row] = []
    runner.run_lanes([task], rows.append, {})
    assert [f"{row.name} {row.status}" for row in rows] == [
        "before PASS", "the section itself FAIL",
        "before PASS", "dies FAIL", "between PASS", "hangs FAIL", "after PASS",
    ]  # fmt: skip
    assert "ValueError: no network" in rows[1].traceback
    assert rows[3].figure == "the process ended with status 7"
    assert rows[5].figure.startswith("still running after")


def test_interrupted_it_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.device", "--device", "cpu", "--small", "--only", "solver"]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "device.json")], cwd=ROOT, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 300
    while not (started := children.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(120)
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)
