"""What a run of a recipe is made of: the trials of its sweep, the rows of its evaluation, the networks and bytes it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from beeline.config import PairsConfig, Recipe, StudentConfig
from beeline.features.backbones import weights_of
from beeline.features.measuring import PROBES
from beeline.metrics.measures import KID_SUBSET
from beeline.sampling.few_step import parse_steps
from beeline.sampling.solvers import evaluations
from cluster.planning.workspace import Workspace
from cluster.steps import models
from evaluation.reference import KEPT
from evaluation.samplings import teacher_sampling
from pipeline.shards import encode, group_rows, shard_count
from trainers.trials import can_vary, config_of, settings

KID_SUBSETS = 100
PER_GROUP = 400  # bytes of a row group beside its rows


def needed_weights(recipe: Recipe) -> list[str]:
    """The pretrained networks that losses, discriminators and measurements look through."""
    trained = [*recipe.students.values(), *trials(recipe).values()]
    names = [name for student in trained for name in student.needs().features]
    names += [*recipe.evaluate.features, recipe.sweep.features]
    return [name for name in dict.fromkeys(map(weights_of, names)) if name not in PROBES]


def trials(recipe: Recipe) -> dict[int, StudentConfig]:
    """The students of the sweep's trials, by number."""
    student, sweep = recipe.main, recipe.sweep
    if not can_vary(student):
        return {}
    return {k: config_of(settings(k, sweep, student.seed), sweep, student) for k in range(sweep.trials)}


def pair_evaluations(pairs: PairsConfig, there: Workspace) -> int:
    """Evaluations of the teacher for each pair."""
    return there.levels if pairs.solver == "calibrated" else evaluations("heun", pairs.num_steps)


def store_bytes(column: str, shape: Sequence[int], dtype: str, count: int, shard_size: int, plan: Any) -> float:
    """Bytes of a store of `count` images of `shape` (C, H, W): what rows take, and what surrounds them in a shard."""
    empty = np.zeros((1, *shape), dtype)
    row = empty.nbytes + 8 + 4  # index and label
    around = len(encode(column, empty, np.zeros(1, np.int32), [0], plan, x0_generator="", x0_crc32=0)) - row
    groups = -(-min(count, shard_size) // group_rows(empty.nbytes))
    return count * row + shard_count(count, shard_size) * (around + (groups - 1) * PER_GROUP)


def measured_models(recipe: Recipe) -> dict[str, list[int]]:
    """What run_pipeline.py measures: the evaluations of each row of each model."""
    rows = {name: [len(parse_steps(text)) for text in dict.fromkeys(texts)] for name, texts in models(recipe).items()}
    return rows | {"teacher": [teacher_sampling(nfe).nfe for nfe in dict.fromkeys(recipe.evaluate.nfe)]}


def figures(network: str, dimensions: int, count: int, images: int, neighbours: int) -> float:
    """FLOPs of what is computed of one draw in the features of a network (measures.py): covariance and its roots,
    neighbourhoods, kernel distance."""
    fake, true = min(neighbours, count), min(neighbours, KEPT, images)
    total = 2.0 * dimensions * (count * dimensions + fake**2 + true**2 + fake * true) + 10 * dimensions**3
    return total + (KID_SUBSETS * 3 * 2 * KID_SUBSET**2 * dimensions if network == "inception" else 0)
