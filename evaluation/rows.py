"""What is measured of a model: rows (a sampler setting each) x draws x shards of samples, one work item each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from beeline.config import EvaluateConfig
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.frechet import Statistics
from beeline.noise import stream_seed
from beeline.samplers import Solver, batches, evaluations, sample
from pipeline.reader import real_images, to_float
from pipeline.stage import require_model, require_probe
from pipeline.storage import Folder


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of sampling a model: by `steps` (students) or by `solver` and `num_steps` (teachers)."""

    nfe: int
    steps: tuple[int, ...] | None
    solver: Solver | None
    num_steps: int

    @property
    def label(self) -> str:
        """As tables name it: "heun 18 steps" or "steps 0,8"."""
        return f"{self.solver} {self.num_steps}" if self.steps is None else ",".join(map(str, self.steps))


def rows_for(model: Denoiser, config: EvaluateConfig) -> list[Row]:
    """The rows that `config` asks of this model. Raises BeelineError for steps that a student was not trained on."""
    if model.few_step is None:
        return [teacher_row(nfe) for nfe in config.nfe]
    rows = []
    for text in config.steps:
        steps = model.few_step.check(parse_steps(text))
        rows.append(Row(len(steps), steps, None, model.few_step.num_steps))
    return rows


def teacher_row(nfe: int) -> Row:
    """Heun for odd counts of 15 evaluations and more, Euler below: few-step Heun explodes and is no fair baseline."""
    if nfe < 1 or (nfe >= 15 and nfe % 2 == 0):
        raise BeelineError(f"nfe {nfe} cannot be had: Heun takes odd counts from 15 on, Euler any count from 1 to 14")
    solver: Solver = "heun" if nfe >= 15 else "euler"
    num_steps = (nfe + 1) // 2 if solver == "heun" else nfe
    assert evaluations(solver, num_steps) == nfe
    return Row(nfe, None, solver, num_steps)


def parse_steps(text: str) -> tuple[int, ...]:
    """ "0,8" as (0, 8). Raises BeelineError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise BeelineError(f"steps {text!r} are not indices separated by commas, for example 0 or 0,8") from error


def draw(model: Denoiser, row: Row, indices: Sequence[int], labels: np.ndarray, *, seed: int, batch_size: int) -> torch.Tensor:
    """Samples (n, C, H, W) in [-1, 1] on the CPU for noise (seed, indices) and classes `labels` (n,)."""
    device = next(model.parameters()).device
    parts = []
    for batch in batches(len(indices), batch_size):
        classes = torch.from_numpy(labels[batch.start : batch.stop]).to(device) if model.label_dim else None
        parts.append(
            sample(
                model, indices[batch.start : batch.stop], classes, seed=seed,
                steps=row.steps, solver=row.solver or "heun", num_steps=row.num_steps,
            )
        )  # fmt: skip
    return torch.cat(parts).clamp(-1, 1).cpu()


def noise_seed(config: EvaluateConfig, number: int) -> int:
    """The seed of draw `number`: 63 bits of their own, never that of the training pairs."""
    return stream_seed(config.seed, "draw", number)


class Measure:
    """The worker: samples of one work item, through the measuring probe, to statistics in a file."""

    def __init__(self, workspace: Folder, recipe: str, jobs: list[Job], config: EvaluateConfig, images: dict[str, Any]) -> None:
        self.workspace, self.recipe, self.jobs, self.config = workspace, recipe, jobs, config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.probe = require_probe(self.workspace, "measure", recipe)[0].to(self.device)
        self.labels = real_images(self.workspace / "images", images)[1]
        self._model: tuple[str, Denoiser] | None = None

    def work(self, number: int) -> dict[str, Any]:
        """Do job `number`; the row says how many network evaluations it took."""
        job = self.jobs[number]
        labels = self.labels[np.asarray(job.indices) % len(self.labels)]
        seed = noise_seed(self.config, job.draw)
        images = draw(self._load(job.model), job.row, job.indices, labels, seed=seed, batch_size=self.config.batch_size)
        statistics = Statistics.of(features(self.probe, images.to(self.device)))
        (self.workspace / "evaluation" / job.model).write(part_name(job.item), statistics.to_npz())
        return {"evaluations": job.evaluations}

    def _load(self, name: str) -> Denoiser:
        if self._model is None or self._model[0] != name:
            self._model = name, require_model(self.workspace, name, self.recipe)[0].to(self.device)
        return self._model[1]


@torch.inference_mode()
def features(probe: Any, images: torch.Tensor, batch_size: int = 256) -> np.ndarray:
    """Probe features (n, D) of images (n, C, H, W) in [-1, 1], in batches that do not depend on who asks."""
    return torch.cat([probe.features(part) for part in images.split(batch_size)]).cpu().numpy()


def part_name(item: int) -> str:
    """File of a work item's statistics."""
    return f"part-{item:05d}.npz"


def shards_per_draw(config: EvaluateConfig, count: int) -> int:
    """Work items of one draw."""
    return -(-count // config.shard_size)


@dataclasses.dataclass(frozen=True)
class Job:
    """One work item of one model: item numbers run over rows, then draws, then shards."""

    model: str
    item: int
    row: Row
    draw: int
    indices: range

    @property
    def evaluations(self) -> int:
        """Network evaluations of the item."""
        return self.row.nfe * len(self.indices)


def jobs_of(model: str, rows: Sequence[Row], config: EvaluateConfig, count: int) -> list[Job]:
    """All work items of a model, in order."""
    shards = shards_per_draw(config, count)
    return [
        Job(
            model,
            (r * config.draws + number) * shards + shard,
            row,
            number,
            range(shard * config.shard_size, min((shard + 1) * config.shard_size, count)),
        )
        for r, row in enumerate(rows)
        for number in range(config.draws)
        for shard in range(shards)
    ]


def reference(place: Folder, probe: Any, images: dict[str, Any]) -> Statistics:
    """Statistics of all real images in the probe's features."""
    return Statistics.of(features(probe, torch.from_numpy(to_float(real_images(place / "images", images)[0]))))
