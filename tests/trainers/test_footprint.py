"""Planning counts the bytes that a training really holds, for every method."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import every_method
import pytest
import small
import torch

from beeline import counting
from beeline.config import ProbeNetworkConfig
from beeline.footprint import Footprint, footprint
from beeline.objectives import ObjectiveConfig
from beeline.objectives.learner import Learner
from beeline.recipes import RECIPES
from pipeline.model_folders import require_probe
from pipeline.storage import Folder
from trainers import loop
from trainers.student import student_training

Real = tuple[int, int]
"""Bytes that exist after a step, and bytes of gradients within it."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    place = small.workspace(tmp_path_factory.mktemp("footprint") / "ws")
    small.write_weak(place)
    return place


@pytest.fixture
def run(workspace: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Real]]:
    """Train some steps of an objective, and weigh all tensors that were made."""
    gradients: dict[int, int] = {}
    update = Learner.update

    def weighed(self: Learner, step: int, total: int) -> dict[str, float]:
        found = [part.grad for part in self.parameters if part.grad is not None]
        gradients[id(self)] = sum(tensor.nbytes for tensor in found)
        return update(self, step, total)

    def call(objective: ObjectiveConfig, **changes: Any) -> Real:
        session, plans = loop.Session(folder=Folder(str(tmp_path))), small.plans(workspace)
        config = every_method.training(objective, **changes)
        task = student_training(session=session, workspace=workspace, recipe="digits", config=config, **plans)
        for step in range(2):
            task.step(step)
        gc.collect()
        tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values()), sum(gradients.values())

    monkeypatch.setattr(Learner, "update", weighed)
    gc.collect()
    gc.freeze()  # what exists already is not listed
    yield call
    gc.unfreeze()


def planned(workspace: Folder, objective: ObjectiveConfig, **changes: Any) -> Footprint:
    probe: ProbeNetworkConfig = require_probe(workspace, "losses", "digits")[0].config
    return footprint(small.NETWORK, probe, every_method.training(objective, **changes))


OBJECTIVES = every_method.objectives("cifar10_methods")
KINDS = {objective.representative(): name for name, objective in OBJECTIVES.items()}


@pytest.mark.parametrize("name", KINDS.values())
def test_every_method_holds_what_is_planned(name: str, run: Callable[..., Real], workspace: Folder) -> None:
    held, gradients = run(OBJECTIVES[name])
    plan = planned(workspace, OBJECTIVES[name])
    assert plan.casts == 0
    assert held + gradients == pytest.approx(plan.total, rel=0.02)


@pytest.mark.parametrize("name", ["sid", "guided-guidance", "ctm-adversarial", "caf-acceleration"])
def test_frozen_networks_are_smaller_in_half_precision(name: str, run: Callable[..., Real], workspace: Folder) -> None:
    held, gradients = run(OBJECTIVES[name], precision="bf16")
    plan = planned(workspace, OBJECTIVES[name], precision="bf16")
    assert held + gradients == pytest.approx(plan.total - plan.casts, rel=0.02)
    assert plan.casts > 0


def test_score_distillation_holds_two_learning_networks_and_a_teacher() -> None:
    """Weights, gradients and two moments of the student and of the fake score, an average, and a teacher in half precision."""
    network, recipe = RECIPES["imagenet64"](0).teacher.network, RECIPES["cifar10_methods"](0)
    weights, found = counting.network_bytes(network), footprint(network, recipe.probe.losses, recipe.students["sid"])
    assert (found.averages, found.state) == (weights, 0)
    assert found.student == found.critic == pytest.approx(4 * weights, rel=1e-4)
    assert weights / 2 < found.frozen < 0.6 * weights  # its embedding stays float32
    assert found.casts == pytest.approx(weights, rel=1e-4)  # two networks, two bytes each
    assert found.total == pytest.approx(10.5 * weights, rel=0.01)


def test_feature_networks_and_the_guess_are_counted() -> None:
    recipe = RECIPES["cifar10_methods"](0)
    network, probe = replace(recipe.teacher.network, augment_dim=0), recipe.probe.losses
    found = footprint(network, probe, replace(recipe.students["caf"], precision="fp32"))
    names = ("vgg16", "tf_efficientnet_lite0", "deit_base_distilled_patch16_224")
    assert found.frozen == pytest.approx(sum(map(counting.network_bytes, names)), rel=0.01)
    weights = counting.network_bytes(network)
    assert found.averages == pytest.approx(2 * weights, rel=0.01)
    assert found.student == pytest.approx(5 * weights, rel=0.01)
    assert counting.student_bytes(replace(network, guess=True)) == pytest.approx(4 * weights, rel=0.01)
