"""The recipe `cifar10` except for sizes: a narrow student, random weights in the full backbones, a few real steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from harness import ADVERSARIAL, LINES, Run
from PIL import Image

import beeline
from beeline.features.backbones import BACKBONES, build_backbone
from beeline.weights import dump_backbone
from pipeline.storage import Folder
from trainers.log import read_log

ON_A_CPU = ["--teacher.workers.gpus", "0", "--teacher.workers.count", "1"]
TEACHER = [
    "--teacher.network.model-channels", "16", "--teacher.network.num-blocks", "1", "--teacher.iterations", "4",
    "--teacher.batch-size", "8", "--teacher.checkpoint-every", "100",
]  # fmt: skip
PAIRS = [
    "--pairs.count", "16", "--pairs.shard-size", "8", "--pairs.batch-size", "8", "--pairs.num-steps", "3", "--pairs.gpus", "0",
    "--pairs.cpus", "0.5", "--pairs.max-actors", "1",
]  # fmt: skip
STUDENT = [
    f"{LINES}.iterations", "2", f"{LINES}.objective.num-steps", "3",
    f"{ADVERSARIAL}.iterations", "2", f"{ADVERSARIAL}.objective.num-steps", "3", f"{ADVERSARIAL}.objective.resize", "64",
    f"{ADVERSARIAL}.objective.discriminator.resize", "128",
    "--student.batch-size", "4", "--student.no-compiled", "--student.accumulate", "2",
    "--student.workers.gpus", "0", "--student.workers.count", "1", "--student.log-every", "1", "--student.validate-every", "2",
]  # fmt: skip


def test_a_few_real_steps(run: Run, tmp_path: Path) -> None:
    chance, source, workspace = np.random.default_rng(0), tmp_path / "photos", tmp_path / "ws"
    for number in range(30):
        folder = source / f"class{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    place = ("cifar10", "--workspace", workspace)
    run("pipeline/ingest_images.py", *place, "--images.source", source, "--images.max-actors", "1")
    run("trainers/train_teacher.py", *place, *TEACHER, *ON_A_CPU)
    run("pipeline/gen_pairs.py", *place, *PAIRS)
    refused = run("trainers/train_lmm.py", *place, *STUDENT, ok=False)
    assert f"python -m beeline.weights fetch vgg16 --out {workspace}/weights" in refused.stderr
    assert not (workspace / "students").exists()
    for name in BACKBONES:
        torch.manual_seed(0)
        files = dump_backbone(build_backbone(name), {})
        for file, data in files.items():
            Folder(str(workspace / "weights" / name)).write(file, data)
    run("trainers/train_lmm.py", *place, *STUDENT)
    log = read_log(Folder(str(workspace / "students/lmm")))
    assert [row["phase"] for row in log] == [0, 0, 1, 1]
    assert all(math.isfinite(value) for row in log for value in row.values())
    assert {"lambda", "critic", "adversarial", "real_positive", "fake_positive", "critic_grad_norm"} <= log[-1].keys()
    assert all(row["skipped"] == 0 for row in log)
    student = beeline.load(workspace / "students/lmm")
    assert beeline.generate(student, n=2, labels=torch.tensor([0, 9])).shape == (2, 3, 32, 32)
    assert (workspace / "students/lmm/ema-6931/model.safetensors").exists()
    plan = json.loads((workspace / "students/lmm/plan.json").read_text())
    assert set(plan["features_sha256"]) == {"vgg16", "tf_efficientnet_lite0", "deit_base_distilled_patch16_224"}
