"""The content of a workspace: finished stages, parts of unfinished ones, and their speeds."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from beeline import counting
from beeline.checkpoint import CONFIG, SOLVER, WEIGHTS
from beeline.config import EvaluateConfig, PairsConfig, PoolConfig, Recipe, WorkersConfig
from beeline.errors import BeelineError, reading
from beeline.files.layout import check_layout
from beeline.files.names import LOG, TEACHER, maker_of_pairs, pairs_folder
from beeline.recipes import RECIPES
from cluster.planning.speeds import ANY_GPU, CPU, IMAGES, Measured, Work, kind_of, kind_of_phase, where
from cluster.steps import makers, models
from evaluation.evaluate import PER_EVALUATION, PER_LOOK
from pipeline.manifest import read_manifest, seconds_per_pair
from pipeline.records import SUCCESS, plan_in, success_in
from pipeline.shards import shard_count, shard_name, shard_rows
from pipeline.sources import open_source
from pipeline.stage import layout_of
from pipeline.storage import Folder
from pipeline.training_log import images_per_second, read_log
from trainers import checkpoints
from trainers.train_teacher import imported_from

PUBLISHED = {"cifar10": 50_000, "cifar10_uncond": 50_000, "cifar10_small": 50_000, "afhqv2": 15_803, "imagenet64": 1_281_167}
REHEARSAL, RECORD = "rehearsal", "rehearsal.json"
SPEED = {"kind": str, "size": float, "precision": str, "compiled": bool, "flops_per_s": float, "on_gpu": bool}
LAYOUT = {  # the part of a rehearsal's record that estimates use (beeline/files/layout.py)
    "machine": {"cpu": str, "threads": 1, "gpu?": str},
    "stages": [{"stage": str, "ok": bool, "seconds_per_unit?": float, "speeds": [SPEED]}],
}
NOWHERE = "/dev/null/workspace"  # a folder that cannot exist


class Workspace:
    """A workspace, opened for reading only. One that does not exist, or cannot be read, counts as empty.

    `uri` is its location; `place` is the folder that is read. `trouble` says why `uri` cannot be read, or is "".
    """

    def __init__(self, uri: str, recipe: Recipe, trouble: str = "") -> None:
        self.uri, self.recipe, self.trouble = Folder(uri), recipe, trouble
        try:
            _ = trouble or self.uri.sizes()
        except BeelineError as error:
            self.trouble = str(error)
        self.place = Folder(NOWHERE) if self.trouble else self.uri

    def plan(self, folder: str) -> dict[str, Any] | None:
        """The plan of a stage, or None."""
        return plan_in(self.place / folder, layout_of(folder))

    @functools.cache  # noqa: B019  (a workspace lives as long as the command)
    def complete(self, folder: str) -> dict[str, Any]:
        """The content of a finished stage's _SUCCESS; {} for other stages."""
        return success_in(self.place / folder) or {}

    @functools.cached_property
    def teacher(self) -> bool:
        """Whether the workspace has a teacher, trained or imported."""
        return self._model("teacher")

    def weights(self, name: str) -> bool:
        """Whether the workspace has a pretrained network."""
        return self._model(f"weights/{name}")

    def _model(self, folder: str) -> bool:
        return {WEIGHTS, CONFIG} <= (self.place / folder).sizes().keys()

    @functools.cached_property
    def imported(self) -> str | None:
        """The file that the teacher was imported from, or None."""
        return imported_from(self.place / "teacher") if self.teacher else None

    @functools.cached_property
    def images(self) -> tuple[int, str]:
        """The number of real images, from images/ or the source (0 if unknown), and a note on its origin."""
        plan, config = self.plan("images"), self.recipe.images
        if plan:
            return int(plan["images"]["count"]), ""
        if config.source == "digits" or os.path.exists(config.source):
            try:
                return len(open_source(config).names), ""
            except BeelineError:
                return 0, ""
        if self.recipe.name in RECIPES and config.source == RECIPES[self.recipe.name](0).images.source:
            return PUBLISHED.get(self.recipe.name, 0), " (as published; the source is not here)"
        return 0, ""

    @functools.cached_property
    def levels(self) -> int:
        """Levels of the teacher's calibrated solver, one evaluation each; 0 without one."""
        folder = self.place / "teacher"
        with reading(f"{folder}/{SOLVER} is damaged", f"make it again: python -m beeline.calibrate {folder}"):
            solver = folder.read_json(SOLVER)
            return 0 if solver is None else len(solver["levels"])

    def pairs(self, config: PairsConfig) -> int:
        """Number of pairs in the existing shards."""
        names = (self.place / pairs_folder(config.model)).sizes().keys()
        shards = range(shard_count(config.count, config.shard_size))
        return sum(len(shard_rows(k, config.shard_size, config.count)) for k in shards if shard_name(k) in names)

    def step(self, folder: str) -> int:
        """The step of a training's newest checkpoint, or 0."""
        return max(checkpoints.steps(self.place / folder), default=0)

    def trials(self, folder: str) -> set[int]:
        """Numbers of a sweep's trials that have ended."""
        found = (re.fullmatch(r"trial-(\d+)\.json", name) for name in (self.place / folder).sizes())
        return {int(match[1]) for match in found if match}

    def measured(self) -> list[Measured]:
        """Speeds in the records of its stages, with the recipe's settings, then speeds in its rehearsal."""
        names = ["pairs", "teacher", *(name for student in self.recipe.students.values() for name in student.trainings)]
        names += map(pairs_folder, makers(self.recipe))
        names += [f"evaluation/{name}" for name in models(self.recipe)]
        return [speed for name in names for speed in self.speeds(name)] + list(self._of_rehearsal())

    def speeds(self, stage: str) -> list[Measured]:
        """Speeds in a stage's own records."""
        kind, _, name = stage.partition("/")
        if kind == "evaluation":
            return list(self._of_evaluation(name))
        if maker := maker_of_pairs(stage):
            return list(self._of_pairs(maker))
        return list(self._of_log(stage) if kind in ("teacher", "students") else ())

    def _of_rehearsal(self) -> Iterator[Measured]:
        """Speeds that a rehearsal measured (cluster/rehearse.py), on the kind of device that it ran on."""
        folder = self.place / REHEARSAL
        with reading(f"{folder}/{RECORD} is not a record of a rehearsal", "rehearse again, or remove it"):
            record: dict[str, Any] = folder.read_json(RECORD) or {"stages": []}
            check_layout(record, LAYOUT if record["stages"] else {})
        for row in record["stages"]:
            if not row["ok"]:
                continue
            source = f"{folder}/{RECORD}, {row['stage']}, {where(record['machine'])}"
            if row["stage"] == "images" and row.get("seconds_per_unit"):
                yield Measured(
                    task=IMAGES, rate=functools.partial(float, 1 / row["seconds_per_unit"]), source=source, device=CPU
                )
            for speed in row["speeds"]:
                task = Work(**{field.name: speed[field.name] for field in dataclasses.fields(Work)})
                device = (kind_of(record["machine"]) or "unknown") if speed["on_gpu"] else CPU
                yield Measured(task=task, rate=functools.partial(float, speed["flops_per_s"]), source=source, device=device)

    def _of_evaluation(self, name: str) -> Iterator[Measured]:
        """Speeds of sampling a model, and of extracting features from its samples."""
        config, done = self.recipe.evaluate, self.complete(f"evaluation/{name}")
        source = f"{self.place}/evaluation/{name}/{SUCCESS}, {_each(config)} for each actor"
        if done.get(PER_EVALUATION):
            yield self._speed("sampling", config, lambda: self._size / done[PER_EVALUATION], source)
        if done.get(PER_LOOK):
            looks = [counting.measuring(each, self.recipe.probe, self.recipe.images)[0] for each in config.features]
            yield self._speed("looking", config, lambda: sum(looks) / done[PER_LOOK], source, precision="fp32")

    def _of_pairs(self, model: str) -> Iterator[Measured]:
        """The speed of sampling a model's pairs."""
        name, config = pairs_folder(model), self.recipe.pairs_of(model)
        rows, plan = read_manifest(self.place / name), self.plan(name)
        seconds = seconds_per_pair(rows)
        if seconds and plan:
            shards = sum(bool(row.get("sampling_seconds")) for row in rows)
            source = f"{self.place}/{name}/manifest.parquet, {1 / seconds:,.2f} pairs per actor-second over {shards} shards, "
            source += f"assuming {_each(config)} for each actor"
            made = {name: plan["pairs"].get(name) for name in ("precision", "compiled")}
            yield self._speed("sampling", config, lambda: plan["evaluations"] * self._size / seconds, source, **made)

    def _of_log(self, folder: str) -> Iterator[Measured]:
        """The speed of each phase of a training."""
        recipe = self.recipe
        config = recipe.students[folder.split("/")[1]] if folder != TEACHER else recipe.teacher
        phases = list(config.running.values())
        for number, images in images_per_second(read_log(self.place / folder)).items():
            if not 0 <= number < len(phases):
                continue
            arguments = recipe.teacher.network, recipe.probe.losses, phases[number].objective
            kind, count = kind_of_phase(*arguments), functools.partial(counting.phase_flops, *arguments)
            ranks = config.workers.count
            source = f"{self.place}/{folder}/{LOG}, {images:,.1f} images/s, assuming {ranks} workers of {_each(config.workers)}"
            flops = functools.partial(_product, count, images / ranks)
            yield self._speed(kind, config.workers, flops, source, precision=config.precision,
                              compiled=config.compiled)  # fmt: skip

    def _speed(
        self, kind: str, processes: PairsConfig | EvaluateConfig | WorkersConfig, flops: Callable[[], float], source: str,
        **task: Any,
    ) -> Measured:  # fmt: skip
        """The speed of processes that each do `flops` per second. Records do not name the kind of GPU."""
        units = processes.gpus or processes.threads
        if not isinstance(processes, WorkersConfig):
            task = {"precision": processes.precision, "compiled": processes.compiled} | task
        device = ANY_GPU if processes.gpus else CPU
        return Measured(
            task=Work(kind=kind, size=self._size, **task), rate=lambda: flops() / units, source=source, device=device
        )

    @property
    def _size(self) -> float:
        return counting.evaluation(self.recipe.teacher.network)


def _product(count: Callable[[], float], factor: float) -> float:
    return count() * factor


def _each(processes: PoolConfig | WorkersConfig) -> str:
    gpus, threads = processes.gpus, processes.threads
    return f"{gpus:g} GPU of the requested kind" if gpus else f"{threads} thread{'s' * (threads != 1)}"
