"""A sweep of SOT step schedules and learning rates into sweeps/<name>/, with Ray Tune.

    python trainers/sweep_lmm.py digits

Every trial starts from one shared student, trains through the same task and loop as train_lmm.py, and is measured at its
own steps. ASHA, on the training step, stops the worse ones. Trials are judged in the features of the losses' probe, so
that what is chosen here is not chosen by the measure that is reported.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import torch
import tyro
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from beeline.config import LmmConfig, SweepConfig, to_dict
from beeline.errors import BeelineError
from beeline.schedule import check_steps
from evaluation.measure import parse_steps
from pipeline.command import ensure_ray, run_command
from pipeline.stage import Stage, fingerprint, require, require_features, require_model, require_probe
from pipeline.storage import Folder
from trainers import loop
from trainers.student import StudentTask, all_needs
from trainers.validation import METRIC, Validation

TRIALS, PARETO = "trials.parquet", "pareto.png"


def sweep_lmm(workspace: str, recipe: tyro.conf.Suppress[str], sweep: SweepConfig, lmm: LmmConfig) -> None:
    """Train one short trial per schedule and learning rate, and tabulate their distances.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    place = Folder(workspace)
    pairs, images = require(place, "pairs", recipe), require(place, "images", recipe)
    probe_digest = require_probe(place, "losses", recipe)[1]
    digest = require_model(place, sweep.init, recipe)[1]
    for text in sweep.schedules:
        try:
            check_steps(parse_steps(text), lmm.num_steps)
        except ValueError as error:
            raise BeelineError(str(error)) from error
    base = replace(
        lmm,
        init=sweep.init,
        reconstruction=replace(lmm.reconstruction, iterations=0),
        adversarial=replace(lmm.adversarial, iterations=sweep.iterations, adversarial_weight=0.0),
        validate_every=0,
    )
    features = {name: require_features(place, name, recipe)[1] for name in all_needs(base).features}
    plan = {
        "sweep": to_dict(sweep, resources=False),
        "lmm": to_dict(base, resources=False),
        "pairs": fingerprint(pairs),
        "images": fingerprint(images),
        "init_sha256": digest,
        "probe_sha256": probe_digest,
        "features_sha256": features,
    }
    stage = Stage(place, f"sweeps/{sweep.name}", plan)
    if not stage.begin():
        return
    ensure_ray()
    grid = [(steps, rate) for steps in sweep.schedules for rate in sweep.learning_rates]
    folder = stage.folder
    there = folder.sizes()
    left = [k for k in range(len(grid)) if _row_name(k) not in there]
    print(f"sweep: {len(grid) - len(left)} of {len(grid)} trials are there", flush=True)
    # ASHA compares like with like: one scheduler per step schedule, or the easier schedule would stop the harder.
    for steps in sweep.schedules:
        members = [k for k in left if grid[k][0] == steps]
        if not members:
            continue
        trainable = tune.with_resources(
            tune.with_parameters(
                _trial, grid=grid, workspace=place, recipe=recipe, base=base, sweep=sweep, pairs=pairs, images=images,
                folder=folder,
            ),
            {"CPU": sweep.threads, "GPU": sweep.gpus},
        )  # fmt: skip
        scheduler = ASHAScheduler(
            time_attr="step", metric=METRIC, mode="min", max_t=sweep.iterations,
            grace_period=max(1, sweep.iterations // sweep.rungs), reduction_factor=2,
        )  # fmt: skip
        tuner = tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(members)},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=sweep.max_concurrent),
            run_config=tune.RunConfig(name=f"tune-{steps.replace(',', '-')}", verbose=0, **_storage(folder)),
        )
        errors = [result.error for result in tuner.fit() if result.error]
        if errors:
            raise errors[0]
        for k in members:
            row = folder.read_json(_progress_name(k))
            folder.write_json(_row_name(k), row)
            print(
                f"sweep: steps {row['steps']}, lr {row['lr']:.0e}: {METRIC} {row[METRIC]:.3f} at step {row['step']}", flush=True
            )
    table = pd.DataFrame([folder.read_json(_row_name(k)) for k in range(len(grid))])
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    folder.write(TRIALS, buffer.getvalue())
    folder.write(PARETO, _pareto(table))
    stage.finish(trials=len(grid))


def _storage(folder: Folder) -> dict[str, Any]:
    """The arguments that make a RunConfig of Tune keep its files in `folder`."""
    filesystem, path = folder.arrow()
    return {"storage_path": path, "storage_filesystem": filesystem}


def _row_name(k: int) -> str:
    return f"trial-{k:04d}.json"


def _progress_name(k: int) -> str:
    return f"progress-{k:04d}.json"


def _trial(
    config: Mapping[str, Any],
    *,
    grid: list[tuple[str, float]],
    workspace: Folder,
    recipe: str,
    base: LmmConfig,
    sweep: SweepConfig,
    pairs: dict[str, Any],
    images: dict[str, Any],
    folder: Folder,
) -> None:
    """One trial: the loop of train_lmm.py with its own steps and learning rate, reporting a distance at each rung."""
    torch.set_num_threads(sweep.threads)
    k = int(config["trial"])
    schedule, rate = grid[k]
    steps = parse_steps(schedule)
    optimizer = replace(base.adversarial.optimizer, lr=rate)
    lmm = replace(base, adversarial=replace(base.adversarial, steps=steps, optimizer=optimizer))
    device = torch.device("cuda" if sweep.gpus else "cpu")
    validation = Validation(workspace, recipe, images, count=lmm.validate_count, seed=lmm.seed, device=device)
    session = loop.Session(device=device, folder=folder)
    task = StudentTask(session=session, workspace=workspace, recipe=recipe, config=lmm, pairs=pairs, images=images)
    for step in range(1, task.iterations + 1):
        task.step(step - 1)
        if step % max(1, sweep.iterations // sweep.rungs) == 0:
            distance = validation.judge(task.average(), steps)[0][METRIC]
            found = {"steps": schedule, "nfe": len(steps), "lr": rate, "step": step, METRIC: distance}
            folder.write_json(_progress_name(k), found)
            tune.report(found)


def _pareto(table: pd.DataFrame) -> bytes:
    """NFE against distance, one point per trial, the best of each NFE joined."""
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    rates = sorted(set(table["lr"]))
    for rate in rates:
        part = table[table["lr"] == rate]
        axes.scatter(part["nfe"], part[METRIC], label=f"lr {rate:.0e}", s=40)
    counts = sorted(set(table["nfe"]))
    best = [table.loc[table["nfe"] == nfe, METRIC].min() for nfe in counts]
    axes.plot(counts, best, color="0.4", linewidth=1, zorder=0)
    axes.set_xticks(counts)
    axes.set_xlabel("network evaluations per image")
    axes.set_ylabel("Fréchet distance, losses' probe")
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    run_command(sweep_lmm)
