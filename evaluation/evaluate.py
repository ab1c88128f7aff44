"""Distances of models to the real images into evaluation/<model>/, by a pool of actors.

    python evaluation/evaluate.py digits --model teacher
    python evaluation/evaluate.py digits --model students/lmm students/l2 --evaluate.steps 0

The metric is `fd_probe`: the Fréchet distance in the features of the measuring probe, which no loss has used. It is not
FID. Class labels match those of the real images. The same numbers come out, to the last bit, for any number of actors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import tyro

from beeline import frechet
from beeline.config import EvaluateConfig, to_dict
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.frechet import Statistics
from beeline.schedule import edm_sigmas
from beeline.straightness import straightness
from evaluation.measure import (
    Job,
    Measure,
    Row,
    draw,
    jobs_of,
    noise_seed,
    part_name,
    reference,
    rows_for,
    shards_per_draw,
)
from pipeline.command import Progress, run_command
from pipeline.pool import run_pool
from pipeline.reader import ShardReader
from pipeline.sheet import sheet_png
from pipeline.stage import Stage, check_fits, fingerprint, require, require_model, require_probe
from pipeline.storage import Folder

METRICS, SAMPLES = "metrics.json", "samples.png"
STRAIGHTNESS_PAIRS = 512


def evaluate(
    workspace: str, recipe: tyro.conf.Suppress[str], evaluate: EvaluateConfig, model: tuple[str, ...] = ("teacher",)
) -> None:
    """Measure models against <workspace>/images.

    Args:
        workspace: Local folder or s3://bucket/prefix.
        model: Folders of the models: teacher, students/<name>.
    """
    measure(workspace, recipe, evaluate, {name: evaluate.steps for name in model})


def measure(workspace: str, recipe: str, config: EvaluateConfig, models: Mapping[str, tuple[str, ...]]) -> None:
    """Measure several models with one pool; `models` gives each student the step schedules to sample it at."""
    place = Folder(workspace)
    images = require(place, "images", recipe)
    probe, probe_digest = require_probe(place, "measure", recipe)
    count = config.count or images["images"]["count"]
    dimensions = probe.tap_channels[-1]
    if count <= dimensions:
        raise BeelineError(f"{count} samples are too few for a distance in {dimensions} features; take more than {dimensions}")
    work: list[tuple[Stage, Denoiser, list[Row], list[Job]]] = []
    for name, steps in models.items():
        model, digest = require_model(place, name, recipe)
        check_fits(place, images, model.network_config, name)
        rows = rows_for(model, replace(config, steps=steps))
        plan = {
            "evaluate": to_dict(replace(config, steps=steps), resources=False),
            "rows": [row.label for row in rows],
            "model_sha256": digest,
            "probe_sha256": probe_digest,
            "images": fingerprint(images),
        }
        stage = Stage(place, f"evaluation/{name}", plan)
        if stage.begin():
            there = stage.folder.sizes()
            jobs = jobs_of(name, rows, config, count)
            left = [job for job in jobs if part_name(job.item) not in there or not _sound(stage.folder, job.item)]
            work.append((stage, model, rows, left))
    jobs = [job for *_, left in work for job in left]
    progress = Progress("evaluation", sum(job.evaluations for job in jobs), "network evaluations")
    arguments = {"workspace": place, "recipe": recipe, "jobs": jobs, "config": config, "images": images["images"]}
    for done in run_pool(Measure, arguments, range(len(jobs)), config):
        progress.add(done["evaluations"])
    real = reference(place, probe, images["images"])
    for stage, model, rows, _ in work:
        name = stage.name.removeprefix("evaluation/")
        metrics = {
            "rows": _distances(stage.folder, name, rows, config, count, real),
            "straightness": _straightness(place, model, recipe),
            "provenance": stage.plan | {"torch": torch.__version__, "numpy": np.__version__},
        }
        stage.folder.write_json(METRICS, metrics)
        stage.folder.write(SAMPLES, _sample_sheet(model, rows, config, images["images"]["num_classes"]))
        for row in metrics["rows"]:
            spread = f"{row['mean']:.3f} +- {row['std']:.3f}"
            print(f"{name}, {row['sampler']}: NFE {row['nfe']}, {row['metric']} {spread} (n = {count})", flush=True)
        stage.folder.clean()
        stage.finish(samples=config.draws * count * len(rows), evaluations=config.draws * count * sum(r.nfe for r in rows))


def _sample_sheet(model: Denoiser, rows: list[Row], config: EvaluateConfig, num_classes: int) -> bytes:
    """A line of samples per row: the same noise and classes for every row and every model."""
    classes = np.arange(config.samples, dtype=np.int32) % max(num_classes, 1)
    indices, seed = range(config.samples), noise_seed(config, 0)
    shown = [draw(model, row, indices, classes, seed=seed, batch_size=config.samples) for row in rows]
    return sheet_png(torch.cat(shown), columns=config.samples)


def _sound(folder: Folder, item: int) -> bool:
    try:
        Statistics.from_npz(folder.read(part_name(item)))
    except ValueError as error:
        print(f"{folder}/{part_name(item)}: unreadable ({error}); it will be made again", flush=True)
        return False
    return True


def _distances(
    folder: Folder, model: str, rows: list[Row], config: EvaluateConfig, count: int, real: Statistics
) -> list[dict[str, Any]]:
    """A row of metrics.json per sampler setting: the parts merged in index order, draw by draw."""
    shards, made = shards_per_draw(config, count), []
    for r, row in enumerate(rows):
        draws = []
        for number in range(config.draws):
            first = (r * config.draws + number) * shards
            parts = [Statistics.from_npz(folder.read(part_name(first + shard))) for shard in range(shards)]
            draws.append(frechet.frechet_distance(frechet.merge(parts), real))
        made.append(
            {
                "model": model,
                "nfe": row.nfe,
                "steps": row.steps,
                "sampler": row.label,
                "metric": "fd_probe",
                "n": count,
                "mean": float(np.mean(draws)),
                "std": float(np.std(draws, ddof=1)) if len(draws) > 1 else 0.0,
                "min": min(draws),
                "draws": draws,
            }
        )
    return made


def _straightness(place: Folder, model: Denoiser, recipe: str) -> dict[str, Any] | None:
    """Straightness of the model along the teacher's lines, at every level of the schedule; None before there are pairs
    and for students of single levels, which mean nothing elsewhere."""
    if model.few_step is not None and model.few_step.trained_steps is not None:
        return None
    try:
        plan = require(place, "pairs", recipe)
    except BeelineError:
        return None
    batch = ShardReader(place / "pairs", plan["pairs"], seed=0).batch(0, STRAIGHTNESS_PAIRS)
    sigmas = edm_sigmas(plan["pairs"]["num_steps"])
    labels = torch.from_numpy(batch["label"]) if model.label_dim else None
    values = straightness(model, torch.from_numpy(batch["x1"]), torch.from_numpy(batch["noise"]), labels, sigmas)
    return {"mean": float(np.mean(values)), "sigmas": sigmas.tolist(), "values": values, "pairs": STRAIGHTNESS_PAIRS}


if __name__ == "__main__":
    run_command(evaluate)
