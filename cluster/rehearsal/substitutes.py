"""Inputs that a rehearsal copies from its workspace or replaces: the teacher, and pretrained networks or random substitutes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from beeline.checkpoint import CONFIG, SOLVER, WEIGHTS
from beeline.config import Recipe
from beeline.features.backbones import build_backbone
from beeline.features.measuring import MEASURING, build_measuring
from beeline.files.names import TEACHER
from beeline.weights import dump_backbone
from cluster.planning.workspace import Workspace
from cluster.steps import Step, needed_weights
from pipeline.model_folders import publish_model
from pipeline.storage import Folder

RANDOM = "random weights"


def pretrained(there: Workspace, here: Folder, recipe: Recipe, *, random: bool) -> Iterator[Step]:
    """List a step for each pretrained network that the workspace has, and with `random` for each that it lacks. Stages that
    need others fail, with a message that says how to fetch them."""
    for name in needed_weights(recipe):
        target, run = here / "weights" / name, None
        if there.weights(name):
            run = partial(_copy, there.place / "weights" / name, target)
        elif random:
            run = partial(_make, name, target)
        if run:
            yield Step(name=f"weights/{name}", run=run)


def teacher(there: Workspace, here: Folder) -> Step | None:
    """Return the step that copies the workspace's teacher, or None if there is none yet."""
    if not there.teacher:
        return None
    origin = f"imported from {there.imported}" if there.imported else "already trained"
    return Step(name=TEACHER, run=partial(_copy, there.place / TEACHER, here / TEACHER, origin))


def _copy(source: Folder, target: Folder, note: str = "") -> str:
    publish_model(target, {name: source.read(name) for name in (WEIGHTS, CONFIG)})
    if SOLVER in source.sizes():
        target.write(SOLVER, source.read(SOLVER))
    return note


def _make(name: str, target: Folder) -> str:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        network = build_measuring(name) if name in MEASURING else build_backbone(name)
    publish_model(target, dump_backbone(network, {"source": RANDOM}))
    return RANDOM
