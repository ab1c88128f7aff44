"""The whole pipeline as one small job: real stages, a report with the results, and each stage as a separate job."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from harness import LINES, TINY_PAIRS, TINY_TEACHER, Head, Run

TINY = [
    *TINY_TEACHER, *TINY_PAIRS,
    "--probe.iterations", "150",
    "--students.lmm.phases.reconstruction.iterations", "12", "--students.lmm.phases.adversarial.iterations", "6",
    "--students.lmm.phases.frechet.iterations", "4",
    "--students.l2.phases.reconstruction.iterations", "6", "--students.sot.phases.adversarial.iterations", "6",
    "--sweep.iterations", "4",
    "--evaluate.count", "100", "--evaluate.draws", "2", "--evaluate.nfe", "15", "3",
]  # fmt: skip
STUDENTS = ("students/lmm", "students/l2", "students/sot", "students/lmm/reconstruction", "students/lmm/adversarial")


@pytest.fixture(scope="module")
def made(head: Head, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace made by the command, as a job; stages finished in the session's workspace are not repeated."""
    workspace = tmp_path_factory.mktemp("pipeline") / "ws"
    shutil.copytree(trained, workspace)
    done = head.submit("cluster/run_pipeline.py", "digits", "--workspace", workspace, *TINY, "--teacher.workers.count", "1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
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
    for name in ("lmm/reconstruction", "l2"):  # they take any level
        metrics = json.loads((made / f"evaluation/students/{name}/metrics.json").read_text())
        assert [row["label"] for row in metrics["order"]] == ["0", "0,8", "0,6,12"]
    for name in ("lmm", "sot"):
        metrics = json.loads((made / f"evaluation/students/{name}/metrics.json").read_text())
        assert [row["label"] for row in metrics["order"]] == ["0"]
    assert not list(made.rglob("*.tmp"))


def test_the_sweep_tried_what_it_says(made: Path) -> None:
    rows = pq.read_table(made / "sweeps/sot/trials.parquet").to_pylist()
    assert [row["steps"] for row in rows] == ["0", "0,8", "0", "0,8"]
    assert len({row["lr"] for row in rows}) == 4
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
    assert done.stdout.count("already complete") == 4 + 3 + 1 + len(("teacher", *STUDENTS))
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("model.safetensors")}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["pipeline/ingest_images.py"], "images: already complete"),
        (["trainers/train_probe.py", "--probe.iterations", "150"], "probe: already complete"),
        (["trainers/train_teacher.py", *TINY_TEACHER, "--teacher.workers.count", "1"], "teacher: already complete"),
        (["trainers/train_lmm.py", "--student", "l2", f"{LINES}.iterations", "6"], "students/l2: already complete"),
        (["trainers/sweep_lmm.py", "--sweep.iterations", "4"], "sweeps/sot: already complete"),
        (["evaluation/evaluate.py", "--count", "100", "--draws", "2", "--nfe", "2"], "teacher, euler 2: NFE 2, fd_probe_100"),
        (["evaluation/report.py"], "report: "),
    ],
    ids=lambda found: Path(found[0]).stem if isinstance(found, list) else "",
)
def test_stages_are_jobs_too(head: Head, made: Path, command: list[str], said: str) -> None:
    """The longest stage, gen_pairs, is in test_jobs.py; the pipeline above shows what stages do when there is work."""
    script, *options = command
    done = head.submit(script, "digits", "--workspace", made, *options)
    assert done.returncode == 0, done.stdout[-4000:]
    assert said in done.stdout
