"""Train a student of the recipe into students/<name>/, phase by phase: DDP on Ray Train.

python trainers/train_lmm.py digits                  # the recipe's main student
python trainers/train_lmm.py digits --student l2     # another student
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

from typing import Any

import tyro

from beeline.config import StudentConfig, to_dict
from beeline.config.student import student_folder
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.files.names import IMAGES, pairs_folder
from pipeline.command import run_command
from pipeline.model_folders import require_features, require_model
from pipeline.stage import Stage, check_fits, fingerprint, require
from pipeline.storage import Folder
from trainers import loop
from trainers.cost import training_cost
from trainers.launch import check_batch, launch
from trainers.student import check_phases, student_training
from trainers.tracking import check_trackers


def train_lmm(workspace: str, recipe: tyro.conf.Suppress[str], student: StudentConfig) -> None:
    """Train a student of the recipe.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    check_student(student)
    place, needs = Folder(workspace), student.needs()
    plan: dict[str, Any] = {"student": to_dict(student, resources=False), "phases": list(student.running)}
    pairs = images = None
    if needs.pairs:
        pairs = require(place, pairs_folder(student.pairs), recipe)
        plan["pairs"] = fingerprint(pairs)
    init, plan["init_sha256"] = require_model(place, student.start, recipe)
    if pairs is not None:
        check_pairs(student, pairs, init)
    check_resolution(student, init.img_resolution)
    if needs.image_folder or student.validate_every:
        images = require(place, IMAGES, recipe)
        check_fits(place, images, init.network_config, student.start)
    if needs.image_folder:
        plan["images"] = fingerprint(images)
    plan["models_sha256"] = {name: require_model(place, name, recipe)[1] for name in needs.models}
    plan["features_sha256"] = {name: require_features(place, name, recipe)[1] for name in needs.features}
    stage = Stage(place, student_folder(student.name), plan)
    if not stage.begin():
        return
    launch(
        student_training,
        {"workspace": place, "recipe": recipe, "config": student, "pairs": pairs, "images": images},
        stage.folder,
        name=stage.name,
        workers=student.workers,
        cadence=loop.Cadence(
            log_every=student.log_every,
            checkpoint_every=student.checkpoint_every,
            validate_every=student.validate_every,
            keep=student.keep,
        ),
        tracking={
            "names": student.trackers,
            "run_id": fingerprint({"plan": stage.plan, "folder": str(stage.folder)}),
            "name": student.name,
            "config": stage.plan,
        },
    )
    cost = training_cost(place, recipe, student, init.network_config)
    stage.finish(images_seen=student.iterations * student.batch_size, cost=cost)


def check_student(student: StudentConfig) -> None:
    """Raise BeelineError for settings that contradict each other. Does not read the workspace."""
    check_phases(student)
    check_batch(student.batch_size, student.workers, student.accumulate)
    check_trackers(student.trackers)


def check_pairs(student: StudentConfig, pairs: dict[str, Any], init: Denoiser) -> None:
    """Raise BeelineError unless the pairs (of plan `pairs`) fit the student's network in shape and classes."""
    made, wanted = (tuple(pairs["shape"]), pairs["num_classes"]), (init.image_shape, init.label_dim)
    if made != wanted:
        raise BeelineError(
            f"the pairs of {student.pairs} have shape {made[0]} and {made[1]} classes; {student.start} has {wanted[0]} and "
            f"{wanted[1]}. Choose other pairs, or another model to start from"
        )


def check_resolution(student: StudentConfig, resolution: int) -> None:
    """Raise BeelineError if a method of the student cannot take images of `resolution` pixels."""
    for phase in student.running.values():
        phase.objective.check(resolution)


if __name__ == "__main__":
    run_command(train_lmm)
