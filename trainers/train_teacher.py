"""The EDM teacher into teacher/: denoising score matching on the real images, DDP on Ray Train.

python trainers/train_teacher.py digits --teacher.workers.count 2
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import copy
from typing import Any

import numpy as np
import torch
import tyro

from beeline.augmentation import LABELS, augment, mirrored
from beeline.checkpoint import CONFIG, build, dump
from beeline.config import TeacherConfig, to_dict
from beeline.errors import BeelineError, reading
from beeline.files.layout import check_layout
from beeline.files.names import IMAGES, TEACHER
from beeline.networks.buildable import check_network
from beeline.noise import stream_seed
from beeline.objectives.edm import edm_loss
from beeline.objectives.ema import ema_update
from beeline.objectives.learner import Learner
from beeline.pixels import to_float
from pipeline.command import run_command
from pipeline.stage import Stage, check_fits, fingerprint, publish_model, require
from pipeline.storage import Folder
from trainers import loop
from trainers.launch import check_batch, launch


class TeacherTask:
    """EDM training (Karras et al. 2022, section 5), with an EMA of the weights as the result."""

    name, phase_ends = "teacher", ()

    def __init__(self, *, session: loop.Session, workspace: Folder, config: TeacherConfig, images: dict[str, Any]) -> None:
        self.session, self.config, self.workspace = session, config, workspace
        self.iterations, self.images_per_step = config.iterations, config.batch_size
        torch.manual_seed(stream_seed(config.seed, "teacher"))
        self.model = build(config.network).to(session.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.learner = Learner(self.model, config.optimizer, parallel=session.parallel, precision=config.precision)
        self.reader = session.read(self.workspace / IMAGES, images["images"], config.seed)

    def step(self, step: int) -> loop.Figures:
        generator = self.session.generator(self.config.seed, step)
        start, size = self.session.share(self.config.batch_size, step)
        batch = self.reader.batch(start, size)
        total = torch.zeros((), device=self.session.device)
        parts = np.array_split(np.arange(size), self.config.accumulate)
        for part in parts:
            rows = {name: column[part] for name, column in batch.items()}
            with self.learner.accumulating(last=part is parts[-1]):
                loss = self._loss(rows, generator) * (len(part) * self.session.world_size / self.config.batch_size)
                loss.backward()
            total += loss.detach()
        figures = self.learner.update(step, self.iterations)
        ema_update(self.ema, self.model, self.config.ema_half_life, step + 1, self.config.ema_ramp)
        return {"loss": total, **figures}

    def _loss(self, batch: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
        device = self.session.device
        images = torch.from_numpy(to_float(batch["image"])).to(device)
        labels = torch.from_numpy(batch["label"]).to(device) if self.model.label_dim else None
        augment_labels = None
        if self.config.augment:
            images, augment_labels = augment(images, self.config.augment, generator)
        elif self.config.flip:
            images = mirrored(images, generator)
        return edm_loss(self.learner, images, labels, generator, augment_labels)

    def validate(self, step: int) -> dict[str, float]:
        return {}

    def state_dict(self) -> loop.State:
        return {"ema": self.ema.state_dict(), "learner": self.learner.state_dict()}

    def load_state_dict(self, state: loop.State) -> None:
        self.ema.load_state_dict(state["ema"])
        self.learner.load_state_dict(state["learner"])

    def publish(self) -> None:
        publish_model(self.workspace / TEACHER, dump(self.ema, {"trained": to_dict(self.config, resources=False)}))


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
        print(f"teacher: imported from {imported}; it is used as it is", flush=True)
        return
    stage = Stage(place, TEACHER, {"teacher": to_dict(teacher, resources=False), "images": fingerprint(images)})
    if not stage.begin():
        return
    launch(
        TeacherTask,
        {"workspace": place, "config": teacher, "images": images},
        stage.folder,
        name=stage.name,
        workers=teacher.workers,
        cadence=loop.Cadence(log_every=teacher.log_every, checkpoint_every=teacher.checkpoint_every, keep=teacher.keep),
    )
    stage.finish(images_seen=teacher.iterations * teacher.batch_size)


def check_teacher(teacher: TeacherConfig) -> None:
    """Raise BeelineError for settings that do not go together, whatever the workspace holds."""
    check_batch(teacher.batch_size, teacher.workers, teacher.accumulate)
    if teacher.augment and teacher.network.augment_dim != LABELS:
        raise BeelineError(
            f"teacher.augment is {teacher.augment}, but the network takes {teacher.network.augment_dim} augmentation "
            f"labels; set teacher.network.augment_dim to {LABELS}"
        )
    check_network("teacher.network", teacher.network)


def imported_from(folder: Folder) -> str | None:
    """The file that the model in `folder` was imported from, or None where it was trained here or there is none."""
    with reading(f"{folder}/{CONFIG} does not say where the teacher is from", "make or copy the model again"):
        config = folder.read_json(CONFIG) or {}
        check_layout(config, {"about?": {"imported?": {"file?": str}}})
        return ((config.get("about") or {}).get("imported") or {}).get("file")


if __name__ == "__main__":
    run_command(train_teacher)
