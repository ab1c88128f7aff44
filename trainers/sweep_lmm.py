"""Sweep SOT step schedules, learning rates, adversarial weights and EMA half-lives into sweeps/<name>/, with Ray Tune.

    python trainers/sweep_lmm.py digits
    python trainers/sweep_lmm.py digits --sweep.trials 32                       # adds trials
    python trainers/sweep_lmm.py digits --sweep.promote tuned                   # publishes the best as students/tuned

Every trial starts from one shared student and trains with the same task and loop as train_lmm.py. ASHA compares trials at
equal training steps and stops the worse ones by a quick distance. The evaluation pool measures the finished ones. By
default both use the features of the losses' probe, so that trials are not selected by the reported metric.
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
from beeline.files.names import CONFIG, EVALUATION, IMAGES, LOG, SWEEPS, WEIGHTS, pairs_folder
from beeline.metrics.measures import VALIDATION
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
from trainers.student import check_start
from trainers.train_lmm import check_resolution
from trainers.trials import PerSchedule, Shared, config_of, folder_name, run_trial, rungs_in, settings, trials_of, varied_phase

PARETO = "pareto.png"


def sweep_lmm(
    workspace: str, recipe: tyro.conf.Suppress[str], sweep: SweepConfig, student: StudentConfig, evaluate: EvaluateConfig
) -> None:
    """Train `sweep.trials` short trials, measure the finished ones, and tabulate all of them.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    place = Folder(workspace)
    check_sweep(sweep, student)
    pairs, images = require(place, pairs_folder(student.pairs), recipe), require(place, IMAGES, recipe)
    check_measurable(place, recipe, judging(sweep, evaluate), images)
    trials = {number: settings(number, sweep, student.seed) for number in range(sweep.trials)}
    configs = trials_of(sweep, student)
    names = dict.fromkeys(name for config in configs.values() for name in config.needs().features)
    init, init_sha256 = require_model(place, sweep.init, recipe)
    check_start(sweep.init, init)
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
    folder, files = stage.folder, stage.folder.sizes()
    left = [number for number in trials if _row_name(number) not in files]
    if stage.begin(more=bool(left)):
        print(f"sweep: {len(trials) - len(left)} of {len(trials)} trials are complete", flush=True)
        shared = Shared(workspace=place, recipe=recipe, sweep=sweep, folder=folder, pairs=pairs, images=images)
        _train(shared, trials, {number: configs[number] for number in left})
        for number in trials:  # a stopped trial may have written a checkpoint before its process ended
            _remove_checkpoints(folder, number)
        rows = [_row(folder, number) for number in trials]
        rows = _judge(place, recipe, sweep, evaluate, rows)
        write_trials(folder, rows)
        folder.write(PARETO, _pareto_plot(rows))
        stage.finish(trials=len(rows), finished=len(finished(rows)))
    if sweep.promote:
        _promote(place, sweep, trials_in(folder))


def check_sweep(sweep: SweepConfig, student: StudentConfig) -> None:
    """Raise BeelineError for settings that contradict each other. Does not read the workspace."""
    if (varied := varied_phase(student)) is not None:
        _, lines = varied
        allowed = f"indices below the objective's num_steps, {lines.num_steps}"
        for text in sweep.schedules:
            sweep.require(parse_steps(text)[-1] < lines.num_steps, "schedules", allowed)
    config_of(settings(0, sweep, student.seed), sweep, student)
    check_batch(student.batch_size, WorkersConfig(), student.accumulate)
    nfes = {len(parse_steps(text)) for text in sweep.schedules}
    if sweep.promote:
        sweep.require(sweep.promote_nfe in nfes, "promote_nfe", f"the steps of one of the schedules {sweep.schedules}")


def _train(shared: Shared, trials: Mapping[int, Mapping[str, Any]], configs: Mapping[int, StudentConfig]) -> None:
    """Run those of `trials` that `configs` holds. Each writes a row when it finishes or is stopped."""
    if not configs:
        return
    sweep, folder = shared.sweep, shared.folder
    ensure_ray()
    check_room("sweep", 1, cpus=sweep.threads, gpus=sweep.gpus)
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # otherwise Ctrl-C ends only the trials, not the sweep
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints tables even if verbose is 0
    logging.getLogger("ray.tune.execution.tune_controller").addFilter(_is_news)
    rungs = {number: rungs_in(folder / folder_name(number)) for number in trials}
    function = tune.with_parameters(run_trial, shared=shared, configs=configs)
    resources, name = {"CPU": sweep.threads, "GPU": sweep.gpus}, f"Trial({sweep.name})"
    trainable = wrap_function(tune.with_resources(function, resources), name=name)
    trainable.__name__ = trainable.__qualname__ = name  # for Ray's dashboard, which shows "ImplicitFunc" otherwise
    ended = [_row(folder, number) for number in trials if number not in configs]
    # Tune's own files are not needed afterwards: a sweep resumes from the workspace.
    with tempfile.TemporaryDirectory(prefix="beeline-sweep-") as scratch:
        tuner = tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(list(configs))},
            tune_config=tune.TuneConfig(
                scheduler=PerSchedule(sweep, trials, rungs), max_concurrent_trials=sweep.max_concurrent or None
            ),
            run_config=tune.RunConfig(
                name=sweep.name,
                storage_path=scratch,
                callbacks=[_Rows(folder, sweep, trials, ended)],
                failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
                verbose=0,
            ),
        )
        errors = [result.error for result in tuner.fit() if result.error]
    if errors:
        raise errors[0]


class _Rows(tune.Callback):
    """Writes a row for each trial that ends, so that it is not run again. `ended` are the rows of earlier runs."""

    def __init__(
        self, folder: Folder, sweep: SweepConfig, trials: Mapping[int, Mapping[str, Any]], ended: list[dict[str, Any]]
    ) -> None:
        self.folder, self.sweep, self.trials, self.ended = folder, sweep, trials, ended
        self._show()

    def _show(self) -> None:
        stopped = sum(row["stopped"] for row in self.ended)
        states = {"left": len(self.trials) - len(self.ended), "stopped": stopped, "finished": len(self.ended) - stopped}
        for state, count in states.items():
            prometheus.gauge("sweep_trials", count, sweep=self.sweep.name, state=state)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Fail at once for user errors, and print other errors: Tune retries a trial after every error."""
        file = trial.pickled_error_file  # just written by Tune; `get_pickled_error` reads a copy that is made later
        error = find_user_error(ray.cloudpickle.loads(Path(file).read_bytes())) if file else None
        if error is not None and not isinstance(error, StorageError):
            raise error
        why = error or "its process has died"
        print(f"sweep: retrying trial {trial.config['trial']}: {why}", flush=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["trial"]
        last = rungs_in(self.folder / folder_name(number))[-1]
        row = {**self.trials[number], **last, "stopped": last["step"] < self.sweep.iterations}
        self.folder.write_json(_row_name(number), row)
        _remove_checkpoints(self.folder, number)
        self.ended.append(row)
        self._show()
        how = f"stopped at step {last['step']}" if row["stopped"] else "finished"
        what = f"trial {number}, steps {row['steps']}, lr {row['lr']:g}"
        print(f"sweep: {what}: {how}, {VALIDATION} {row[VALIDATION]:.3f}", flush=True)


def _is_news(record: logging.LogRecord) -> bool:
    """False for a user error that Tune logs: it is printed separately, without a traceback."""
    return find_user_error(record.exc_info[1] if record.exc_info else None) is None


def judging(sweep: SweepConfig, evaluate: EvaluateConfig) -> EvaluateConfig:
    """Settings to measure finished trials with: `evaluate`, in the sweep's own features."""
    reference = evaluate.reference if sweep.features == "inception" else ""
    return replace(evaluate, features=(sweep.features,), rule="trained", reference=reference)


def _judge(
    place: Folder, recipe: str, sweep: SweepConfig, evaluate: EvaluateConfig, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Measure the finished trials with the evaluation pool. Returns the rows with `metric`, `distance` and `std`.

    `distance` is the mean of the metric over draws, `std` its standard deviation. All three are None for stopped trials.
    """
    names = {row["trial"]: f"{SWEEPS}/{sweep.name}/{folder_name(row['trial'])}" for row in rows if not row["stopped"]}
    steps = {names[row["trial"]]: (row["steps"],) for row in rows if row["trial"] in names}
    measure(str(place), recipe, judging(sweep, evaluate), steps)
    measured_rows = []
    for row in rows:
        figures: dict[str, Any] = {"metric": None, "distance": None, "std": None}
        if row["trial"] in names:
            metrics = metrics_in(place / EVALUATION / names[row["trial"]])
            assert metrics is not None, "measure() writes metrics of every trial"
            first = metrics["rows"][0]
            figures = {"metric": first["metric"], "distance": first["mean"], "std": first["std"]}
        measured_rows.append(row | figures)
    return measured_rows


def finished(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of finished trials; stopped ones are left out."""
    return [row for row in rows if not row["stopped"]]


def _promote(place: Folder, sweep: SweepConfig, rows: list[dict[str, Any]]) -> None:
    """Publish the best trial of `sweep.promote_nfe` evaluations as a student."""
    candidates = [row for row in rows if row["nfe"] == sweep.promote_nfe and is_judged(row)]
    if not candidates:
        counts = ", ".join(map(str, sorted({row["nfe"] for row in finished(rows)})))
        raise BeelineError(
            f"no finished trial has {sweep.promote_nfe} evaluations; finished trials have: {counts or 'none'}. "
            "Set --sweep.promote-nfe to one of these, or add trials (--sweep.trials)"
        )
    best, swept = min(candidates, key=lambda row: row["distance"]), place / SWEEPS / sweep.name
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
    """The row of a trial that has ended."""
    name = _row_name(number)
    with reading(f"{folder}/{name} is damaged", "remove it and run the sweep again"):
        row = folder.read_json(name)
        check_layout(row, ENDED)
        return row


def _remove_checkpoints(folder: Folder, number: int) -> None:
    """Remove the checkpoints of a trial that has ended: each is several times as large as the student."""
    for step in checkpoints.steps(folder / folder_name(number)):
        checkpoints.remove(folder / folder_name(number), step)


def _row_name(number: int) -> str:
    return f"trial-{number:04d}.json"


def _pareto_plot(rows: list[dict[str, Any]]) -> bytes:
    """A PNG plot of distance over NFE: a point for each measured trial, coloured by learning rate, and the Pareto front."""
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
