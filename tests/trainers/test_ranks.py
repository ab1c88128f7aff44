"""Every method on two ranks, as DDP processes without Ray: both end with the same weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch
import torch.distributed
from harness import ROOT

from beeline.recipes import RECIPES
from beeline.recipes.digits_methods import LONG
from pipeline.storage import Folder
from trainers import loop
from trainers.student import student_training

STUDENTS = [name for name in RECIPES["digits_methods"](0).students if not name.endswith(LONG)]


def train(rank: int, folder: str, precision: str) -> None:
    """Train two steps of each phase of each student as one of two ranks; write a JSON of sums of their weights."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    workspace, sums = Folder(f"{folder}/ws"), {}
    for name in STUDENTS:
        student = RECIPES["digits_methods"](0).students[name]
        phases = {key: replace(phase, iterations=2) for key, phase in student.phases.items()}
        config = replace(
            student, init="teacher", pairs="teacher", batch_size=8, accumulate=2, phases=phases, precision=precision
        )  # fmt: skip
        session = loop.Session(rank=rank, world_size=2, folder=Folder(f"{folder}/{name}"))
        task = student_training(
            session=session, workspace=workspace, recipe="digits_methods", config=config, **small.plans(workspace)
        )
        loop.run(task, session, loop.Cadence(log_every=1, checkpoint_every=100))
        sums[name] = [float(parameter.double().sum()) for parameter in task.model.parameters()]
    Path(f"{folder}/rank-{rank}.json").write_text(json.dumps(sums))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_method_trains_on_two_ranks(precision: str, tmp_path: Path) -> None:
    small.workspace(tmp_path / "ws")
    shutil.copytree(tmp_path / "ws/teacher", tmp_path / "ws/students/weak")
    arguments = [str(tmp_path), precision]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for process in ranks:
        errors = process.communicate(timeout=600)[1].decode()
        assert process.returncode == 0, errors[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert list(first) == STUDENTS
    for name in STUDENTS:
        assert first[name] == second[name], name


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2], sys.argv[3])
