"""`ray job submit` works as documented; logs and exit status are correct."""

from __future__ import annotations

import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from harness import TINY_PAIRS, Head, files, wait_for


def test_gen_pairs_as_a_job(head: Head, trained: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("pairs"))
    done = head.submit("pipeline/gen_pairs.py", "digits", "--workspace", str(workspace), *TINY_PAIRS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "pairs: 300 of 300 pairs" in done.stdout
    assert "succeeded" in done.stdout
    assert files(workspace / "pairs", "part-*") == files(trained / "pairs", "part-*")

    failed = head.submit("pipeline/gen_pairs.py", "digits", "--workspace", str(tmp_path / "nothing"))
    assert failed.returncode != 0
    assert "Traceback" not in failed.stdout
    number = re.findall(r"Job '(\w+)' failed", failed.stdout)[0]
    log = [line for line in head.job("logs", number).stdout.splitlines() if line and "SUCC" not in line]
    assert "holds no model; make it with: python trainers/train_teacher.py digits" in log[-1], log


def test_a_job_needs_the_heads_token(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.dashboard}/api/jobs/", timeout=30)


def test_a_stopped_job_goes_on_when_it_is_submitted_again(head: Head, trained: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("pairs"))
    entrypoint = ["pipeline/gen_pairs.py", "digits", "--workspace", str(workspace), *TINY_PAIRS]
    assert head.submit(*entrypoint, options=("--no-wait", "--submission-id", "stopped")).returncode == 0
    wait_for(lambda: len(files(workspace / "pairs", "part-*.parquet")) >= 1, 120, "a shard")
    head.job("stop", "stopped")
    ended = ("was stopped", "succeeded")
    wait_for(lambda: any(word in head.job("status", "stopped").stdout for word in ended), 60, "its end")
    again = head.submit(*entrypoint)
    assert again.returncode == 0, again.stdout[-3000:]
    assert files(workspace / "pairs", "part-*") == files(trained / "pairs", "part-*")
