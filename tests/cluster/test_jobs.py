"""`ray job submit` works as documented; its logs and exit status tell the truth."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from harness import ROOT, TINY_PAIRS, Head, files


def submit(head: Head, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    ray = Path(sys.executable).parent / "ray"
    command = [str(ray), "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", sys.executable, *entrypoint]
    environment = {key: value for key, value in head.environment().items() if key != "RAY_ADDRESS"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


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
