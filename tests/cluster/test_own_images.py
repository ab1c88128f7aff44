"""A user's own images, unlabelled and in colour, as the README says: from a folder to a student."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from harness import TINY_PAIRS, TINY_TEACHER, Run
from PIL import Image

import beeline


def test_a_folder_of_photos_to_a_student(run: Run, tmp_path: Path) -> None:
    photos, place = tmp_path / "photos", ("digits", "--workspace", tmp_path / "ws")
    photos.mkdir()
    random = np.random.default_rng(0)
    for k in range(40):
        colours = random.integers(0, 256, (2, 2, 3), np.uint8)
        Image.fromarray(colours).resize((24, 18), Image.Resampling.BILINEAR).save(photos / f"{k}.jpg")
    run(
        "pipeline/ingest_images.py", *place, "--images.source", photos, "--images.resolution", "16", "--images.channels", "3",
        "--images.shard-size", "16",
    )  # fmt: skip
    network = [
        "--teacher.network.img-resolution", "16", "--teacher.network.img-channels", "3", "--teacher.network.label-dim", "0",
        "--teacher.network.model-channels", "16", "--teacher.workers.count", "1",
    ]  # fmt: skip
    run("trainers/train_teacher.py", *place, *TINY_TEACHER, *network)
    run("pipeline/gen_pairs.py", *place, *TINY_PAIRS, "--pairs.count", "100")
    unlabelled = run("trainers/train_probe.py", *place, ok=False)
    assert "has no labels; a probe is a classifier and needs them" in unlabelled.stderr
    run("trainers/train_lmm.py", *place, "--student", "l2", "--lmm.reconstruction.iterations", "3", "--lmm.batch-size", "16")
    student = beeline.load(tmp_path / "ws/students/l2")
    assert beeline.generate(student, n=3).shape == (3, 3, 16, 16)
