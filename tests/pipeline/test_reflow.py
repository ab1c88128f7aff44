"""Reflow: pairs of a student, in its folder, and a student that trains on them. Without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch

from beeline.checkpoint import build, dump
from beeline.config import OptimizerConfig, PairsConfig, PhaseConfig, StudentConfig, VerifyConfig, to_dict
from beeline.errors import BeelineError, SettingError
from beeline.files.names import maker_of_pairs, pairs_folder
from beeline.objectives.kd import DistillationConfig
from beeline.sampling import Sampling, sample
from beeline.sampling.few_step import FewStep
from pipeline import gen_pairs, verify_pairs
from pipeline.model_folders import publish_model, require_model
from pipeline.reader import ShardReader
from pipeline.stage import require
from pipeline.storage import Folder
from trainers import loop
from trainers.log import read_log
from trainers.student import student_training
from trainers.train_lmm import train_lmm

FLOW = "students/lmm"
REFLOW = replace(small.PAIRS, model=FLOW, num_steps=2)
OPTIMIZER = OptimizerConfig(lr=1e-3)
STUDENT = StudentConfig(
    name="reflowed", init=FLOW, pairs=FLOW, batch_size=12, ema_half_lives=(3.0,),
    phases={"distillation": PhaseConfig(iterations=3, optimizer=OPTIMIZER, objective=DistillationConfig(num_steps=4))},
)  # fmt: skip


def serially(worker: Any, arguments: dict[str, Any], items: Iterable[int], *_: Any, **__: Any) -> Iterator[dict[str, Any]]:
    """Do the work of a pool in this process."""
    made = worker(**arguments)
    return (made.work(k) for k in list(items))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    for module in (gen_pairs, verify_pairs):
        monkeypatch.setattr(module, "run_pool", serially)
    place = small.workspace(tmp_path / "ws")
    student, _ = require_model(place, FLOW, "digits")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)  # other weights than the teacher's
    for file, data in dump(student, {}).items():
        (place / FLOW).write(file, data)
    return place


def read(workspace: Folder, folder: str) -> dict[str, np.ndarray]:
    return ShardReader(workspace / folder, require(workspace, folder, "digits")["pairs"], seed=0).batch(0, small.COUNT)


def test_pairs_of_a_student_are_its_own(workspace: Folder) -> None:
    before = (workspace / "pairs").sizes()
    gen_pairs.gen_pairs(str(workspace), "digits", REFLOW)
    rows, others = read(workspace, "students/lmm/pairs"), read(workspace, "pairs")
    order = np.argsort(rows["index"])
    model, digest = require_model(workspace, FLOW, "digits")
    indices, labels = rows["index"][order].tolist(), torch.from_numpy(rows["label"][order].copy())
    again = sample(model, indices, labels, Sampling(solver="heun", num_steps=2), seed=small.PAIRS.seed)
    np.testing.assert_allclose(again.numpy(), rows["x1"][order], rtol=1e-4, atol=1e-4)
    assert not np.allclose(rows["x1"][order], others["x1"][np.argsort(others["index"])], atol=1e-2)
    plan = require(workspace, "students/lmm/pairs", "digits")
    assert (plan["pairs"]["model"], plan["teacher_sha256"], plan["evaluations"]) == (FLOW, digest, 3)
    assert (workspace / "pairs").sizes() == before
    verify_pairs.verify_pairs(str(workspace), "digits", VerifyConfig(model=FLOW, resample=1))
    publish_model(workspace / FLOW, dump(require_model(workspace, "teacher", "digits")[0], {}))
    with pytest.raises(BeelineError, match="students/lmm makes other images"):
        verify_pairs.verify_pairs(str(workspace), "digits", VerifyConfig(model=FLOW, resample=3))


def test_a_student_trains_on_the_pairs_it_names(workspace: Folder, tmp_path: Path) -> None:
    gen_pairs.gen_pairs(str(workspace), "digits", REFLOW)
    losses = {}
    for maker in ("teacher", FLOW):
        config, session = replace(STUDENT, pairs=maker), loop.Session(folder=Folder(str(tmp_path / maker)))
        plans = {"pairs": require(workspace, pairs_folder(maker), "digits"), "images": None}
        task = student_training(session=session, workspace=workspace, recipe="digits", config=config, **plans)
        loop.run(task, session, loop.Cadence(log_every=1, checkpoint_every=3))
        losses[maker] = read_log(session.folder)[0]["distillation"]
    model, _ = require_model(workspace, FLOW, "digits")
    for maker, loss in losses.items():
        pairs = ShardReader(workspace / pairs_folder(maker), require(workspace, pairs_folder(maker), "digits")["pairs"], seed=0)
        rows = pairs.batch(0, 12)
        noise, labels = torch.from_numpy(rows["noise"]), torch.from_numpy(rows["label"].copy())
        with torch.no_grad():
            images = model(80.0 * noise, torch.full((12,), 80.0), labels)
        assert loss == pytest.approx(float((images - torch.from_numpy(rows["x1"])).square().mean()), rel=1e-3)
    assert losses["teacher"] != pytest.approx(losses[FLOW], rel=1e-2)


def test_pairs_that_are_missing_name_their_command(workspace: Folder) -> None:
    command = f"python pipeline/gen_pairs.py digits --workspace {workspace} --pairs.model students/lmm"
    with pytest.raises(BeelineError, match=f"students/lmm/pairs is missing or not complete; make it with: {command}"):
        train_lmm(str(workspace), "digits", STUDENT)
    with pytest.raises(BeelineError, match=f"holds no pairs; make them with: {command}"):
        verify_pairs.verify_pairs(str(workspace), "digits", VerifyConfig(model=FLOW))
    with pytest.raises(BeelineError, match=r"students/none holds no model; make it with: .*train_lmm.py .* --student none"):
        gen_pairs.gen_pairs(str(workspace), "digits", replace(REFLOW, model="students/none"))


@pytest.mark.parametrize("how", [FewStep(num_steps=4, trained_steps=(0,)), FewStep(num_steps=4, rule="same_noise")])
def test_a_student_without_an_ode_makes_no_pairs(how: FewStep, workspace: Folder) -> None:
    student, _ = require_model(workspace, FLOW, "digits")
    student.few_step = how
    publish_model(workspace / FLOW, dump(student, {}))
    with pytest.raises(BeelineError, match="follows no ODE"):
        gen_pairs.gen_pairs(str(workspace), "digits", REFLOW)
    assert not (workspace / FLOW / "pairs").sizes()


def test_pairs_of_another_shape_are_refused(workspace: Folder) -> None:
    gen_pairs.gen_pairs(str(workspace), "digits", REFLOW)
    publish_model(workspace / "teacher", dump(build(replace(small.NETWORK, img_resolution=16)), {}))
    with pytest.raises(
        BeelineError, match=r"pairs of students/lmm have shape \(1, 8, 8\) and 4 classes; teacher has \(1, 16, 16\)"
    ):
        train_lmm(str(workspace), "digits", replace(STUDENT, init="teacher"))


def test_the_teachers_pairs_keep_their_identity() -> None:
    assert "model" not in to_dict(small.PAIRS, resources=False)
    assert to_dict(REFLOW, resources=False)["model"] == FLOW
    with pytest.raises(SettingError, match="'heun' for students/lmm"):
        PairsConfig(count=4, shard_size=2, model=FLOW, solver="calibrated")


@pytest.mark.parametrize("model", ["teacher", "students/rf", "students/lmm/reconstruction", "students/pairs", "other"])
def test_folders_of_pairs(model: str) -> None:
    assert maker_of_pairs(pairs_folder(model)) == model
    assert maker_of_pairs(model) is None
