"""A student into students/<name>/: lines matching on the pairs, then with an adversarial term, DDP on Ray Train. Or another
objective on the same pairs: `--student kd`, `--student rf`.

python trainers/train_lmm.py digits                  # the recipe's main student
python trainers/train_lmm.py digits --student l2     # one of its ablations
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

from typing import Any

import tyro

from beeline import objectives
from beeline.config import LmmConfig, to_dict
from beeline.errors import BeelineError
from pipeline.command import run_command
from pipeline.stage import Stage, check_fits, fingerprint, require, require_features, require_model
from pipeline.storage import Folder
from trainers import loop
from trainers.launch import check_batch, launch
from trainers.student import StudentTask, all_needs, running
from trainers.tracking import check_trackers

SMALLEST_VGG16 = 16  # pixels


def train_lmm(workspace: str, recipe: tyro.conf.Suppress[str], lmm: LmmConfig) -> None:
    """Train the student on <workspace>/pairs.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    check_student(lmm)
    place, needs = Folder(workspace), all_needs(lmm)
    plan: dict[str, Any] = {"lmm": to_dict(lmm, resources=False)}
    pairs = images = None
    if needs.pairs:
        pairs = require(place, "pairs", recipe)
        plan["pairs"] = fingerprint(pairs)
    init, plan["init_sha256"] = require_model(place, lmm.init, recipe)
    check_sides(lmm, init.img_resolution)
    if needs.images or lmm.validate_every:
        images = require(place, "images", recipe)
        check_fits(place, images, init.network_config, lmm.init)
    if needs.images:
        plan["images"] = fingerprint(images)
    if needs.teacher:
        plan["teacher_sha256"] = require_model(place, "teacher", recipe)[1]
    plan["features_sha256"] = {name: require_features(place, name, recipe)[1] for name in needs.features}
    stage = Stage(place, f"students/{lmm.name}", plan)
    if not stage.begin():
        return
    launch(
        StudentTask,
        {"workspace": place, "recipe": recipe, "config": lmm, "pairs": pairs, "images": images},
        stage.folder,
        name=stage.name,
        workers=lmm.workers,
        cadence=loop.Cadence(
            log_every=lmm.log_every, checkpoint_every=lmm.checkpoint_every, validate_every=lmm.validate_every, keep=lmm.keep
        ),
        tracking={
            "names": lmm.trackers,
            "run_id": fingerprint({"plan": stage.plan, "folder": str(stage.folder)}),
            "name": lmm.name,
            "config": stage.plan,
        },
    )
    stage.finish(images_seen=sum(phase.iterations for phase in running(lmm)) * lmm.batch_size)


def check_student(lmm: LmmConfig) -> None:
    """Raise BeelineError for settings that do not go together, whatever the workspace holds."""
    if not running(lmm):
        raise BeelineError(f"student {lmm.name!r} needs at least one phase with iterations above 0")
    check_batch(lmm.batch_size, lmm.workers, lmm.accumulate)
    check_trackers(lmm.trackers)
    all_needs(lmm)


def check_sides(lmm: LmmConfig, side: int) -> None:
    """Raise BeelineError for phases whose distance cannot look at images of `side` pixels."""
    for phase in running(lmm):
        small = (phase.resize or side) < SMALLEST_VGG16
        if small and any(name.startswith("vgg16") for name in objectives.load(lmm.objective).needs(lmm, phase).features):
            raise BeelineError(
                f"the distance {phase.distance!r} is asked for at {side} pixels; VGG16 halves images four times: "
                f"resize to {SMALLEST_VGG16} or more (--lmm.reconstruction.resize, --lmm.adversarial.resize)"
            )


if __name__ == "__main__":
    run_command(train_lmm)
