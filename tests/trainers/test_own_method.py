"""A custom method, sampling rule and recipe in a separate module: trained, resumed and measured by the commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, Head, Run, wait_for

from pipeline.storage import Folder
from trainers.log import read_log

RECIPE = "own_method:tiny"
MEASURE = ("--count", "100", "--draws", "1", "--steps", "0", "0,8", "--nfe", "2")


@pytest.fixture
def workspace(trained: Path, tmp_path: Path) -> Path:
    """runs/tiny in the folder that holds the module, as its author would have it."""
    shutil.copy(Path(__file__).parent.parent / "own_method.py", tmp_path)
    return Path(shutil.copytree(trained, tmp_path / "runs/tiny"))


def test_it_trains_resumes_and_is_measured(run: Run, head: Head, workspace: Path, tmp_path: Path) -> None:
    run("trainers/train_lmm.py", RECIPE, "--student.name", "undisturbed", cwd=tmp_path)
    driver = subprocess.Popen(
        [sys.executable, ROOT / "trainers/train_lmm.py", RECIPE], cwd=tmp_path, env=head.environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoints = workspace / "students/ours/checkpoints"
    wait_for(lambda: bool(list(checkpoints.glob("*/index.json"))) or driver.poll() is not None, 240, "a checkpoint")
    driver.kill()
    assert driver.wait() != 0, "it was over before it could be killed"
    wait_for(lambda: not head.workers("RayTrainWorker"), 60, "the ranks to end")
    assert "resumed at step" in run("trainers/train_lmm.py", RECIPE, cwd=tmp_path).stdout
    weights = [(workspace / "students" / name / "model.safetensors").read_bytes() for name in ("ours", "undisturbed")]
    assert weights[0] == weights[1]
    logs = [
        [row["consistency"] for row in read_log(Folder(str(workspace / "students" / name)))] for name in ("ours", "undisturbed")
    ]
    assert logs[0] == logs[1]
    config = json.loads((workspace / "students/ours/config.json").read_text())
    assert config["few_step"]["rule"] == "damped"
    assert config["about"]["method"] == "self-consistency, half-life 5"
    objective = config["about"]["trained"]["phases"]["consistency"]["objective"]
    assert objective == {"method": "own_method:SelfConsistencyConfig", "half_life": 5.0, "num_steps": 18}
    done = run("evaluation/evaluate.py", RECIPE, "--model", "teacher", "students/ours", *MEASURE, cwd=tmp_path)
    assert "students/ours, 0,8: NFE 2, fd_probe_100" in done.stdout
    run("evaluation/report.py", RECIPE, cwd=tmp_path)
    assert "self-consistency, half-life 5" in (workspace / "report.html").read_text()


def test_without_its_module_the_rule_is_unknown_and_said(run: Run, workspace: Path) -> None:
    folder = workspace / "students/ours"
    shutil.copytree(workspace / "teacher", folder)
    config = json.loads((folder / "config.json").read_text())
    sampling = {"num_steps": 18, "rule": "damped", "line": "ve", "trained_steps": None}
    (folder / "config.json").write_text(json.dumps(config | {"few_step": sampling}))
    done = run("evaluation/evaluate.py", "digits", "--workspace", workspace, "--model", "students/ours", *MEASURE, ok=False)
    assert done.stderr.count("\n") == 1
    assert "rule is 'damped'; expected text that is same_noise, line, fresh_noise" in done.stderr
    assert "(or another, once the module that adds it to RULES is imported)" in done.stderr


def test_an_option_of_another_method_is_refused(workspace: Path, tmp_path: Path) -> None:
    for student, phase, option in (("ours", "consistency", "distance"), ("l2", "reconstruction", "half-life")):
        command = [sys.executable, ROOT / "trainers/train_lmm.py", RECIPE, "--student", student]
        done = subprocess.run(
            [*command, f"--student.phases.{phase}.objective.{option}", "5"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "Unrecognized options" in done.stderr
    assert not (workspace / "students").exists()
