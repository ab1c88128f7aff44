"""Pairs are made exactly once: killed at any moment and run again, the files are those of an undisturbed run."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from harness import ROOT, TINY_PAIRS, Head, Run, files, wait_for

import beeline
from beeline.noise import crc32, x0
from beeline.samplers import sample
from pipeline.shards import decode


def fresh(trained: Path, tmp_path: Path) -> Path:
    """A copy of the workspace without its pairs."""
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("pairs"))
    return workspace


@pytest.mark.parametrize("victim", ["driver", "actor"])
def test_kill_and_rerun_gives_the_same_bytes(victim: str, head: Head, run: Run, trained: Path, tmp_path: Path) -> None:
    workspace, chance = fresh(trained, tmp_path), random.Random(victim)
    expected = files(trained / "pairs", "part-*")
    assert len(expected) == 6
    command = [sys.executable, "pipeline/gen_pairs.py", "digits", "--workspace", str(workspace), *TINY_PAIRS]
    for already in sorted(chance.sample(range(0, 5), 2)):
        if victim == "actor":
            shutil.rmtree(workspace / "pairs", ignore_errors=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=head.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(lambda n=already: len(files(workspace / "pairs", "part-*.parquet")) >= n, 120, f"{already} shards")
        if victim == "actor":
            wait_for(lambda p=process: bool(head.workers("MapWorker")) or p.poll() is not None, 120, "an actor")
            victims = head.workers("MapWorker")
            assert victims, "the run was over before it could be disturbed"
            for worker in victims:
                worker.send_signal(signal.SIGKILL)
            assert process.wait(300) == 0
        else:
            process.kill()
            assert process.wait() == -signal.SIGKILL, "the run was over before it could be disturbed"
    run("pipeline/gen_pairs.py", "digits", "--workspace", workspace, *TINY_PAIRS)
    assert files(workspace / "pairs", "part-*") == expected
    assert (workspace / "pairs" / "_SUCCESS").exists()


def test_a_truncated_shard_is_found_and_made_again(run: Run, trained: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace)
    shard = workspace / "pairs" / "part-00002.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-50])
    failed = run("trainers/train_lmm.py", "digits", "--workspace", workspace, ok=False)
    assert "part-00002.parquet has" in failed.stderr
    assert "mend it with: python pipeline/gen_pairs.py digits" in failed.stderr
    mended = run("pipeline/gen_pairs.py", "digits", "--workspace", workspace, *TINY_PAIRS)
    assert "part-00002.parquet: unreadable" in mended.stdout
    assert shard.read_bytes() == whole


def test_pairs_are_the_teachers_and_x0_is_not_stored(trained: Path) -> None:
    data = (trained / "pairs" / "part-00003.parquet").read_bytes()
    (x1, labels, indices), metadata = decode(data)
    assert set(pq.read_schema(trained / "pairs" / "part-00003.parquet").names) == {"index", "label", "x1"}
    assert list(indices) == list(range(150, 200))
    assert labels.tolist() == [i % 10 for i in indices]
    assert metadata["x0_crc32"] == crc32(x0(0, indices, (1, 8, 8)))
    teacher = beeline.load(trained / "teacher")
    again = sample(teacher, indices.tolist(), torch.from_numpy(labels.copy()), seed=0)
    np.testing.assert_allclose(again.numpy(), x1, atol=1e-4)


def test_pairs_of_a_calibrated_solver(run: Run, trained: Path, tmp_path: Path) -> None:
    workspace = fresh(trained, tmp_path)
    arguments = ["pipeline/gen_pairs.py", "digits", "--workspace", str(workspace), *TINY_PAIRS, "--pairs.solver", "calibrated"]
    missing = run(*arguments, ok=False)
    assert f"python -m beeline.calibrate {workspace}/teacher" in missing.stderr
    calibrate = [sys.executable, "-m", "beeline.calibrate", str(workspace / "teacher"), "--evaluations", "6", "--trials", "10"]
    subprocess.run([*calibrate, "--noises", "8", "--held-out", "8"], check=True, capture_output=True)
    run(*arguments)
    (x1, labels, indices), metadata = decode((workspace / "pairs" / "part-00001.parquet").read_bytes())
    teacher = beeline.load(workspace / "teacher")
    assert metadata["plan"]["pairs"]["solver"] == "calibrated"
    assert tuple(metadata["plan"]["sigmas"]) == teacher.levels
    again = sample(teacher, indices.tolist(), torch.from_numpy(labels.copy()), seed=0, solver="calibrated")
    np.testing.assert_allclose(again.numpy(), x1, atol=1e-4)


def test_an_imported_teacher_is_used_as_it_is(run: Run, trained: Path, tmp_path: Path) -> None:
    workspace = fresh(trained, tmp_path)
    teacher = workspace / "teacher"
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "about": {"imported": {"file": "released.pkl"}}}))
    for name in ("plan.json", "_SUCCESS", "train.jsonl"):
        (teacher / name).unlink()
    assert "imported from released.pkl" in run("trainers/train_teacher.py", "digits", "--workspace", workspace).stdout
    run("pipeline/gen_pairs.py", "digits", "--workspace", workspace, *TINY_PAIRS)
    assert files(workspace / "pairs", "part-*") == files(trained / "pairs", "part-*")
