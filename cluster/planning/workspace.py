"""What a workspace tells a plan: what is there already, and how fast it was made."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import statistics
from collections.abc import Callable
from typing import Any

from beeline.checkpoint import CONFIG, SOLVER, WEIGHTS
from beeline.config import PairsConfig, Recipe
from beeline.errors import BeelineError, reading
from beeline.files.layout import check_layout
from beeline.recipes import RECIPES
from beeline.sampling.solvers import evaluations
from cluster.planning import counting
from cluster.planning.speeds import CPU, Measured, Task, kind_of, where
from cluster.steps import models
from evaluation.evaluate import PER_EVALUATION, PER_LOOK
from pipeline.manifest import read_manifest
from pipeline.records import LAYOUTS, SUCCESS, plan_in, success_in
from pipeline.shards import shard_count, shard_name, shard_rows
from pipeline.sources import open_source
from pipeline.storage import Folder
from trainers import checkpoints
from trainers.log import LOG, read_log
from trainers.train_teacher import imported_from

PUBLISHED = {"cifar10": 50_000, "cifar10_uncond": 50_000, "cifar10_small": 50_000, "afhqv2": 15_803, "imagenet64": 1_281_167}
REHEARSAL, RECORD = "rehearsal", "rehearsal.json"
SPEED = {"kind": str, "size": float, "precision": str, "compiled": bool, "flops_per_s": float, "on_gpu": bool}
LAYOUT = {  # of a rehearsal's record (beeline/files/layout.py), as far as plans use it
    "machine": {"cpu": str, "threads": 1, "gpu?": str},
    "stages": [{"stage": str, "ok": bool, "seconds_per_unit?": float, "speeds": [SPEED]}],
}
CALIBRATED = 12  # evaluations of a calibrated solver that is yet to be found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """A stage that works in a rehearsal: seconds for each unit, if known, speeds, and the kind of device that had them."""

    each: float | None
    speeds: tuple[dict[str, Any], ...]
    device: str
    source: str


class Workspace:
    """A workspace as it is found. Nothing is written; a workspace that does not exist, or cannot be read, is empty."""

    def __init__(self, uri: str, recipe: Recipe, trouble: str = "") -> None:
        self.place, self.recipe, self.trouble = Folder(uri), recipe, trouble
        """`trouble`: why it cannot be read; "" where it can."""
        try:
            _ = trouble or self.place.sizes()
        except BeelineError as error:
            self.trouble = str(error)

    def plan(self, folder: str) -> dict[str, Any] | None:
        """The plan of a stage, or None."""
        return None if self.trouble else plan_in(self.place / folder, LAYOUTS.get(folder, {}))

    def success(self, folder: str) -> dict[str, Any]:
        """What a finished stage says of itself; {} of others."""
        return (None if self.trouble else success_in(self.place / folder)) or {}

    @functools.cache  # noqa: B019  (a workspace lives as long as the command)
    def complete(self, folder: str) -> bool:
        """Whether the stage says that it is finished."""
        return bool(self.success(folder))

    @functools.cached_property
    def teacher(self) -> bool:
        """Whether there is a teacher, trained or imported."""
        return not self.trouble and {WEIGHTS, CONFIG} <= (self.place / "teacher").sizes().keys()

    @functools.cached_property
    def imported(self) -> str | None:
        """The file that the teacher was imported from."""
        return imported_from(self.place / "teacher") if self.teacher else None

    @functools.cached_property
    def network(self) -> dict[str, Any]:
        """What the teacher's config.json says of its network."""
        folder = self.place / "teacher"
        with reading(f"{folder}/{CONFIG} does not describe a network", "make or copy the model again"):
            config = folder.read_json(CONFIG)
            check_layout(config, {"network": {}})
            return config["network"]

    @functools.cached_property
    def images(self) -> int:
        """Real images: of images/, or of the source; 0 where neither says."""
        return self._images[0]

    @functools.cached_property
    def images_from(self) -> str:
        """How that number is known, as a note."""
        return self._images[1]

    @functools.cached_property
    def _images(self) -> tuple[int, str]:
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
    def calibrated(self) -> bool:
        """Whether the teacher has a calibrated solver."""
        return self.levels_found is not None

    @property
    def levels(self) -> int:
        """Evaluations of the calibrated solver, found or assumed."""
        return self.levels_found or CALIBRATED

    @functools.cached_property
    def levels_found(self) -> int | None:
        """Evaluations of the calibrated solver, if there is one."""
        folder = self.place / "teacher"
        with reading(f"{folder}/{SOLVER} is damaged", f"make it again: python -m beeline.calibrate {folder}"):
            found = None if self.trouble else folder.read_json(SOLVER)
            return None if found is None else len(found["levels"])

    def weights(self, name: str) -> bool:
        """Whether a pretrained network is there."""
        return not self.trouble and {WEIGHTS, CONFIG} <= (self.place / "weights" / name).sizes().keys()

    def pairs(self, config: PairsConfig) -> int:
        """Pairs that are there."""
        if self.trouble:
            return 0
        names = (self.place / "pairs").sizes().keys()
        shards = range(shard_count(config.count, config.shard_size))
        return sum(len(shard_rows(k, config.shard_size, config.count)) for k in shards if shard_name(k) in names)

    def step(self, folder: str) -> int:
        """The step of the newest checkpoint of a training that is not finished."""
        if self.trouble or self.complete(folder):
            return 0
        return max(checkpoints.steps(self.place / folder), default=0)

    def trials(self, folder: str) -> set[int]:
        """Numbers of a sweep's trials that have ended."""
        names = [] if self.trouble else (self.place / folder).sizes()
        return {int(found[1]) for name in names if (found := re.fullmatch(r"trial-(\d+)\.json", name))}

    def measured(self) -> list[Measured]:
        """The throughputs that its pairs, logs and measurements hold, of the recipe's settings, then those of its rehearsal."""
        if self.trouble:
            return []
        names = ["pairs", "teacher", *(f"students/{lmm.name}" for lmm in self.recipe.students.values())]
        names += [f"evaluation/{name}" for name in models(self.recipe)]
        return [speed for name in names for speed in self.speeds(name)] + self._of_rehearsal()

    def speeds(self, stage: str) -> list[Measured]:
        """The throughputs that a stage's own records hold."""
        kind, _, name = stage.partition("/")
        if kind == "pairs":
            return self._of_pairs()
        if kind == "evaluation":
            return self._of_evaluation(name)
        return self._of_log(stage) if kind in ("teacher", "students") else []

    def _of_rehearsal(self) -> list[Measured]:
        """What a rehearsal measured (cluster/rehearse.py), on the kind of device that it ran on."""
        found = []
        for row in self.rehearsed.values():
            for speed in row.speeds:
                task = Task(**{field.name: speed[field.name] for field in dataclasses.fields(Task)})
                rate, on_gpu = functools.partial(float, speed["flops_per_s"]), bool(speed["on_gpu"])
                device = row.device if on_gpu else CPU
                found.append(Measured(task=task, rate=rate, source=row.source, ours=True, on_gpu=on_gpu, device=device))
        return found

    @functools.cached_property
    def rehearsed(self) -> dict[str, Rehearsed]:
        """The stages that worked in the workspace's rehearsal, by name."""
        folder = self.place / REHEARSAL
        with reading(f"{folder}/{RECORD} is not as a rehearsal writes it", "rehearse again, or remove it"):
            record: dict[str, Any] = (None if self.trouble else folder.read_json(RECORD)) or {"stages": []}
            check_layout(record, LAYOUT if record["stages"] else {})
        return {
            row["stage"]: Rehearsed(
                each=row["seconds_per_unit"],
                speeds=tuple(row["speeds"]),
                device=kind_of(record["machine"]) or "unknown",
                source=f"{folder}/{RECORD}, {row['stage']}, {where(record['machine'])}",
            )
            for row in record["stages"]
            if row["ok"]
        }

    def _of_evaluation(self, name: str) -> list[Measured]:
        """How fast a model was sampled to be measured, and its samples were looked at."""
        config, images = self.recipe.evaluate, self.recipe.images
        done = self.success(f"evaluation/{name}")
        size, units = counting.evaluation(self.recipe.teacher.network), config.gpus or config.threads
        looking = sum(counting.look_at(network, self.recipe.probe, images)[0] for network in config.features)
        each = {"sampling": (size, done.get(PER_EVALUATION)), "looking": (looking, done.get(PER_LOOK))}
        found = []
        for kind, (flops, seconds) in each.items():
            if not seconds:
                continue
            precision = config.precision if kind == "sampling" else "fp32"
            task = Task(kind=kind, size=size, precision=precision, compiled=config.compiled)
            source = f"{self.place}/evaluation/{name}/{SUCCESS}, {_each(config.gpus, config.threads)} for each actor"
            rate = functools.partial(float, flops / seconds / units)
            found.append(Measured(task=task, rate=rate, source=source, ours=True, on_gpu=config.gpus > 0))
        return found

    def _of_pairs(self) -> list[Measured]:
        config = self.recipe.pairs
        rows = [row for row in read_manifest(self.place / "pairs") if row.get("sampling_seconds")]
        plan = self.plan("pairs")
        if not rows or not plan:
            return []
        speed = statistics.median(
            (row["pairs"] or 0) / row["sampling_seconds"] for row in rows
        )  # an actor's first shard may compile
        made, size = plan["pairs"], counting.evaluation(self.recipe.teacher.network)
        each = plan.get("evaluations", evaluations("heun", config.num_steps))
        units = config.gpus or config.threads
        task = Task(kind="sampling", size=size, precision=made.get("precision"), compiled=made.get("compiled"))
        source = (
            f"{self.place}/pairs/manifest.parquet, {speed:,.2f} pairs per actor-second over {len(rows)} shards, "
            f"taking actors to have had what the settings say: {_each(config.gpus, config.threads)}"
        )
        rate = speed * each * size / units
        return [Measured(task=task, rate=lambda: rate, source=source, ours=True, on_gpu=config.gpus > 0)]

    def _of_log(self, folder: str) -> list[Measured]:
        """Of a training, for each of its phases: the median of images/s, the first line, of a cold start, left out."""
        recipe, teaching = self.recipe, folder == "teacher"
        students = {f"students/{student.name}": student for student in recipe.students.values()}
        config = recipe.teacher if teaching else students[folder]
        rows, workers = read_log(self.place / folder), config.workers
        size, made = counting.evaluation(recipe.teacher.network), []
        for number in range(1 if teaching else len(students[folder].running)):
            speeds = [row.get("images_per_s") for row in rows if row.get("phase", 0) == number]
            rates = [speed for speed in speeds if isinstance(speed, int | float) and speed > 0]
            rates = rates[1:] or rates
            if not rates:
                continue
            images, units = statistics.median(rates), workers.count * (workers.gpus or workers.threads)
            if teaching:
                kind, count = "teacher", functools.partial(counting.of_teacher, recipe.teacher)
            else:
                phase = list(students[folder].running.values())[number]
                found = counting.of_phase(recipe.teacher.network, recipe.probe.losses, phase.objective)
                kind, count = "adversarial" if found.critic_bytes else "reconstruction", found.count
            compiled = getattr(config, "compiled", False)
            task = Task(kind=kind, size=size, precision=config.precision, compiled=compiled)
            source = (
                f"{self.place}/{folder}/{LOG}, {images:,.1f} images/s, taking the training to have had the "
                f"settings' {workers.count} workers of {_each(workers.gpus, workers.threads)}"
            )

            def rate(images: float = images, units: float = units, count: Callable[[], float] = count) -> float:
                return images * count() / units

            made.append(Measured(task=task, rate=rate, source=source, ours=True, on_gpu=workers.gpus > 0))
        return made


def _each(gpus: float, threads: int) -> str:
    return f"{gpus:g} GPU of the kind asked for" if gpus else f"{threads} thread{'s' * (threads != 1)}"
