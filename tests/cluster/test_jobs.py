"""`ray job submit` works as documented; its logs and exit status tell the truth."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from harness import ROOT, TINY_PAIRS, Head, files, wait_for


def job(head: Head, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    ray = Path(sys.executable).parent / "ray"
    environment = {key: value for key, value in head.environment().items() if key != "RAY_ADDRESS"}
    return subprocess.run(
        [str(ray), "job", command, "--address", head.dashboard, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def submit(head: Head, *entrypoint: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return job(head, "submit", "--working-dir", ".", *options, "--", sys.executable, *entrypoint)


def test_gen_pairs_as_a_job(head: Head, trained: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("pairs"))
    done = submit(head, "pipeline/gen_pairs.py", "digits", "--workspace", str(workspace), *TINY_PAIRS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "pairs: 300 of 300 pairs" in done.stdout
    assert "succeeded" in done.stdout
    assert files(workspace / "pairs", "part-*") == files(trained / "pairs", "part-*")

    failed = submit(head, "pipeline/gen_pairs.py", "digits", "--workspace", str(tmp_path / "nothing"))
    assert failed.returncode != 0
    assert "holds no model; make it with: python trainers/train_teacher.py digits" in failed.stdout
    assert "Traceback" not in failed.stdout


def test_a_stopped_job_goes_on_when_it_is_submitted_again(head: Head, trained: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("pairs"))
    entrypoint = ["pipeline/gen_pairs.py", "digits", "--workspace", str(workspace), *TINY_PAIRS]
    assert submit(head, *entrypoint, options=("--no-wait", "--submission-id", "stopped")).returncode == 0
    wait_for(lambda: len(files(workspace / "pairs", "part-*.parquet")) >= 1, 120, "a shard")
    job(head, "stop", "stopped")
    ended = ("was stopped", "succeeded")
    wait_for(lambda: any(word in job(head, "status", "stopped").stdout for word in ended), 60, "its end")
    again = submit(head, *entrypoint)
    assert again.returncode == 0, again.stdout[-3000:]
    assert files(workspace / "pairs", "part-*") == files(trained / "pairs", "part-*")
