"""A sweep of SOT step schedules, learning rates, the adversarial weight and the average into sweeps/<name>/, with Ray Tune.

    python trainers/sweep_lmm.py digits
    python trainers/sweep_lmm.py digits --sweep.trials 32                       # adds to what is there
    python trainers/sweep_lmm.py digits --sweep.promote tuned                   # the best one into students/tuned

Every trial starts from one shared student and trains through the same task and loop as train_lmm.py. ASHA, on the training
step, stops the worse ones by a quick distance; the finished ones are judged by the evaluation pool. Both look through the
losses' probe by default, so that what is chosen here is not chosen by the measure that is reported.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import io
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import ray.cloudpickle
import tyro
from ray import tune
from ray.tune.trainable import wrap_function

from beeline.config import EvaluateConfig, StudentConfig, SweepConfig, WorkersConfig, to_dict
from beeline.config.student import student_folder
from beeline.errors import BeelineError, StorageError, reading
from beeline.files.layout import check_layout
from beeline.files.names import CONFIG, EVALUATION, IMAGES, LOG, PAIRS, SWEEPS, WEIGHTS
from beeline.metrics.measures import VALIDATION
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.sampling.few_step import parse_steps
from evaluation.evaluate import check_measurable, measure
from evaluation.results import metrics_in
from evaluation.sweep_table import ENDED, is_judged, pareto, trials_in, write_trials
from pipeline import prometheus
from pipeline.command import run_command
from pipeline.model_folders import publish_model, require_features, require_model, require_probe
from pipeline.records import plan_in
from pipeline.room import check_room
from pipeline.runtime import ensure_ray, find_user_error
from pipeline.stage import Stage, fingerprint, require
from pipeline.storage import Folder
from trainers import checkpoints
from trainers.launch import check_batch
from trainers.train_lmm import check_resolution
from trainers.trials import PerSchedule, config_of, folder_name, run_trial, rungs_in, settings, trials_of

PARETO = "pareto.png"


def sweep_lmm(
    workspace: str, recipe: tyro.conf.Suppress[str], sweep: SweepConfig, student: StudentConfig, evaluate: EvaluateConfig
) -> None:
    """Train `sweep.trials` short trials, judge the finished ones, and tabulate all.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    place = Folder(workspace)
    check_sweep(sweep, student)
    pairs, images = require(place, PAIRS, recipe), require(place, IMAGES, recipe)
    check_measurable(place, recipe, judging(sweep, evaluate), images)
    tried = {number: settings(number, sweep, student.seed) for number in range(sweep.trials)}
    configs = trials_of(sweep, student)
    names = dict.fromkeys(name for config in configs.values() for name in config.needs().features)
    init, init_sha256 = require_model(place, sweep.init, recipe)
    for config in configs.values():
        check_resolution(config, init.img_resolution)
    plan = {
        "sweep": to_dict(sweep, resources=False),
        "student": to_dict(configs[0], resources=False),
        "pairs": fingerprint(pairs),
        "images": fingerprint(images),
        "init_sha256": init_sha256,
        "probe_sha256": require_probe(place, "losses", recipe)[1],
        "features_sha256": {name: require_features(place, name, recipe)[1] for name in names},
    }
    stage = Stage(place, f"{SWEEPS}/{sweep.name}", plan)
    folder, there = stage.folder, stage.folder.sizes()
    left = [number for number in tried if _row_name(number) not in there]
    if stage.begin(more=bool(left)):
        print(f"sweep: {len(tried) - len(left)} of {len(tried)} trials are there", flush=True)
        _train(place, recipe, sweep, folder, tried, {number: configs[number] for number in left}, pairs, images)
        for number in tried:  # a stopped trial may have written one before its process ended
            _remove_checkpoints(folder, number)
        rows = [_row(folder, number) for number in tried]
        rows = _judge(place, recipe, sweep, evaluate, rows)
        write_trials(folder, rows)
        folder.write(PARETO, _pareto_plot(rows))
        stage.finish(trials=len(rows), finished=len(finished(rows)))
    if sweep.promote:
        _promote(place, sweep, trials_in(folder))


def check_sweep(sweep: SweepConfig, student: StudentConfig) -> None:
    """Raise BeelineError for settings that do not go together, whatever the workspace holds."""
    config_of(settings(0, sweep, student.seed), sweep, student)
    lines = list(student.phases.values())[-1].objective
    assert isinstance(lines, LinesMatchingConfig)
    for text in sweep.schedules:
        last = parse_steps(text)[-1]
        sweep.require(last < lines.num_steps, "schedules", f"indices below the objective's num_steps, {lines.num_steps}")
    check_batch(student.batch_size, WorkersConfig(), student.accumulate)
    nfes = {len(parse_steps(text)) for text in sweep.schedules}
    if sweep.promote:
        sweep.require(sweep.promote_nfe in nfes, "promote_nfe", f"the steps of one of the schedules {sweep.schedules}")


def _train(
    place: Folder,
    recipe: str,
    sweep: SweepConfig,
    folder: Folder,
    tried: Mapping[int, Mapping[str, Any]],
    configs: Mapping[int, StudentConfig],
    pairs: dict[str, Any],
    images: dict[str, Any],
) -> None:
    """Run the trials of `configs`; each that ends, or is stopped, leaves a row."""
    if not configs:
        return
    ensure_ray()
    check_room("sweep", 1, cpus=sweep.threads, gpus=sweep.gpus)
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # or Ctrl-C would end the trials and go on with the sweep
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one has tables of its own even where verbose is 0
    logging.getLogger("ray.tune.execution.tune_controller").addFilter(_is_news)
    rungs = {number: rungs_in(folder / folder_name(number)) for number in tried}
    function = tune.with_parameters(
        run_trial, workspace=place, recipe=recipe, folder=folder, configs=configs, sweep=sweep, pairs=pairs, images=images
    )
    resources, name = {"CPU": sweep.threads, "GPU": sweep.gpus}, f"Trial({sweep.name})"
    trainable = wrap_function(tune.with_resources(function, resources), name=name)
    trainable.__name__ = trainable.__qualname__ = name  # for Ray's dashboard: by itself it is an "ImplicitFunc"
    ended = [_row(folder, number) for number in tried if number not in configs]
    # Tune's own files are of no use afterwards: what a sweep goes on from is in the workspace.
    with tempfile.TemporaryDirectory(prefix="beeline-sweep-") as scratch:
        tuner = tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(list(configs))},
            tune_config=tune.TuneConfig(
                scheduler=PerSchedule(sweep, tried, rungs), max_concurrent_trials=sweep.max_concurrent or None
            ),
            run_config=tune.RunConfig(
                name=sweep.name,
                storage_path=scratch,
                callbacks=[_Rows(folder, sweep, tried, ended)],
                failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
                verbose=0,
            ),
        )
        errors = [result.error for result in tuner.fit() if result.error]
    if errors:
        raise errors[0]


class _Rows(tune.Callback):
    """Writes the row of each trial that has ended: it will not be run again. `ended` are those of earlier runs."""

    def __init__(
        self, folder: Folder, sweep: SweepConfig, tried: Mapping[int, Mapping[str, Any]], ended: list[dict[str, Any]]
    ) -> None:
        self.folder, self.sweep, self.tried, self.ended = folder, sweep, tried, ended
        self._show()

    def _show(self) -> None:
        stopped = sum(row["stopped"] for row in self.ended)
        states = {"left": len(self.tried) - len(self.ended), "stopped": stopped, "finished": len(self.ended) - stopped}
        for state, trials in states.items():
            prometheus.gauge("sweep_trials", trials, sweep=self.sweep.name, state=state)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune tries a trial again after any error. One that only the user can mend is final; others are said."""
        file = trial.pickled_error_file  # as Tune has just written it; what `get_pickled_error` reads is copied later
        error = find_user_error(ray.cloudpickle.loads(Path(file).read_bytes())) if file else None
        if error is not None and not isinstance(error, StorageError):
            raise error
        why = error or "its process has died"
        print(f"sweep: trial {trial.config['trial']} is tried again: {why}", flush=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["trial"]
        last = rungs_in(self.folder / folder_name(number))[-1]
        row = {**self.tried[number], **last, "stopped": last["step"] < self.sweep.iterations}
        self.folder.write_json(_row_name(number), row)
        _remove_checkpoints(self.folder, number)
        self.ended.append(row)
        self._show()
        how = f"stopped at step {last['step']}" if row["stopped"] else "finished"
        what = f"trial {number}, steps {row['steps']}, lr {row['lr']:g}"
        print(f"sweep: {what}: {how}, {VALIDATION} {row[VALIDATION]:.3f}", flush=True)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether Tune logs more than an error for the user, which is told by itself and without a traceback."""
    return find_user_error(record.exc_info[1] if record.exc_info else None) is None


def judging(sweep: SweepConfig, evaluate: EvaluateConfig) -> EvaluateConfig:
    """How finished trials are measured: in the sweep's own features."""
    reference = evaluate.reference if sweep.features == "inception" else ""
    return replace(evaluate, features=(sweep.features,), rule="trained", reference=reference)


def _judge(
    place: Folder, recipe: str, sweep: SweepConfig, evaluate: EvaluateConfig, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows, and to those of finished trials what the evaluation pool finds: `distance` (mean over draws) and its `std`, of
    `metric`."""
    names = {row["trial"]: f"{SWEEPS}/{sweep.name}/{folder_name(row['trial'])}" for row in rows if not row["stopped"]}
    steps = {names[row["trial"]]: (row["steps"],) for row in rows if row["trial"] in names}
    measure(str(place), recipe, judging(sweep, evaluate), steps)
    made = []
    for row in rows:
        figures: dict[str, Any] = {"metric": None, "distance": None, "std": None}
        if row["trial"] in names:
            found = metrics_in(place / EVALUATION / names[row["trial"]])
            assert found is not None, "measure() leaves metrics of every trial"
            first = found["rows"][0]
            figures = {"metric": first["metric"], "distance": first["mean"], "std": first["std"]}
        made.append(row | figures)
    return made


def finished(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of trials that were not stopped."""
    return [row for row in rows if not row["stopped"]]


def _promote(place: Folder, sweep: SweepConfig, rows: list[dict[str, Any]]) -> None:
    """The best trial of `sweep.promote_nfe` evaluations as a student."""
    able = [row for row in rows if row["nfe"] == sweep.promote_nfe and is_judged(row)]
    if not able:
        counts = ", ".join(map(str, sorted({row["nfe"] for row in finished(rows)})))
        raise BeelineError(f"no finished trial has {sweep.promote_nfe} evaluations; there are some of {counts}")
    best, swept = min(able, key=lambda row: row["distance"]), place / SWEEPS / sweep.name
    source = swept / folder_name(best["trial"])
    files = {name: source.read(name) for name in (WEIGHTS, CONFIG)}
    origin = {"sweep": sweep.name, **{key: best[key] for key in ("trial", "metric", "distance")}}
    stage = Stage(place, student_folder(sweep.promote), {"promoted": origin, "sweep": plan_in(swept, {})})
    if stage.begin():
        publish_model(stage.folder, files)
        stage.folder.write(LOG, source.read(LOG))
        stage.finish(**origin)
        print(f"sweep: trial {origin['trial']} is students/{sweep.promote}", flush=True)


def _row(folder: Folder, number: int) -> dict[str, Any]:
    """What is kept of a trial that has ended."""
    name = _row_name(number)
    with reading(f"{folder}/{name} is not as a trial leaves it", "remove it and sweep again"):
        row = folder.read_json(name)
        check_layout(row, ENDED)
        return row


def _remove_checkpoints(folder: Folder, number: int) -> None:
    """Those of a trial that has ended: several times the size of the student."""
    for step in checkpoints.steps(folder / folder_name(number)):
        checkpoints.remove(folder / folder_name(number), step)


def _row_name(number: int) -> str:
    return f"trial-{number:04d}.json"


def _pareto_plot(rows: list[dict[str, Any]]) -> bytes:
    """NFE against distance, a point for each judged trial, coloured by learning rate; the Pareto front joined."""
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    shown, front = finished(rows), pareto(rows)
    nfe, distance = [row["nfe"] for row in shown], [row["distance"] for row in shown]
    points = axes.scatter(nfe, distance, c=[row["lr"] for row in shown], norm="log", s=40)
    figure.colorbar(points, label="learning rate")
    axes.plot([row["nfe"] for row in front], [row["distance"] for row in front], color="0.4", linewidth=1, zorder=0)
    axes.set_xticks(sorted(set(nfe)))
    axes.set_xlabel("network evaluations per image")
    axes.set_ylabel(shown[0]["metric"] if shown else "distance")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    run_command(sweep_lmm)
