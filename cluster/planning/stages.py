"""The cost of each stage of a recipe, independent of machines: operations, processes, bytes.

The stages' own code lists their work: plans, rows, work items and published models. This module multiplies it by the FLOPs and
bytes of the recipe's networks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from beeline import counting
from beeline.config import (
    EvaluateConfig,
    PairsConfig,
    PhaseConfig,
    PoolConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
)
from beeline.files.names import maker_of_pairs, pairs_folder
from beeline.footprint import footprint
from beeline.metrics.measures import measures_flops
from beeline.sampling.few_step import FewStep
from cluster.planning.nodes import Need
from cluster.planning.speeds import IMAGES, Work, kind_of_phase
from cluster.planning.workspace import Workspace
from cluster.steps import made_by, models, needed_weights, steps
from evaluation.bench import Setup
from evaluation.reference import KEPT, reference_bytes
from evaluation.workload import workload
from pipeline.gen_pairs import plan_of
from pipeline.shards import shard_count, store_bytes
from trainers.loop import Cadence
from trainers.sizes import checkpoints_kept, published
from trainers.sweep_lmm import judging
from trainers.train_probe import MOST_IMAGES, PROBES
from trainers.trials import folder_name, rung_of, trials_of
from trainers.validation import sampling_of

TEXT, ROW, REPORT = 50_000, 200_000, 5_000_000  # bytes of a model's records, a row with its sheets, and the page
CALIBRATED = 12  # evaluations assumed for a solver that is not calibrated yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Work of one kind in a stage. `count` returns its operations; it may take seconds."""

    task: Work
    need: Need
    count: Callable[[], float]
    parts: int = 0
    """Number of equal parts, which processes do one after another; 0 if the work divides freely."""
    on_core: bool = False
    """Whether a core of each process does the work. The process's GPU is reserved meanwhile, but idle."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageCost:
    """The work left in a stage. `stored` bytes stay. `passing` bytes exist only while it runs, or `passing_each` for each
    process of its first job, whichever is more."""

    name: str
    work: str
    amount: int = 0
    jobs: tuple[Job, ...] = ()
    stored: float = 0.0
    passing: float = 0.0
    passing_each: float = 0.0
    side_by_side: bool = False
    """Whether it runs at the same time as neighbouring stages with this flag, if the machines have room."""
    memory: float = 0.0
    """Bytes that a process of a training holds, without activations; 0 for other stages."""
    starts: int = 1
    """Number of processes that start one after another. Each takes the start time of a stage."""
    note: str = ""

    def peak(self, processes: int) -> float:
        """Bytes that exist only while it runs with this number of processes."""
        return max(self.passing, self.passing_each * processes)


def stages(recipe: Recipe, there: Workspace, teacher: str) -> list[StageCost]:
    """The work left in the steps of run_pipeline.py, in their order, after the weights to fetch. `teacher` is "train" or
    "import". Raises BeelineError for settings that a stage refuses."""
    left, found = _Left(recipe, there), []
    if weights := [name for name in needed_weights(recipe) if not there.weights(name)]:
        stored, work = sum(map(counting.network_bytes, weights)), f"{len(weights)} pretrained networks, fetched once"
        found.append(StageCost(name="weights", work=work, amount=len(weights), stored=stored, starts=0))
    for step in steps(str(there.place), recipe):
        kind, _, name = step.name.partition("/")
        maker = maker_of_pairs(step.name)
        if there.complete(step.name) and not (kind == "sweeps" and left.trials):
            stage = _complete(step.name)
        elif maker is not None:
            stage = left.pairs(maker)
        elif kind == "students":
            student = recipe.students[name.partition("/")[0]]
            trained = step.name in student.trainings
            stage = left.training(step.name, student, models=published(student)) if trained else left.joined(step.name, student)
        else:
            stage = getattr(left, "imported" if kind == "teacher" and teacher == "import" else kind)()
        found.append(replace(stage, side_by_side=step.side_by_side))
    return found


def _complete(name: str) -> StageCost:
    return StageCost(name=name, work="complete", starts=0)


class _Left:
    """The stages of a recipe, without the work already in the workspace. Each stage has a method."""

    def __init__(self, recipe: Recipe, there: Workspace) -> None:
        self.recipe, self.there, self.network = recipe, there, recipe.teacher.network
        self.real, self.origin = there.images
        self.size, self.weights = counting.evaluation(self.network), counting.network_bytes(self.network)

    def images(self) -> StageCost:
        config, shards = self.recipe.images, shard_count(self.real, self.recipe.images.shard_size)
        shape = (config.channels, config.resolution, config.resolution)
        return StageCost(
            name="images", work=f"{self.real:,} images{self.origin}", amount=self.real,
            jobs=(Job(task=IMAGES, need=_pool("images", "images", config), count=lambda: self.real, parts=shards),),
            stored=store_bytes("image", shape, "uint8", self.real, config.shard_size, {"images": {}}),
            note="" if self.real else f"the number of images in {config.source} is unknown: costs that need it are left out",
        )  # fmt: skip

    def probe(self) -> StageCost:
        config, images = self.recipe.probe, self.recipe.images
        networks = [getattr(config, which) for which in PROBES]
        need = Need(stage="probe", option="--probe.gpus", least=1, most=len(PROBES), gpus=config.gpus, cpus=1)
        seen = config.iterations * config.batch_size

        def count() -> float:
            return seen * sum(counting.probe_flops(network, images) for network in networks)

        of = f"{min(self.real or MOST_IMAGES, MOST_IMAGES):,} images"
        return StageCost(
            name="probe", work=f"{len(PROBES)} x {config.iterations:,} iterations of {config.batch_size} of {of}",
            amount=len(PROBES) * config.iterations,
            jobs=(Job(task=self._task("reconstruction", "fp32"), need=need, count=count, parts=len(PROBES)),),
            stored=sum(counting.network_bytes(network, images.channels) + TEXT for network in networks),
        )  # fmt: skip

    def imported(self) -> StageCost:
        return StageCost(name="teacher", work="imported", stored=0 if self.there.teacher else self.weights, starts=0)

    def teacher(self) -> StageCost:
        return self.training("teacher", self.recipe.teacher, models=1)

    def training(self, folder: str, config: TeacherConfig | StudentConfig, *, models: int) -> StageCost:
        """A training that publishes `models` models. A checkpoint holds the weights, Adam's two moments, the averages, and the
        state of critic and objective. The oldest is removed only after a new one is complete."""
        done, jobs, kept = self.there.step(folder), [], 0
        network = replace(self.network, **config.needs().inputs)
        weights = counting.network_bytes(network)
        iterations = sum(phase.iterations for phase in config.running.values())
        work = f"{iterations - done:,} iterations of {config.batch_size:,}"
        left, need = iterations - done, _ranks(folder, config)
        for phase in config.running.values():
            own = max(0, phase.iterations - done)
            done = max(0, done - phase.iterations)
            if own:
                jobs.append(self._phase(config, phase, own, need, config.workers.count))
                kept = max(kept, sum(counting.phase_bytes(self.network, self.recipe.probe.losses, phase.objective)))
        checkpoint = counting.student_bytes(network) + len(config.half_lives) * weights + kept
        stay, most = (checkpoints_kept(iterations, config.checkpoint_every, config.keep + k) for k in (0, 1))
        return StageCost(
            name=folder, work=work, amount=left, jobs=tuple(jobs),
            stored=models * weights + stay * checkpoint + TEXT, passing=(most - stay) * checkpoint,
            memory=float(footprint(self.network, self.recipe.probe.losses, config).total),
        )  # fmt: skip

    def joined(self, folder: str, student: StudentConfig) -> StageCost:
        """A set of students whose parts are trained."""
        stored = student.subsets * (published(student) - bool(student.validate_every)) * self.weights + TEXT
        return StageCost(name=folder, work=f"{student.subsets} parts joined", amount=student.subsets, stored=stored)

    def _phase(
        self, config: TeacherConfig | StudentConfig, phase: PhaseConfig, iterations: int, need: Need, ranks: int = 1
    ) -> Job:
        arguments = self.network, self.recipe.probe.losses, phase.objective
        validated = 0.0
        if isinstance(config, StudentConfig) and config.validate_every:  # rank 0 samples while the others wait
            samples = min(config.validate_count, self.real or config.validate_count)
            flops = samples * sampling_of(phase.objective.sampling()).nfe * self.size
            validated = ranks * iterations / config.validate_every * flops
        task = self._task(kind_of_phase(*arguments), config.precision, config.compiled)
        images = config.batch_size * iterations
        return Job(task=task, need=need, count=lambda: counting.phase_flops(*arguments) * images + validated)

    def _plan(self, config: PairsConfig) -> dict[str, Any]:
        """The plan that gen_pairs.py will write, with a placeholder for the model's digest."""
        levels = [0.0] * (self.there.levels or CALIBRATED) if config.solver == "calibrated" else None
        return plan_of(config, counting.denoiser(self.network), "0" * 64, levels)

    def pairs(self, model: str) -> StageCost:
        config, name = self.recipe.pairs_of(model), pairs_folder(model)
        plan = self._plan(config)
        each, left = plan["evaluations"], config.count - self.there.pairs(config)
        job = Job(
            task=self._task("sampling", config.precision, config.compiled), need=_pool(name, "pairs", config),
            count=lambda: left * each * self.size, parts=shard_count(left, config.shard_size),
        )  # fmt: skip
        assumed = config.solver == "calibrated" and not self.there.levels
        return StageCost(
            name=name, work=f"{left:,} pairs of {each} evaluations", amount=left, jobs=(job,),
            stored=store_bytes("x1", plan["shape"], config.dtype, config.count, config.shard_size, plan),
            note=f"{each} evaluations are assumed: the solver is not calibrated yet" if assumed else "",
        )  # fmt: skip

    @functools.cached_property
    def trials(self) -> dict[int, StudentConfig]:
        """Trials of the sweep that have not ended."""
        ended = self.there.trials(f"sweeps/{self.recipe.sweep.name}")
        return {k: trial for k, trial in trials_of(self.recipe.sweep, self.recipe.main).items() if k not in ended}

    def sweeps(self) -> StageCost:
        sweep, name, left = self.recipe.sweep, f"sweeps/{self.recipe.sweep.name}", self.trials
        side = min(sweep.max_concurrent or len(left), len(left))
        need = Need(
            stage=name, option="--sweep.gpus", least=1, most=side, gpus=sweep.gpus, cpus=sweep.threads, threads=sweep.threads
        )
        phases = [phase for trial in left.values() for phase in trial.running.values()]
        jobs = [self._phase(trial, next(iter(trial.running.values())), sweep.iterations, need) for trial in left.values()]
        # One job for all trials; it has a discriminator if any trial has one.
        merged = [replace(job, parts=len(left), count=lambda: sum(job.count() for job in jobs))
                  for job in sorted(jobs, key=lambda job: job.task.kind)[:1]]  # fmt: skip
        critics = [counting.phase_bytes(self.network, self.recipe.probe.losses, phase.objective)[0] for phase in phases]
        checkpoint = 4 * self.weights + max(critics, default=0)
        judged = left if self.there.complete(name) else trials_of(sweep, self.recipe.main)
        found = {}
        for k, trial in judged.items():
            few_step = next(iter(trial.running.values())).objective.sampling()
            found[f"{name}/{folder_name(k)}"] = few_step, (sampling_of(few_step).label,)
        measured = self._measuring(name, judging(sweep, self.recipe.evaluate), found)
        # A trial's checkpoints are removed when it ends. Samples are drawn after all trials have ended.
        checkpoints = checkpoints_kept(sweep.iterations, rung_of(sweep), Cadence.keep) * checkpoint
        return replace(
            measured, work=f"at most {len(left)} x {sweep.iterations:,} iterations of {self.recipe.main.batch_size:,}",
            amount=len(left) * sweep.iterations, jobs=(*merged, *measured.jobs),
            stored=sweep.trials * (self.weights + TEXT) + measured.stored, passing_each=checkpoints,
            starts=1 + -(-len(left) // max(1, side)), note="ASHA stops trials early; that saving is not counted",
        )  # fmt: skip

    def evaluation(self) -> StageCost:
        phases = {folder: phase for each in self.recipe.students.values() for folder, phase in each.models().items()}
        samplings = {folder: phase.objective.sampling() for folder, phase in phases.items()}
        found = {name: (samplings.get(name), schedules) for name, schedules in models(self.recipe).items()}
        return self._measuring("evaluation", self.recipe.evaluate, found)

    def _measuring(
        self, name: str, config: EvaluateConfig, found: Mapping[str, tuple[FewStep | None, Sequence[str]]]
    ) -> StageCost:
        """The measurement of models. `found` maps folders to few-step sampling (None for a teacher) and schedules."""
        count, task = config.count or self.real, self._task("sampling", config.precision, config.compiled)
        setup = Setup(
            workspace=self.there.place, recipe=self.recipe.name, config=config, images={}, count=count,
            pairs=self._plan(self.recipe.pairs),
        )  # fmt: skip
        left = workload(setup, found, levels=self.there.levels or CALIBRATED)
        if not left.models:
            return _complete(name)
        need = _pool(name, "evaluate", config)
        jobs = [Job(task=task, need=need, count=lambda: left.evaluations * task.size, parts=left.shards)]
        stored, passing, figures = float(left.rows * ROW), 0.0, 0.0
        for network in config.features:
            flops, dimensions, logits = counting.measuring(network, self.recipe.probe, self.recipe.images)
            new = network in left.networks
            looking = functools.partial(float, (left.samples + new * self.real) * flops)
            jobs.append(Job(task=self._task("looking", "fp32"), need=need, count=looking))
            stored += new * reference_bytes(self.real, dimensions)
            passing += left.samples * counting.FLOAT * (dimensions + logits)
            kept = min(KEPT, self.real)
            figures += left.draws * measures_flops(count, kept, dimensions, network, neighbours=config.neighbours)
        on_core = Work(kind="figures", size=1.0, precision="fp64")
        jobs.append(Job(task=on_core, need=need, count=lambda: figures, parts=left.draws, on_core=True))
        return StageCost(
            name=name, work=f"{left.rows} rows of {config.draws} x {count:,} samples, {left.evaluations:,} evaluations",
            amount=left.samples, jobs=tuple(jobs), stored=stored, passing=passing,
        )  # fmt: skip

    def report(self) -> StageCost:
        return StageCost(name="report", work="one page", amount=1, stored=REPORT)

    def _task(self, kind: str, precision: str, compiled: bool = False) -> Work:
        return Work(kind=kind, size=self.size, precision=precision, compiled=compiled)


def _pool(stage: str, section: str, config: PoolConfig) -> Need:
    return Need(
        stage=stage, option=f"--{section}.gpus", least=config.min_actors, most=config.max_actors,
        gpus=config.gpus, cpus=config.cpus, threads=config.threads,
    )  # fmt: skip


def _ranks(folder: str, config: TeacherConfig | StudentConfig) -> Need:
    workers, section = config.workers, made_by(folder).replace("/", ".")
    return Need(
        stage=folder, option=f"--{section}.workers.count", least=workers.min_count or workers.count,
        most=workers.count, gpus=workers.gpus, cpus=workers.threads, threads=workers.threads,
    )  # fmt: skip
