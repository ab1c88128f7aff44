"""A student into students/<name>/: lines matching on the pairs, then with an adversarial term, DDP on Ray Train.

python trainers/train_lmm.py digits                  # the recipe's main student
python trainers/train_lmm.py digits --student l2     # one of its ablations
"""

from __future__ import annotations

import tyro

from beeline.config import LmmConfig, to_dict
from beeline.errors import BeelineError
from beeline.schedule import check_steps
from pipeline.command import run_command
from pipeline.stage import Stage, check_fits, fingerprint, require, require_model, require_probe
from pipeline.storage import Folder
from trainers.launch import check_batch, launch
from trainers.objective import LmmTask, needs_probe


def train_lmm(workspace: str, recipe: tyro.conf.Suppress[str], lmm: LmmConfig) -> None:
    """Train the student on <workspace>/pairs.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    phases = (lmm.reconstruction, lmm.adversarial)
    if lmm.name.strip("/") != lmm.name or not lmm.name or not sum(phase.iterations for phase in phases):
        raise BeelineError(f"student {lmm.name!r} needs a name and at least one phase with iterations above 0")
    if (lmm.line, lmm.rule) in (("ve", "line"), ("lerp", "same_noise")):
        raise BeelineError(
            f"the sampling rule {lmm.rule!r} does not follow the line {lmm.line!r}: its points lie elsewhere. "
            "Use ve with same_noise, or lerp with line"
        )
    for phase in phases:
        if phase.steps is not None:
            try:
                check_steps(phase.steps, lmm.num_steps)
            except ValueError as error:
                raise BeelineError(str(error)) from error
    check_batch(lmm.batch_size, lmm.workers)
    place = Folder(workspace)
    pairs = require(place, "pairs", recipe)
    init, digest = require_model(place, lmm.init, recipe)
    plan = {"lmm": to_dict(lmm, resources=False), "pairs": fingerprint(pairs), "init_sha256": digest}
    images = None
    if any(needs_probe(phase) for phase in phases):
        plan["probe_sha256"] = require_probe(place, "losses", recipe)[1]
    if any(phase.iterations and phase.adversarial_weight for phase in phases):
        images = require(place, "images", recipe)
        check_fits(place, images, init.network_config, lmm.init)
        plan["images"] = fingerprint(images)
    stage = Stage(place, f"students/{lmm.name}", plan)
    if not stage.begin():
        return
    launch(
        LmmTask,
        {"workspace": place, "recipe": recipe, "config": lmm, "pairs": pairs, "images": images},
        stage.folder,
        workers=lmm.workers,
        log_every=lmm.log_every,
        checkpoint_every=lmm.checkpoint_every,
    )
    stage.finish(images_seen=sum(phase.iterations for phase in phases) * lmm.batch_size)


if __name__ == "__main__":
    run_command(train_lmm)
