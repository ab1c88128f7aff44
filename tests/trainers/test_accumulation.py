"""Score distillation in micro-batches: the gradients of student and fake score are those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import every_method
import pytest
import small
import torch

from beeline.objectives import ObjectiveConfig
from beeline.objectives.learner import Learner
from beeline.objectives.scores import dmd, fake_score, sid
from beeline.objectives.scores.dmd import DMD2Config, DMDConfig
from beeline.objectives.scores.sid import SiDConfig, SIMConfig
from pipeline.storage import Folder
from trainers import loop
from trainers.student import student_training

CONFIGS = [DMDConfig(), DMDConfig(scaled=False), DMD2Config(fake_steps=1), SiDConfig(), SIMConfig()]
Gradients = list[torch.Tensor]
"""One vector of the student, one of the critic."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return small.workspace(tmp_path_factory.mktemp("accumulation") / "ws")


@pytest.fixture
def gradients(workspace: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Gradients]:
    """Return the gradients of a step whose noise is the same for every image, so that parts draw nothing of their own."""
    pattern = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def steady(images: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return images + 0.7 * pattern, torch.full((len(images),), 0.7)

    for module in (dmd, fake_score, sid):
        monkeypatch.setattr(module, "noisy", steady)
    found: Gradients = []
    update = Learner.update

    def recorded(self: Learner, step: int, total: int) -> dict[str, float]:
        found.append(torch.cat([part.grad.flatten().clone() for part in self.parameters if part.grad is not None]))
        return update(self, step, total)

    monkeypatch.setattr(Learner, "update", recorded)

    def call(objective: ObjectiveConfig, **changes: Any) -> Gradients:
        session = loop.Session(folder=Folder(str(tmp_path)))
        config = every_method.training(objective, **changes)
        task = student_training(session=session, workspace=workspace, recipe="digits", config=config, **small.plans(workspace))
        assert task.critic is not None
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():  # a fake score that equals the teacher would leave the student without gradient
            for part in task.critic.model.parameters():
                part += 0.05 * torch.randn(part.shape, generator=generator)
        found.clear()
        task.step(0)
        return list(found)

    return call


@pytest.mark.parametrize("config", CONFIGS, ids=["dmd", "di", "dmd2", "sid", "sim"])
def test_parts_have_the_gradients_of_the_batch(config: ObjectiveConfig, gradients: Callable[..., Gradients]) -> None:
    whole, parts = gradients(config), gradients(config, accumulate=2)
    assert len(whole) == len(parts) == 2
    for a, b in zip(whole, parts, strict=True):
        assert a.norm() > 0
        assert (a - b).norm() < 1e-4 * a.norm()


@pytest.mark.parametrize("config", CONFIGS, ids=["dmd", "di", "dmd2", "sid", "sim"])
def test_parts_in_half_precision_are_close(config: ObjectiveConfig, gradients: Callable[..., Gradients]) -> None:
    whole, parts = gradients(config), gradients(config, accumulate=2, precision="bf16")
    for a, b in zip(whole, parts, strict=True):
        assert 0 < (a - b).norm() < 0.15 * a.norm()
