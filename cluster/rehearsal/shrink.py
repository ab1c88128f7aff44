"""Shrink a recipe for a rehearsal: networks, ranks and precision stay; each stage gets a few steps, shards and rows.

Only counts change. With `cpu`, so does what a CPU cannot do: GPUs, 16-bit precision, compilation, large batches.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any, TypeVar

from beeline.config import (
    EvaluateConfig,
    PairsConfig,
    PoolConfig,
    ProbeConfig,
    Recipe,
    StudentConfig,
    SweepConfig,
    VerifyConfig,
    WorkersConfig,
)

C = TypeVar("C")
HEUN = 15  # number of evaluations from which evaluation/samplings.py uses Heun's method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Amount of work per stage. Steps suffice for a first one, which compiles, and a few that are timed."""

    iterations: int
    """Iterations of each phase of a training."""
    log_every: int
    probe_iterations: int
    images: int
    image_shard: int
    batches: int
    """Batches of pairs, one per shard."""
    samples: int
    """Measured samples of each row."""
    held_out: int
    """Pairs sampled only for evaluation."""
    actors: int


GPU = Scale(
    iterations=12, log_every=3, probe_iterations=50,
    images=2048, image_shard=512, batches=6, samples=1000, held_out=32, actors=2,
)  # fmt: skip
CPU = Scale(
    iterations=2, log_every=1, probe_iterations=10,
    images=32, image_shard=16, batches=4, samples=6, held_out=2, actors=1,
)  # fmt: skip
CPU_BATCH = 2  # batch norms need two


def shrunk(recipe: Recipe, *, cpu: bool, ranks: int = 0) -> Recipe:
    """Return the recipe for a rehearsal; `ranks`, if not 0, replaces every training's `workers.count`."""
    scale = CPU if cpu else GPU
    return replace(
        recipe,
        images=_pool(recipe.images, scale, cpu, limit=scale.images, shard_size=scale.image_shard),
        probe=_probe(recipe.probe, scale, cpu),
        teacher=_training(recipe.teacher, scale, cpu, ranks, iterations=scale.iterations, checkpoint_every=scale.iterations),
        pairs=_pairs(recipe.pairs, scale, cpu),
        students={name: _student(student, scale, cpu, ranks) for name, student in recipe.students.items()},
        few_steps=_ends(recipe.few_steps) if cpu else recipe.few_steps,
        reflow_steps=min(recipe.reflow_steps, 3) if cpu else recipe.reflow_steps,
        sweep=_sweep(recipe.sweep, scale, cpu),
        evaluate=_evaluate(recipe.evaluate, scale, cpu),
    )


def verification(pairs: PairsConfig) -> VerifyConfig:
    """Return settings to verify the store on the devices that made it, with one batch sampled again."""
    same = {field.name: getattr(pairs, field.name) for field in dataclasses.fields(PoolConfig)}
    return VerifyConfig(**same, model=pairs.model, remake=1, resample=1)


def _probe(config: ProbeConfig, scale: Scale, cpu: bool) -> ProbeConfig:
    small: dict[str, Any] = {"gpus": 0, "batch_size": min(config.batch_size, 4 * CPU_BATCH)} if cpu else {}
    return replace(config, iterations=scale.probe_iterations, min_accuracy=0.0, **small)


def _pairs(config: PairsConfig, scale: Scale, cpu: bool) -> PairsConfig:
    batch = CPU_BATCH if cpu else config.batch_size
    steps = min(config.num_steps, 3) if cpu else config.num_steps
    return _pool(
        config, scale, cpu, count=scale.batches * batch, shard_size=batch, batch_size=batch, num_steps=steps
    )  # fmt: skip


def _student(config: StudentConfig, scale: Scale, cpu: bool, ranks: int) -> StudentConfig:
    phases = {name: replace(phase, iterations=min(phase.iterations, scale.iterations)) for name, phase in config.phases.items()}
    total = sum(phase.iterations for phase in phases.values())
    validation = {
        "validate_every": total if config.validate_every else 0,
        "validate_count": min(config.validate_count, scale.samples),
    }
    return _training(
        config, scale, cpu, ranks, phases=phases, **validation, checkpoint_every=max(1, total - 1), keep=1, trackers=()
    )  # fmt: skip


def _sweep(config: SweepConfig, scale: Scale, cpu: bool) -> SweepConfig:
    gpus = {"gpus": 0} if cpu else {}
    return replace(
        config, trials=1, iterations=scale.iterations, rungs=min(config.rungs, 2), promote="", max_failures=0, **gpus
    )  # fmt: skip


def _evaluate(config: EvaluateConfig, scale: Scale, cpu: bool) -> EvaluateConfig:
    small: dict[str, Any] = {"few": True, "draws": 1, "count": scale.samples, "held_out": scale.held_out}
    if cpu:
        nfe = tuple(dict.fromkeys(HEUN if nfe >= HEUN else 1 for nfe in config.nfe))
        small |= {"batch_size": CPU_BATCH, "shard_size": scale.samples // 2, "samples": 2, "nfe": nfe}
        small |= {"steps": _ends(config.steps)}
    else:
        small |= {"shard_size": min(config.batch_size, config.shard_size)}
    return _pool(config, scale, cpu, **small)


def _training(config: C, scale: Scale, cpu: bool, ranks: int, **counts: Any) -> C:
    """Return a training config with these counts."""
    settings: Any = config
    workers: WorkersConfig = replace(settings.workers, count=ranks or settings.workers.count, min_count=0, max_failures=0)
    if cpu:
        workers = replace(workers, gpus=0, threads=1)
        counts |= {"precision": "fp32", "batch_size": CPU_BATCH * workers.count * settings.accumulate}
        counts |= {"compiled": False} if isinstance(config, StudentConfig) else {}
    return replace(settings, workers=workers, log_every=scale.log_every, **counts)


def _pool(config: C, scale: Scale, cpu: bool, **counts: Any) -> C:
    """Return the config of an actor-pool stage with these counts."""
    settings: Any = config
    most = min(settings.max_actors, scale.actors)
    counts |= {"max_actors": most, "min_actors": min(settings.min_actors, most)}
    if cpu:
        counts |= {"gpus": 0, "threads": 1}
        counts |= {"precision": "fp32", "compiled": False} if hasattr(settings, "precision") else {}
    return replace(settings, **counts)


def _ends(schedules: tuple[str, ...]) -> tuple[str, ...]:
    """Return the first and the last schedule."""
    return tuple(dict.fromkeys((schedules[0], schedules[-1])))
