"""Train the EDM teacher into teacher/: denoising score matching on the real images, DDP on Ray Train.

python trainers/train_teacher.py digits --teacher.workers.count 2
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

from typing import Any

import torch
import tyro

from beeline.augmentation import LABELS
from beeline.checkpoint import CONFIG, build
from beeline.config import TeacherConfig, to_dict
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError, reading
from beeline.files.layout import check_layout
from beeline.files.names import IMAGES, TEACHER
from beeline.networks.buildable import check_network
from beeline.noise import stream_seed
from pipeline.command import run_command
from pipeline.stage import Stage, check_fits, fingerprint, require
from pipeline.storage import Folder
from trainers import loop
from trainers.launch import check_batch, launch
from trainers.training import Training


def train_teacher(workspace: str, recipe: tyro.conf.Suppress[str], teacher: TeacherConfig) -> None:
    """Train the teacher on <workspace>/images.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    check_teacher(teacher)
    place = Folder(workspace)
    images = require(place, IMAGES, recipe)
    check_fits(place, images, teacher.network, "teacher.network")
    if imported := imported_from(place / TEACHER):
        print(f"teacher: imported from {imported}; used without training", flush=True)
        return
    stage = Stage(place, TEACHER, {"teacher": to_dict(teacher, resources=False), "images": fingerprint(images)})
    if not stage.begin():
        return
    launch(
        teacher_training,
        {"workspace": place, "recipe": recipe, "config": teacher, "images": images},
        stage.folder,
        name=stage.name,
        workers=teacher.workers,
        cadence=loop.Cadence(log_every=teacher.log_every, checkpoint_every=teacher.checkpoint_every, keep=teacher.keep),
    )
    stage.finish(images_seen=teacher.iterations * teacher.batch_size)


def teacher_training(
    *, session: loop.Session, workspace: Folder, recipe: str, config: TeacherConfig, images: dict[str, Any]
) -> Training:
    """Build the training of a teacher. Its initial random weights depend on `config.seed` alone."""

    def start() -> Denoiser:
        torch.manual_seed(stream_seed(config.seed, "teacher"))
        return build(config.network)

    return Training(session=session, workspace=workspace, recipe=recipe, config=config, start=start, images=images)


def check_teacher(teacher: TeacherConfig) -> None:
    """Raise BeelineError for settings that contradict each other. Does not read the workspace."""
    check_batch(teacher.batch_size, teacher.workers, teacher.accumulate)
    if teacher.augment and teacher.network.augment_dim != LABELS:
        raise BeelineError(
            f"teacher.augment is {teacher.augment}, but the network takes {teacher.network.augment_dim} augmentation "
            f"labels; set teacher.network.augment_dim to {LABELS}"
        )
    check_network("teacher.network", teacher.network)


def imported_from(folder: Folder) -> str | None:
    """The file that the model in `folder` was imported from. None if it was trained here or does not exist."""
    with reading(f"{folder}/{CONFIG} does not say where the teacher comes from", "make or copy the model again"):
        config = folder.read_json(CONFIG) or {}
        check_layout(config, {"about?": {"imported?": {"file?": str}}})
        return ((config.get("about") or {}).get("imported") or {}).get("file")


if __name__ == "__main__":
    run_command(train_teacher)
