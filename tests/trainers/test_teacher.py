"""Training options of the teacher that the digits do not use."""

from __future__ import annotations

import shutil
from pathlib import Path

from harness import TINY_TEACHER, Run

import beeline
from pipeline.storage import Folder
from trainers.log import read_log


def test_augmentation_bf16_and_accumulation(run: Run, trained: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(trained / "images", workspace / "images")
    place = ("digits", "--workspace", workspace)
    augmented = ("--teacher.augment", "0.12")
    refused = run("trainers/train_teacher.py", *place, *TINY_TEACHER, *augmented, ok=False)
    assert "set teacher.network.augment_dim to 9" in refused.stderr
    odd = run("trainers/train_teacher.py", *place, *TINY_TEACHER, "--teacher.accumulate", "3", ok=False)
    assert "batch size 32 does not divide among 2 workers in 3 parts each" in odd.stderr
    assert not (workspace / "teacher").exists()
    run(
        "trainers/train_teacher.py", *place, *TINY_TEACHER, *augmented, "--teacher.network.augment-dim", "9",
        "--teacher.precision", "bf16", "--teacher.accumulate", "2", "--teacher.network.dropout", "0.1",
    )  # fmt: skip
    log = read_log(Folder(str(workspace / "teacher")))
    assert [row["skipped"] for row in log] == [0] * 8
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    teacher = beeline.load(workspace / "teacher")
    assert teacher.network_config is not None
    assert (teacher.network_config.augment_dim, teacher.network_config.dropout) == (9, 0.1)
    assert beeline.generate(teacher, n=2, num_steps=3).isfinite().all()
