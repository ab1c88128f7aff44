"""Train a student of the recipe into students/<name>/, phase by phase: DDP on Ray Train.

python trainers/train_lmm.py digits                  # the recipe's main student
python trainers/train_lmm.py digits --student l2     # another student

With `subsets` above 1, a student is a set: one training for each subset of the classes, in students/<name>/<number>, and a
model in students/<name> that sends each sample to the student of its class. All parts are trained one after another, and then
joined. `--part NUMBER` trains one part alone, so that several clusters can share the work.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import dataclasses
from typing import Any

import tyro

from beeline.checkpoint import dump, joined
from beeline.config import StudentConfig, to_dict
from beeline.config.student import average_name, student_folder
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.files.names import IMAGES, pairs_folder
from beeline.labels import Subset, subset
from pipeline.command import run_command
from pipeline.model_folders import publish_model, require_features, require_model
from pipeline.stage import Stage, check_fits, fingerprint, require
from pipeline.storage import Folder
from trainers import loop
from trainers.cost import training_cost
from trainers.launch import check_batch, launch
from trainers.student import check_phases, check_start, check_subsets, student_training
from trainers.tracking import check_trackers


def train_lmm(workspace: str, recipe: tyro.conf.Suppress[str], student: StudentConfig, part: int | None = None) -> None:
    """Train a student of the recipe.

    Args:
        workspace: Local folder or s3://bucket/prefix.
        part: Train only this part of a set of students, from 0 on.
    """
    check_student(student)
    check_part(student, part)
    place = Folder(workspace)
    inputs = _inputs(place, recipe, student)
    stage = Stage(place, student_folder(student.name), inputs.plan)
    if not stage.begin(quiet=part is not None) and part is None:
        return
    if student.subsets == 1:
        _train(stage, recipe, student, inputs, None)
    else:
        for number in range(student.subsets) if part is None else (part,):
            own = subset(number, student.subsets, inputs.init.label_dim)
            part_stage = Stage(place, student.trainings[number], inputs.plan | {"part": number})
            if part_stage.begin():
                _train(part_stage, recipe, student, inputs, own)
                part_stage.finish(images_seen=student.iterations * student.batch_size)
    if part is None:
        if student.subsets > 1:
            _join(place, recipe, student)
        cost = training_cost(place, recipe, student, inputs.init.network_config)
        stage.finish(images_seen=student.subsets * student.iterations * student.batch_size, cost=cost)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Inputs of a training: plans of pairs/ and images/, None if it does not need them, and the model that it starts from.
    `plan` is that of the student, with digests of all inputs."""

    plan: dict[str, Any]
    pairs: dict[str, Any] | None
    images: dict[str, Any] | None
    init: Denoiser


def _inputs(place: Folder, recipe: str, student: StudentConfig) -> Inputs:
    """Find the inputs. Raises BeelineError if one is missing or does not fit. Writes nothing."""
    needs = student.needs()
    plan: dict[str, Any] = {"student": to_dict(student, resources=False), "phases": list(student.running)}
    pairs = images = None
    if needs.pairs:
        pairs = require(place, pairs_folder(student.pairs), recipe)
        plan["pairs"] = fingerprint(pairs)
    init, plan["init_sha256"] = require_model(place, student.start, recipe)
    check_start(student.start, init)
    check_subsets(student, init.label_dim)
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
    return Inputs(plan=plan, pairs=pairs, images=images, init=init)


def _train(stage: Stage, recipe: str, student: StudentConfig, inputs: Inputs, own: Subset | None) -> None:
    """Train the student, or the part of a set for the classes of `own`, in the folder of `stage`."""
    launch(
        student_training,
        {
            "workspace": stage.workspace, "recipe": recipe, "config": student, "pairs": inputs.pairs, "images": inputs.images,
            "subset": own,
        },
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
            "name": student.name if own is None else f"{student.name}/{own.number}",
            "config": stage.plan,
        },
    )  # fmt: skip


def _join(place: Folder, recipe: str, student: StudentConfig) -> None:
    """Publish every model that all parts of a set have (after each phase, each average) as one model, students/<name> last."""
    last, averages = list(student.running)[-1], [average_name(half_life) for half_life in student.half_lives[1:]]
    phases = {name: name for name in student.running if name != last}
    for folder, phase in {**phases, **dict.fromkeys(averages, last), "": last}.items():
        parts = [require_model(place, "/".join([name, *([folder] if folder else [])]), recipe) for name in student.trainings]
        record = student.record(phase) | {"parts_sha256": [digest for _, digest in parts]}
        publish_model(place / student_folder(student.name, folder), dump(joined([model for model, _ in parts]), record))


def check_part(student: StudentConfig, part: int | None) -> None:
    """Raise BeelineError unless the student has `part`."""
    if part is not None and (student.subsets == 1 or not 0 <= part < student.subsets):
        have = f"parts 0 to {student.subsets - 1}" if student.subsets > 1 else "one part; leave --part out"
        raise BeelineError(f"--part is {part}; student {student.name!r} has {have}")


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
