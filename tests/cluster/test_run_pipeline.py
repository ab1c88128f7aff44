"""The whole pipeline as one command, in small: every stage real, and a report that shows what was made."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from harness import TINY_PAIRS, TINY_TEACHER, Run

TINY = [
    *TINY_TEACHER, *TINY_PAIRS,
    "--probe.iterations", "150",
    "--students.lmm.reconstruction.iterations", "12", "--students.lmm.adversarial.iterations", "6",
    "--students.l2.reconstruction.iterations", "6", "--students.sot.adversarial.iterations", "6",
    "--students.kd.reconstruction.iterations", "6", "--students.rf.reconstruction.iterations", "6",
    "--sweep.iterations", "4",
    "--evaluate.count", "100", "--evaluate.draws", "2", "--evaluate.nfe", "15", "3",
]  # fmt: skip
STUDENTS = ("students/lmm", "students/l2", "students/sot", "students/kd", "students/rf", "students/lmm/reconstruction")


@pytest.fixture(scope="module")
def made(run: Run, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace made by the command; what the session's workspace has already is not made again."""
    workspace = tmp_path_factory.mktemp("pipeline") / "ws"
    shutil.copytree(trained, workspace)
    done = run("cluster/run_pipeline.py", "digits", "--workspace", workspace, *TINY, "--teacher.workers.count", "1")
    assert f"report: {workspace}/report.html" in done.stdout
    for stage in ("images", "probe", "teacher", "pairs"):
        assert f"{stage}: already complete" in done.stdout
    return workspace


def test_the_layout_of_the_workspace(made: Path) -> None:
    for name in ("teacher", *STUDENTS):
        assert (made / name / "model.safetensors").exists()
        assert (made / name / "config.json").exists()
        metrics = json.loads((made / "evaluation" / name / "metrics.json").read_text())
        for row in metrics["rows"]:
            assert {"model", "nfe", "steps", "metric", "n", "mean", "std", "min", "draws"} <= row.keys()
            assert row["model"] == name
        distance = [row for row in metrics["rows"] if row["metric"] == "fd_probe_100"]
        assert [(row["n"], len(row["draws"])) for row in distance] == [(100, 2)] * len(metrics["order"])
        assert metrics["provenance"]["model_sha256"]
    metrics = json.loads((made / "evaluation/students/lmm/reconstruction/metrics.json").read_text())
    assert [row["label"] for row in metrics["order"]] == ["0", "0,8", "0,6,12"]
    assert not list(made.rglob("*.tmp"))


def test_the_sweep_tried_what_it_says(made: Path) -> None:
    table = pd.read_parquet(made / "sweeps/sot/trials.parquet")
    assert table["steps"].tolist() == ["0", "0,8", "0", "0,8"]
    assert table["lr"].nunique() == 4
    assert (made / "sweeps/sot/pareto.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_self_contained_and_shows_the_figures(made: Path) -> None:
    page = (made / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    for name in ("teacher", *STUDENTS):
        rows = json.loads((made / "evaluation" / name / "metrics.json").read_text())["rows"]
        distance = next(row for row in rows if row["metric"] == "fd_probe_100")
        assert f"{distance['mean']:.3f}" in page
    assert "undefined" not in page.lower()


def test_run_again_it_returns_at_once(run: Run, made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("model.safetensors")}
    done = run("cluster/run_pipeline.py", "digits", "--workspace", made, *TINY, "--teacher.workers.count", "1")
    assert done.stdout.count("already complete") == 4 + 5 + 1 + 7
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("model.safetensors")}
