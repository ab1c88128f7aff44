"""A user's own images, unlabelled and in colour, from a folder to a student, as described in the README."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from harness import LINES, ROOT, TINY_PAIRS, TINY_TEACHER, Run
from PIL import Image

import beeline
from beeline.recipes import find
from cluster.steps import check_recipe


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
    run("trainers/train_lmm.py", *place, "--student", "l2", f"{LINES}.iterations", "3", "--student.batch-size", "16")
    student = beeline.load(tmp_path / "ws/students/l2")
    assert beeline.generate(student, n=3).shape == (3, 3, 16, 16)


def test_the_documented_recipe_works_as_printed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/your-own-data.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "recipes.py").write_text(source)
    chance = np.random.default_rng(0)
    for k in range(20):
        folder = tmp_path / f"photos/{k % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (40, 30, 3), np.uint8)).save(folder / f"{k}.jpg")
    done = run("pipeline/ingest_images.py", "recipes:photos", cwd=tmp_path)
    assert "images: 20 images in 10 classes, the same number in each: 2 in class 0 (0)" in done.stdout
    assert (tmp_path / "runs/photos/images/_SUCCESS").exists()
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = find("recipes:photos", seed=3)
    check_recipe(recipe)
    assert (recipe.name, recipe.teacher.seed, recipe.teacher.network.img_channels) == ("recipes:photos", 3, 3)
