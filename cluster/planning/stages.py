"""What each stage of a recipe takes, before anything is said of machines: operations, processes, bytes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from beeline.config import PhaseConfig, PoolConfig, Recipe, StudentConfig, WorkersConfig
from beeline.sampling.few_step import parse_steps
from beeline.schedule import edm_sigmas
from cluster.planning import counting
from cluster.planning.contents import figures, measured_models, needed_weights, pair_evaluations, store_bytes, trials
from cluster.planning.speeds import Task
from cluster.planning.workspace import Workspace
from evaluation.reference import KEPT
from pipeline.shards import shard_count
from trainers.train_probe import MOST_IMAGES
from trainers.trials import can_vary, rung_of, settings

TEXT = 50_000  # bytes of a model folder's plan, config, logs and sheets
IMAGES_PER_CORE = 200.0  # per second, decoded and resized: assumed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Work of one kind in one stage: `count` gives its FLOPs, or `seconds` of a core where they cannot be counted.

    It is done by at most `processes`, each with `gpus` and `threads`, in `parts` equal parts, 0 for any.
    """

    task: Task | None
    count: Callable[[], float] = lambda: 0.0
    """The operations; counting them may take seconds."""
    seconds: float = 0.0
    source: str = ""
    """How the seconds are known."""
    processes: int
    gpus: float
    threads: int
    parts: int = 0
    on_core: bool = False
    """Done by a core of the process, its GPU idle meanwhile."""
    gang: bool = False
    """All processes at once, or none."""

    @property
    def flops(self) -> float:
        """Operations."""
        return self.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage, or one student of it. `stored` bytes stay; `passing` bytes are there only while it runs."""

    name: str
    work: str
    amount: int
    jobs: tuple[Job, ...] = ()
    stored: float = 0.0
    passing: float = 0.0
    side_by_side: bool = False
    """With the stages beside it that say so, as far as the machines have room."""
    starts: int = 1
    """Processes that start one after another, at a time as long as a stage's start."""
    note: str = ""


def stages(recipe: Recipe, there: Workspace, teacher: str) -> list[Stage]:
    """Of the recipe in the order of run_pipeline.py, less what `there` is finished already. `teacher` is "train" or
    "import"."""
    made = [_images(recipe, there), _probe(recipe, there), _teacher(recipe, there, teacher), _pairs(recipe, there)]
    made += _students(recipe, there)
    weights = [name for name in needed_weights(recipe) if not there.weights(name)]
    if weights:
        stored, work = sum(map(counting.pretrained_bytes, weights)), f"{len(weights)} pretrained networks, fetched once"
        made.insert(0, Stage(name="weights", work=work, amount=len(weights), stored=stored, starts=0))
    made += [_sweep(recipe, there)] if can_vary(recipe.main) else []
    made.append(_evaluation(recipe, there))
    return [*made, Stage(name="report", work="one page", amount=1, stored=5e6)]


def _images(recipe: Recipe, there: Workspace) -> Stage:
    config, count = recipe.images, there.images
    seen = there.rehearsed.get("images")
    each, source = 1 / IMAGES_PER_CORE, f"assumed: {IMAGES_PER_CORE:g} images/s are decoded by a core"
    if seen and seen.each:
        each, source = seen.each, f"measured: {seen.source}, {1 / seen.each:,.0f} images/s for each actor"
    job = replace(_pool(config, None, shard_count(count, config.shard_size)), seconds=count * each, source=source)
    shape = (config.channels, config.resolution, config.resolution)
    stored = store_bytes("image", shape, "uint8", count, config.shard_size, {"images": {}})
    note = "" if count else f"how many there are in {config.source} is not known here: what depends on them is left out"
    return _unless(there.complete("images"), Stage(name="images", work=f"{count:,} images{there.images_from}", amount=count,
                   jobs=(job,), stored=stored, note=note))  # fmt: skip


def _probe(recipe: Recipe, there: Workspace) -> Stage:
    config, size = recipe.probe, recipe.images
    both = (config.losses, config.measure)
    each = sum(counting.probe_step(which, size.channels, size.resolution) for which in both)
    stored = sum(counting.probe_bytes(which, size.channels) + TEXT for which in both)
    task = Task(kind="reconstruction", size=counting.evaluation(recipe.teacher.network), precision="fp32")
    seen = config.iterations * config.batch_size
    job = Job(task=task, count=lambda: each * seen, processes=2, gpus=config.gpus, threads=1, parts=2)
    images = min(there.images or MOST_IMAGES, MOST_IMAGES)
    work = f"2 x {config.iterations:,} iterations of {config.batch_size} of {images:,} images"
    stage = Stage(name="probe", work=work, amount=2 * config.iterations, jobs=(job,), stored=stored)
    return _unless(there.complete("probe"), stage)


def _teacher(recipe: Recipe, there: Workspace, how: str) -> Stage:
    config = recipe.teacher
    weights = counting.weight_bytes(config.network)
    if how == "import":
        return Stage(name="teacher", work="imported", amount=0, stored=0.0 if there.teacher else weights, starts=0)
    left = config.iterations - there.step("teacher")
    task = Task(kind="teacher", size=counting.evaluation(config.network), precision=config.precision)
    job = _training(config.workers, task, lambda: counting.of_teacher(config) * left * config.batch_size)
    stage = Stage(
        name="teacher",
        work=f"{left:,} iterations of {config.batch_size:,}",
        amount=left,
        jobs=(job,),
        stored=weights + config.keep * 4 * weights * (config.iterations > config.checkpoint_every) + TEXT,
        passing=4 * weights,  # a checkpoint is whole before the oldest goes
    )
    return _unless(there.complete("teacher"), stage)


def _pairs(recipe: Recipe, there: Workspace) -> Stage:
    config, network = recipe.pairs, recipe.teacher.network
    each = pair_evaluations(config, there)
    left = max(0, config.count - there.pairs(config))
    task = Task(kind="sampling", size=counting.evaluation(network), precision=config.precision, compiled=config.compiled)
    job = replace(_pool(config, task, shard_count(left, config.shard_size)), count=lambda: left * each * task.size)
    shape = (network.img_channels, network.img_resolution, network.img_resolution)
    plan = {"pairs": dataclasses.asdict(config), "sigmas": edm_sigmas(each).tolist(), "teacher_sha256": "0" * 64}
    stored = store_bytes("x1", shape, config.dtype, config.count, config.shard_size, plan) if config.count else 0.0
    known = config.solver == "heun" or there.calibrated
    stage = Stage(
        name="pairs",
        work=f"{left:,} pairs of {each} evaluations",
        amount=left,
        jobs=(job,),
        stored=stored,
        note="" if known else f"{each} evaluations are assumed of a solver that is still to be calibrated",
    )
    return _unless(there.complete("pairs"), stage)


def _students(recipe: Recipe, there: Workspace) -> Iterator[Stage]:
    for student in recipe.students.values():
        folder = f"students/{student.name}"
        done, total = there.step(folder), student.iterations
        skipped, jobs, kept = done, [], 0
        for phase in student.running.values():
            iterations = max(0, phase.iterations - skipped)
            skipped = max(0, skipped - phase.iterations)
            if iterations:
                count, job = _phase(recipe, student, phase, iterations)
                jobs.append(job)
                kept = max(kept, count.critic_bytes + count.state_bytes)
        weights = counting.weight_bytes(recipe.teacher.network)
        averages = len(student.ema_half_lives)
        published = averages + len(student.running) - 1 + bool(student.validate_every)
        checkpoint = (3 + averages) * weights + kept
        stage = Stage(
            name=folder,
            work=f"{total - done:,} iterations of {student.batch_size:,}",
            amount=total - done,
            jobs=tuple(jobs),
            stored=published * weights + student.keep * checkpoint * (total > student.checkpoint_every) + TEXT,
            passing=checkpoint,
            side_by_side=student != recipe.main,
        )
        yield _unless(there.complete(folder), stage)


def _phase(recipe: Recipe, student: StudentConfig, phase: PhaseConfig, iterations: int) -> tuple[counting.Phase, Job]:
    network, objective = recipe.teacher.network, phase.objective
    count = counting.of_phase(network, recipe.probe.losses, objective)
    kind = "adversarial" if count.critic_bytes else "reconstruction"
    task = Task(kind=kind, size=counting.evaluation(network), precision=student.precision, compiled=student.compiled)
    judged = 0.0
    if student.validate_every:  # rank 0 samples, the others wait
        sampling = objective.sampling()
        steps = len((sampling and sampling.trained_steps) or (0,))
        judged = student.workers.count * iterations / student.validate_every * student.validate_count * steps * task.size
    return count, _training(student.workers, task, lambda: count.flops * student.batch_size * iterations + judged)


def _training(workers: WorkersConfig, task: Task, count: Callable[[], float]) -> Job:
    return Job(task=task, count=count, processes=workers.count, gpus=workers.gpus, threads=workers.threads, gang=True)


def _sweep(recipe: Recipe, there: Workspace) -> Stage:
    sweep, name = recipe.sweep, f"sweeps/{recipe.sweep.name}"
    done = there.trials(name)
    found = {k: student for k, student in trials(recipe).items() if k not in done}
    jobs, size, critic = [], counting.evaluation(recipe.teacher.network), 0
    for student in found.values():
        alone = replace(student, workers=WorkersConfig(count=1, gpus=sweep.gpus, threads=sweep.threads))
        (phase,) = alone.running.values()
        count, job = _phase(recipe, alone, phase, sweep.iterations)
        jobs.append(job)
        critic = max(critic, count.critic_bytes)
    side = min(sweep.max_concurrent or len(found), len(found))
    total = functools.partial(_sum, jobs)
    merged = [replace(job, processes=side, parts=len(found), gang=False, count=total) for job in jobs[:1]]
    samples = recipe.evaluate.draws * _count(recipe, there)
    nfe = [len(parse_steps(settings(k, sweep, 0)["steps"])) for k in found]
    judged = Task(kind="sampling", size=size, precision=recipe.evaluate.precision, compiled=recipe.evaluate.compiled)
    flops, dimensions = _look(recipe, sweep.features)
    pool = _pool(recipe.evaluate, judged, 0)
    merged += [
        replace(pool, count=lambda: sum(nfe) * samples * size),
        replace(pool, task=replace(judged, kind="looking", precision="fp32"), count=lambda: len(found) * samples * flops),
        _figures(recipe, there, [sweep.features], len(found)),
    ] if found else []  # fmt: skip
    weights = counting.weight_bytes(recipe.teacher.network)
    checkpoint = (4 * weights + critic) * (rung_of(sweep) < sweep.iterations)
    stage = Stage(
        name=name,
        work=f"at most {len(found)} x {sweep.iterations:,} iterations of {recipe.main.batch_size:,}",
        amount=len(found) * sweep.iterations,
        jobs=tuple(merged),
        stored=sweep.trials * (weights + checkpoint + 2 * TEXT),
        passing=len(found) * samples * dimensions * 4.0,
        starts=1 + -(-len(found) // max(1, side)),
        note="ASHA stops trials early; that saving is not counted",
    )
    return _unless(there.complete(name) and not found, stage)


def _sum(jobs: Sequence[Job]) -> float:
    return sum(job.flops for job in jobs)


def _evaluation(recipe: Recipe, there: Workspace) -> Stage:
    config, size = recipe.evaluate, counting.evaluation(recipe.teacher.network)
    left = {name: rows for name, rows in measured_models(recipe).items() if not there.complete(f"evaluation/{name}")}
    rows, samples = [nfe for model in left.values() for nfe in model], config.draws * _count(recipe, there)
    lines = 3 * recipe.pairs.num_steps * config.held_out * sum(_any_level(recipe, name) for name in left)
    sampled = (
        sum(rows) * (samples + config.samples + config.held_out)
        + lines
        + config.held_out * pair_evaluations(recipe.pairs, there)
    )
    task = Task(kind="sampling", size=size, precision=config.precision, compiled=config.compiled)
    jobs = [replace(_pool(config, task, len(rows) * config.draws * shard_count(_count(recipe, there), config.shard_size)),
                    count=lambda: sampled * size)]  # fmt: skip
    stored, passing = 0.0, 0.0
    for name in config.features:
        flops, dimensions = _look(recipe, name)
        looked = len(rows) * samples + there.images
        pool = _pool(config, replace(task, kind="looking", precision="fp32"), 0)
        jobs.append(replace(pool, count=functools.partial(float, looked * flops)))
        stored += min(KEPT, there.images) * (4 * dimensions + 8) + 8.0 * dimensions * (dimensions + 1)
        passing += len(rows) * samples * 4.0 * (dimensions + (1008 if name == "inception" else 0))  # its logits, too
    jobs.append(_figures(recipe, there, config.features, len(rows)))
    stage = Stage(
        name="evaluation",
        work=f"{len(rows)} rows of {config.draws} x {_count(recipe, there):,} samples, {sampled:,} evaluations",
        amount=len(rows) * samples,
        jobs=tuple(jobs),
        stored=stored + len(rows) * 200_000,
        passing=passing,
    )
    return _unless(not left, stage)


def _any_level(recipe: Recipe, model: str) -> bool:
    """Whether straightness is measured: of all models but those of single levels."""
    published = {folder: phase for student in recipe.students.values() for folder, phase in student.models().items()}
    sampling = published[model].objective.sampling() if model in published else None
    return sampling is None or sampling.trained_steps is None


def _look(recipe: Recipe, name: str) -> tuple[float, int]:
    return counting.look_at(name, recipe.probe, recipe.images)


def _figures(recipe: Recipe, there: Workspace, features: Sequence[str], rows: int) -> Job:
    config, count = recipe.evaluate, _count(recipe, there)
    total = sum(figures(name, _look(recipe, name)[1], count, there.images, config.neighbours) for name in features)
    task = Task(kind="figures", size=1.0, precision="fp64")
    return replace(_pool(config, task, rows * config.draws), count=lambda: rows * config.draws * total, on_core=True)


def _count(recipe: Recipe, there: Workspace) -> int:
    return recipe.evaluate.count or there.images


def _pool(config: PoolConfig, task: Task | None, parts: int) -> Job:
    processes = min(config.max_actors, parts) if parts else config.max_actors
    return Job(task=task, processes=processes, gpus=config.gpus, threads=config.threads, parts=parts)


def _unless(complete: bool, stage: Stage) -> Stage:
    """The stage, or what is left of one that is finished: nothing."""
    return Stage(name=stage.name, work="complete", amount=0, starts=0) if complete else stage
