"""What each stage of a recipe takes, before anything is said of machines: operations, processes, bytes.

The stages say what they do: rows and work items of a measurement, the plan of pairs, published models, bytes. Here they are
multiplied with the FLOPs of the recipe's networks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from beeline.config import EvaluateConfig, PhaseConfig, PoolConfig, Recipe, StudentConfig, TeacherConfig, WorkersConfig
from beeline.metrics.measures import measures_flops
from beeline.sampling.few_step import FewStep
from cluster.planning import counting
from cluster.planning.nodes import Need
from cluster.planning.speeds import IMAGES, Task
from cluster.planning.workspace import Workspace
from cluster.steps import models, needed_weights, steps
from evaluation.evaluate import unpublished
from evaluation.jobs import HELD_OUT, HeldOut, Setup
from evaluation.reference import KEPT, reference_bytes, reference_folder
from evaluation.rows import rows_of
from pipeline import stage as pipeline_stage
from pipeline.gen_pairs import plan_of
from pipeline.shards import shard_count, store_bytes
from trainers.loop import Cadence
from trainers.sizes import FLOAT, checkpoints_kept, published
from trainers.sweep_lmm import judging
from trainers.train_probe import MOST_IMAGES, PROBES
from trainers.trials import folder_name, rung_of, trials_of
from trainers.validation import schedule

TEXT, ROW, REPORT = 50_000, 200_000, 5_000_000  # bytes of a model's records, of a row with its sheets, of the page
CALIBRATED = 12  # evaluations that are assumed of a solver that is not calibrated yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Work of one kind in a stage."""

    task: Task
    need: Need
    count: Callable[[], float]
    """Operations. Counting them may take seconds."""
    parts: int = 0
    """Equal parts that processes do one after another; 0 for any."""
    on_core: bool = False
    """Done by a core of each process. Its GPU is taken meanwhile, and idle."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What is left of a stage."""

    name: str
    work: str
    amount: int = 0
    jobs: tuple[Job, ...] = ()
    stored: float = 0.0
    """Bytes that stay."""
    passing: float = 0.0
    """Bytes that are there only while it runs."""
    side_by_side: bool = False
    """It runs at the same time as its neighbours that say so, as far as the machines have room."""
    starts: int = 1
    """Processes that start one after another, each in the time in which a stage starts."""
    note: str = ""


def stages(recipe: Recipe, there: Workspace, teacher: str) -> list[Stage]:
    """What is left of the steps of run_pipeline.py, in their order, and of the weights to fetch before. `teacher` is "train" or
    "import". Raises BeelineError for settings that a stage refuses."""
    makers: dict[str, Callable[[], Stage]] = {
        "images": lambda: _images(recipe, there),
        "probe": lambda: _probe(recipe, there),
        "teacher": lambda: _imported(recipe, there) if teacher == "import" else _teacher(recipe, there),
        "pairs": lambda: _pairs(recipe, there),
        "evaluation": lambda: _evaluation(recipe, there),
        "report": lambda: Stage(name="report", work="one page", amount=1, stored=REPORT),
        f"sweeps/{recipe.sweep.name}": lambda: _sweep(recipe, there),
        **{f"students/{each.name}": functools.partial(_student, recipe, there, each) for each in recipe.students.values()},
    }
    found = []
    if weights := [name for name in needed_weights(recipe) if not there.weights(name)]:
        stored, work = sum(map(counting.pretrained_bytes, weights)), f"{len(weights)} pretrained networks, fetched once"
        found.append(Stage(name="weights", work=work, amount=len(weights), stored=stored, starts=0))
    for step in steps(str(there.place), recipe):
        complete = there.complete(step.name) and not (step.name.startswith("sweeps/") and _trials_left(recipe, there))
        stage = _complete(step.name) if complete else makers[step.name]()
        found.append(replace(stage, side_by_side=step.side_by_side))
    return found


def _complete(name: str) -> Stage:
    return Stage(name=name, work="complete", starts=0)


def _images(recipe: Recipe, there: Workspace) -> Stage:
    config, (count, origin) = recipe.images, there.images
    shards = shard_count(count, config.shard_size)
    return Stage(
        name="images",
        work=f"{count:,} images{origin}",
        amount=count,
        jobs=(Job(task=IMAGES, need=_pool("images", "images", config), count=lambda: count, parts=shards),),
        stored=store_bytes("image", _shape(recipe), "uint8", count, config.shard_size, {"images": {}}),
        note="" if count else f"the number of images in {config.source} is not known: what depends on it is left out",
    )


def _probe(recipe: Recipe, there: Workspace) -> Stage:
    config, images = recipe.probe, recipe.images
    networks = [getattr(config, which) for which in PROBES]
    seen = config.iterations * config.batch_size
    need = Need(stage="probe", option="--probe.gpus", least=1, most=len(PROBES), gpus=config.gpus, cpus=1)
    task = Task(kind="reconstruction", size=counting.evaluation(recipe.teacher.network), precision="fp32")
    shown = min(there.images[0] or MOST_IMAGES, MOST_IMAGES)
    return Stage(
        name="probe",
        work=f"{len(PROBES)} x {config.iterations:,} iterations of {config.batch_size} of {shown:,} images",
        amount=len(PROBES) * config.iterations,
        jobs=(Job(task=task, need=need, parts=len(PROBES),
                  count=lambda: seen * sum(counting.probe_flops(network, images) for network in networks)),),
        stored=sum(counting.probe_bytes(network, images.channels) + TEXT for network in networks),
    )  # fmt: skip


def _imported(recipe: Recipe, there: Workspace) -> Stage:
    weights = 0 if there.teacher else counting.weight_bytes(recipe.teacher.network)
    return Stage(name="teacher", work="imported", stored=weights, starts=0)


def _teacher(recipe: Recipe, there: Workspace) -> Stage:
    config = recipe.teacher
    left = config.iterations - there.step("teacher")
    task = Task(kind="teacher", size=counting.evaluation(config.network), precision=config.precision)
    job = Job(
        task=task, need=_ranks("teacher", config.workers),
        count=lambda: counting.teacher_flops(config) * left * config.batch_size,
    )  # fmt: skip
    return _training(
        "teacher", config, left, [job], weights=counting.weight_bytes(config.network), models=1, averages=1, kept=0
    )


def _student(recipe: Recipe, there: Workspace, student: StudentConfig) -> Stage:
    folder, network = f"students/{student.name}", recipe.teacher.network
    done, jobs, kept = there.step(folder), [], 0
    left = student.iterations - done
    for phase in student.running.values():
        iterations = max(0, phase.iterations - done)
        done = max(0, done - phase.iterations)
        if iterations:
            jobs.append(_phase(recipe, there, student, phase, iterations, _ranks(folder, student.workers)))
            kept = max(kept, sum(counting.phase_bytes(network, recipe.probe.losses, phase.objective)))
    return _training(
        folder, student, left, jobs,
        weights=counting.weight_bytes(network), models=published(student), averages=len(student.ema_half_lives), kept=kept,
    )  # fmt: skip


def _phase(recipe: Recipe, there: Workspace, student: StudentConfig, phase: PhaseConfig, iterations: int, need: Need) -> Job:
    network, probe, objective = recipe.teacher.network, recipe.probe.losses, phase.objective
    task = Task(
        kind=counting.kind_of_phase(network, probe, objective), size=counting.evaluation(network),
        precision=student.precision, compiled=student.compiled,
    )  # fmt: skip
    validated = 0.0
    if student.validate_every:  # rank 0 samples, the others wait
        samples = min(student.validate_count, there.images[0] or student.validate_count)
        evaluations = samples * len(schedule(objective.sampling()))
        validated = student.workers.count * iterations / student.validate_every * evaluations * task.size

    def count() -> float:
        return counting.phase_flops(network, probe, objective) * student.batch_size * iterations + validated

    return Job(task=task, need=need, count=count)


def _training(
    folder: str, config: TeacherConfig | StudentConfig, left: int, jobs: Sequence[Job],
    *, weights: int, models: int, averages: int, kept: int,
) -> Stage:  # fmt: skip
    """A training that publishes `models` of `weights` bytes. A checkpoint holds weights with Adam's two moments, `averages`,
    and `kept` bytes of critic and objective. A new one is whole before the oldest goes."""
    checkpoint = (3 + averages) * weights + kept
    stay, most = (checkpoints_kept(config.iterations, config.checkpoint_every, config.keep + k) for k in (0, 1))
    return Stage(
        name=folder,
        work=f"{left:,} iterations of {config.batch_size:,}",
        amount=left,
        jobs=tuple(jobs),
        stored=models * weights + stay * checkpoint + TEXT,
        passing=(most - stay) * checkpoint,
    )


def _pairs(recipe: Recipe, there: Workspace) -> Stage:
    config, plan = recipe.pairs, _pairs_plan(recipe, there)
    each, left = plan["evaluations"], config.count - there.pairs(config)
    task = _sampling(recipe, config.precision, config.compiled)
    job = Job(
        task=task, need=_pool("pairs", "pairs", config), count=lambda: left * each * task.size,
        parts=shard_count(left, config.shard_size),
    )  # fmt: skip
    assumed = config.solver == "calibrated" and not there.levels
    return Stage(
        name="pairs",
        work=f"{left:,} pairs of {each} evaluations",
        amount=left,
        jobs=(job,),
        stored=store_bytes("x1", plan["shape"], config.dtype, config.count, config.shard_size, plan),
        note=f"{each} evaluations are assumed: the solver is not calibrated yet" if assumed else "",
    )


def _pairs_plan(recipe: Recipe, there: Workspace) -> dict[str, Any]:
    """The plan that gen_pairs.py will write, with a stand-in for the teacher's digest."""
    levels = [0.0] * (there.levels or CALIBRATED) if recipe.pairs.solver == "calibrated" else None
    return plan_of(recipe.pairs, counting.denoiser(recipe.teacher.network), "0" * 64, levels)


def _trials_left(recipe: Recipe, there: Workspace) -> dict[int, StudentConfig]:
    ended = there.trials(f"sweeps/{recipe.sweep.name}")
    return {k: trial for k, trial in trials_of(recipe.sweep, recipe.main).items() if k not in ended}


def _sweep(recipe: Recipe, there: Workspace) -> Stage:
    sweep, name, network = recipe.sweep, f"sweeps/{recipe.sweep.name}", recipe.teacher.network
    left = _trials_left(recipe, there)
    side = min(sweep.max_concurrent or len(left), len(left))
    need = Need(
        stage=name, option="--sweep.gpus", least=1, most=side, gpus=sweep.gpus, cpus=sweep.threads, threads=sweep.threads
    )
    trials = [_trial(recipe, there, trial, need) for trial in left.values()]
    merged = (
        [  # with a discriminator, if any trial has one
            replace(
                max(trials, key=lambda job: job.task.kind == "adversarial"),
                parts=len(left),
                count=lambda: sum(job.count() for job in trials),
            )
        ]
        if trials
        else []
    )
    weights = counting.weight_bytes(network)
    phases = [phase for trial in left.values() for phase in trial.running.values()]
    checkpoint = 4 * weights + max(
        (counting.phase_bytes(network, recipe.probe.losses, p.objective)[0] for p in phases), default=0
    )
    judged = left if there.complete(name) else trials_of(sweep, recipe.main)
    samplings = {
        f"{name}/{folder_name(k)}": next(iter(trial.running.values())).objective.sampling() for k, trial in judged.items()
    }
    measured = _measuring(
        recipe, there, name, judging(sweep, recipe.evaluate),
        {folder: (few_step, (",".join(map(str, schedule(few_step))),)) for folder, few_step in samplings.items()},
    )  # fmt: skip
    return Stage(
        name=name,
        work=f"at most {len(left)} x {sweep.iterations:,} iterations of {recipe.main.batch_size:,}",
        amount=len(left) * sweep.iterations,
        jobs=(*merged, *measured.jobs),
        stored=sweep.trials * (weights + TEXT) + measured.stored,
        # A trial's checkpoints go when it ends, and samples are drawn after that.
        passing=max(side * checkpoints_kept(sweep.iterations, rung_of(sweep), Cadence.keep) * checkpoint, measured.passing),
        starts=1 + -(-len(left) // max(1, side)),
        note="ASHA stops trials early; that saving is not counted",
    )


def _trial(recipe: Recipe, there: Workspace, trial: StudentConfig, need: Need) -> Job:
    (phase,) = trial.running.values()
    return _phase(recipe, there, replace(trial, workers=WorkersConfig()), phase, phase.iterations, need)


def _evaluation(recipe: Recipe, there: Workspace) -> Stage:
    config = recipe.evaluate
    phases = {folder: phase for student in recipe.students.values() for folder, phase in student.models().items()}
    samplings = {name: phases[name].objective.sampling() if name in phases else None for name in models(recipe)}
    found = {name: (samplings[name], schedules) for name, schedules in models(recipe).items()}
    measured = _measuring(recipe, there, "evaluation", config, found)
    if not measured.models:
        return _complete("evaluation")
    samples = config.draws * (config.count or there.images[0])
    return Stage(
        name="evaluation",
        work=f"{measured.rows} rows of {config.draws} x {samples // config.draws:,} samples, "
        f"{measured.evaluations:,} evaluations",
        amount=measured.rows * samples,
        jobs=measured.jobs,
        stored=measured.stored,
        passing=measured.passing,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Measuring:
    """What is left of the measurement of some models."""

    models: int
    rows: int
    evaluations: int
    jobs: tuple[Job, ...]
    stored: float
    passing: float


def _measuring(
    recipe: Recipe, there: Workspace, stage: str, config: EvaluateConfig,
    found: Mapping[str, tuple[FewStep | None, Sequence[str]]],
) -> _Measuring:  # fmt: skip
    """The measurement of models by their folder, each with its few-step sampling (None for a teacher) and its schedules."""
    real = there.images[0]
    plan, count = _pairs_plan(recipe, there), config.count or real
    setup = Setup(workspace=there.place, recipe=recipe.name, config=config, images={}, pairs=plan, count=count)
    left = []
    for name, (few_step, schedules) in found.items():
        folder = f"evaluation/{name}"
        rows = rows_of(few_step, replace(config, steps=tuple(schedules)), levels=there.levels or CALIBRATED)
        measurement = unpublished(pipeline_stage.Stage(there.place, folder, {}), name, rows, few_step)
        left += [measurement] if measurement.rows or not there.complete(folder) else []
    rows = sum(len(measurement.rows) for measurement in left)
    evaluations = sum(measurement.evaluations(setup) for measurement in left)
    if left and not there.complete(HELD_OUT):
        evaluations += HeldOut(config.held_out, plan["evaluations"]).evaluations
    samples, draws, need = rows * config.draws * count, rows * config.draws, _pool(stage, "evaluate", config)
    task = _sampling(recipe, config.precision, config.compiled)
    shards = sum(len(measurement.samples(setup)) for measurement in left)
    jobs = [Job(task=task, need=need, count=lambda: evaluations * task.size, parts=shards)]
    stored, passing, figures = float(rows * ROW), 0.0, 0.0
    for network in config.features if left else ():
        flops, dimensions, logits = counting.measuring(network, recipe.probe, recipe.images)
        first = not there.complete(reference_folder(network))
        seen = samples + first * real
        jobs.append(
            Job(task=replace(task, kind="looking", precision="fp32"), need=need, count=functools.partial(float, seen * flops))
        )
        stored += first * reference_bytes(real, dimensions)
        passing += samples * FLOAT * (dimensions + logits)
        figures += draws * measures_flops(count, min(KEPT, real), dimensions, network, neighbours=config.neighbours)
    task_of_figures = Task(kind="figures", size=1.0, precision="fp64")
    jobs.append(Job(task=task_of_figures, need=need, count=lambda: figures, parts=draws, on_core=True))
    return _Measuring(
        models=len(left), rows=rows, evaluations=evaluations, jobs=tuple(jobs) if left else (), stored=stored, passing=passing
    )


def _sampling(recipe: Recipe, precision: str, compiled: bool) -> Task:
    return Task(kind="sampling", size=counting.evaluation(recipe.teacher.network), precision=precision, compiled=compiled)


def _shape(recipe: Recipe) -> tuple[int, int, int]:
    return recipe.images.channels, recipe.images.resolution, recipe.images.resolution


def _pool(stage: str, section: str, config: PoolConfig) -> Need:
    return Need(
        stage=stage, option=f"--{section}.gpus", least=config.min_actors, most=config.max_actors,
        gpus=config.gpus, cpus=config.cpus, threads=config.threads,
    )  # fmt: skip


def _ranks(folder: str, workers: WorkersConfig) -> Need:
    return Need(
        stage=folder, option=f"--{folder.replace('/', '.')}.workers.count", least=workers.min_count or workers.count,
        most=workers.count, gpus=workers.gpus, cpus=workers.threads, threads=workers.threads,
    )  # fmt: skip
