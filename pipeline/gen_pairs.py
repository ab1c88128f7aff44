"""Noise-image pairs into pairs/: an actor pool samples the teacher, one task and one Parquet file per shard.

    python pipeline/gen_pairs.py digits --pairs.count 20000

Kill it at any moment and run it again: no pair is lost or made twice, and the files are the same, byte for byte.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import tyro

from beeline import noise
from beeline.checkpoint import SOLVER, solver_levels
from beeline.config import PairsConfig, to_dict
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.inference import prepare
from beeline.samplers import batches, evaluations, sample
from pipeline.command import Progress, run_command
from pipeline.pool import run_pool
from pipeline.shards import encode, shard_count, shard_name, shard_rows, todo
from pipeline.stage import Stage, require_model
from pipeline.storage import Folder


def pair_labels(indices: Sequence[int], num_classes: int) -> np.ndarray:
    """Class of each pair, int32 (n,): index mod num_classes, so that classes are balanced; -1 for no classes."""
    return np.asarray(indices, np.int64).astype(np.int32) % num_classes if num_classes else np.full(len(indices), -1)


def make_pairs(teacher: Denoiser, rows: range, config: PairsConfig) -> tuple[np.ndarray, np.ndarray]:
    """x1 (n, C, H, W) float32 and labels (n,) of the given pair indices (lmm.md, pairs: Heun, no churn)."""
    parts, labels = [], pair_labels(rows, teacher.label_dim)
    device = next(teacher.parameters()).device
    for batch in batches(len(rows), config.batch_size):
        classes = torch.from_numpy(labels[batch.start : batch.stop]).to(device) if teacher.label_dim else None
        indices = rows[batch.start : batch.stop]
        made = sample(teacher, indices, classes, seed=config.seed, solver=config.solver, num_steps=config.num_steps)
        parts.append(made)
    return torch.cat(parts).cpu().numpy(), labels


class PairShards:
    """Samples and writes shard k of pairs/."""

    def __init__(self, workspace: Folder, recipe: str, plan: dict[str, Any], config: PairsConfig) -> None:
        self.folder = workspace / "pairs"
        self.plan, self.config = plan, config
        device = "cuda" if torch.cuda.is_available() else "cpu"
        teacher = require_model(workspace, "teacher", recipe)[0].to(device)
        teacher.levels = tuple(plan["levels"]) if plan["levels"] else None
        self.teacher = prepare(
            teacher,
            precision=config.precision,
            compiled=config.compiled,
            batch_size=config.batch_size if config.compiled else None,
        )

    def work(self, k: int) -> dict[str, Any]:
        """Make and publish the shard; the row says how many pairs it holds and how long it took."""
        start = time.monotonic()
        rows = shard_rows(k, self.config.shard_size, self.config.count)
        x1, labels = make_pairs(self.teacher, rows, self.config)
        crc = noise.crc32(noise.x0(self.config.seed, rows, x1.shape[1:]))
        data = encode("x1", x1, labels, rows, self.plan, x0_generator=noise.X0_GENERATOR, x0_crc32=crc)
        self.folder.write(shard_name(k), data)
        return {"shard": k, "pairs": len(rows), "seconds": time.monotonic() - start}


def calibrated_levels(teacher: Folder, digest: str) -> tuple[float, ...]:
    """The levels in the teacher's solver.json. Raises BeelineError where there is none for these weights."""
    try:
        return solver_levels(teacher.read(SOLVER), digest, str(teacher))
    except FileNotFoundError as error:
        raise BeelineError(f"{teacher}/{SOLVER} is missing; make it with: python -m beeline.calibrate {teacher}") from error


def gen_pairs(workspace: str, recipe: tyro.conf.Suppress[str], pairs: PairsConfig) -> None:
    """Sample the teacher into <workspace>/pairs.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    place = Folder(workspace)
    _, digest = require_model(place, "teacher", recipe)
    levels = calibrated_levels(place / "teacher", digest) if pairs.solver == "calibrated" else None
    stage = Stage(place, "pairs", {"pairs": to_dict(pairs, resources=False), "levels": levels, "teacher_sha256": digest})
    if not stage.begin():
        return
    left = todo(stage.folder, stage.plan, pairs.count, pairs.shard_size)
    shards = shard_count(pairs.count, pairs.shard_size)
    nfe = len(levels) if levels else evaluations("heun", pairs.num_steps)
    print(f"pairs: {shards - len(left)} of {shards} shards are there; {nfe} evaluations a pair", flush=True)
    progress = Progress("pairs", sum(len(shard_rows(k, pairs.shard_size, pairs.count)) for k in left), "pairs")
    busy = 0.0
    arguments = {"workspace": place, "recipe": recipe, "plan": stage.plan, "config": pairs}
    for row in run_pool(PairShards, arguments, left, pairs.pool):
        busy += row["seconds"]
        progress.add(row["pairs"])
    stage.folder.clean()
    stage.finish(pairs=pairs.count, shards=shards, evaluations=nfe * pairs.count, busy_seconds=round(busy, 1))


if __name__ == "__main__":
    run_command(gen_pairs)
