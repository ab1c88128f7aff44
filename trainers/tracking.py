"""Sends a run's figures to TensorBoard and, on request, to MLflow and Weights & Biases.

All of them get the rows of train.jsonl, which remains the record. Only the last step is read back from a tracker: a resumed
run continues after that step, so that no point is doubled or missing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from beeline.errors import BeelineError
from pipeline.training_log import SECONDS, STEP

Row = Mapping[str, Any]
RETRY = 600.0  # seconds between attempts: one attempt to reach a missing server can take most of a minute
RUN_TAG = "beeline.run_id"  # MLflow chooses its runs' ids itself
# With MLflow's own defaults, a server that hangs would block a training step for 20 minutes.
MLFLOW_DEFAULTS = {"HTTP_REQUEST_TIMEOUT": "10", "HTTP_REQUEST_MAX_RETRIES": "1", "DISABLE_TELEMETRY": "true"}
WANDB_WAITS: dict[str, Any] = {"init_timeout": 30.0, "finish_timeout": 60.0}  # seconds


def tensorboard_events(rows: Sequence[Row]) -> bytes:
    """One TensorBoard event file with every finite number of every row as a scalar (float32) at the row's "step".

    The bytes are a function of the rows. Object storage cannot append: publish the file as a whole, under one name, whenever
    train.jsonl is published. One file per process would leave doubled or orphaned points after a restart. `wall_time` is
    seconds of training over all restarts, so that TensorBoard's relative axis has no pauses; a restart shows by "seconds"
    that are smaller than before. A running TensorBoard shows new points only with --load_fast=false: its fast reader keeps
    reading the replaced file. (On S3 also set FSSPEC_S3='{"use_listings_cache": false}' in its environment.)
    """
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    writer = RecordWriter(file)
    writer.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())
    earlier = last = 0.0
    for row in rows:
        seconds = row.get(SECONDS, last)
        earlier, last = earlier + (last if seconds < last else 0.0), seconds
        values = [Summary.Value(tag=key, simple_value=value) for key, value in _figures(row).items()]
        event = Event(wall_time=earlier + seconds, step=row[STEP], summary=Summary(value=values))
        writer.write(event.SerializeToString())
    return file.getvalue()


class Tracker(Protocol):
    """Receives rows on rank 0. Neither method raises: an unreachable server must not end a training.

    Rows that could not be sent wait in memory and go with a later row, with at most one attempt every ten minutes. The first
    failure is printed. Rows that are still waiting at the end are in train.jsonl.
    """

    def log(self, row: Row) -> None:
        """Send a row, unless the tracker has its step. After a resume, pass all rows of train.jsonl again."""
        ...

    def close(self) -> None:
        """Send waiting rows and mark the run as finished. Do not call it for failed runs: they can be resumed."""
        ...


def check_trackers(names: Sequence[str]) -> None:
    """Raise BeelineError, naming the fix, unless all `names` are trackers that are installed here. Connects to nothing."""
    for name in names:
        if name not in SERVICES:
            raise BeelineError(f"tracker {name!r} is unknown; expected {' or '.join(SERVICES)}")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of results, mlflow/ or wandb/, is not the package
            raise BeelineError(
                f"tracker {name!r} is not installed; in Beeline's folder, run: pip install --editable '.[tracking]'"
            )


def open_trackers(
    names: Sequence[str], *, run_id: str, name: str, config: Mapping[str, Any], resumed: bool = False
) -> list[Tracker]:
    """Start the run `run_id` in each tracker, or continue it if it exists. `name` is the displayed name.

    The libraries' own variables set the server and the account (MLFLOW_TRACKING_URI, WANDB_API_KEY, WANDB_MODE ...).
    MLFLOW_EXPERIMENT_NAME and WANDB_PROJECT set the project, "beeline" by default. Raises BeelineError for a tracker that is
    not installed or cannot be reached. For a `resumed` run, an unreachable tracker is a failure as described in `Tracker`.
    """
    check_trackers(names)
    trackers = [_Retrying(which, functools.partial(SERVICES[which], run_id, name, config)) for which in dict.fromkeys(names)]
    for tracker in trackers:
        tracker.send(required=not resumed)
    return list(trackers)


class _Retrying:
    """A tracker around a service that may fail. After a failure it reconnects, and so learns which rows have arrived."""

    def __init__(self, which: str, connect: Callable[[], _Mlflow | _Wandb]) -> None:
        self.which, self.connect, self.service = which, connect, None
        self.rows: dict[int, Row] = {}
        self.reported, self.not_before = False, 0.0

    def log(self, row: Row) -> None:
        self.rows[row[STEP]] = row
        if time.monotonic() >= self.not_before:
            self.send()

    def close(self) -> None:
        self.send(last=True)

    def send(self, *, required: bool = False, last: bool = False) -> None:
        try:
            if self.service is None:
                self.service = self.connect()
                state = f"continues after step {self.service.last}" if self.service.last >= 0 else "starts"
                print(f"{self.which}: the run {state}", flush=True)
            steps = sorted(step for step in self.rows if step > self.service.last)
            self.service.send({step: _figures(self.rows[step]) for step in steps})
            self.service.last = max([self.service.last, *steps])
            if last:
                self.service.finish()
        except Exception as error:  # whatever the libraries raise
            self.service, self.not_before = None, time.monotonic() + RETRY
            text = re.sub(r"//[^/\s]*@", "//", " ".join(str(error).split()))[:500].removesuffix(".")  # no credentials
            if required:
                raise BeelineError(
                    f"{self.which}: {text}. Check the {self.which.upper()}_* variables, or train without this tracker"
                ) from error
            if not self.reported:
                print(f"{self.which} failed; retrying every {RETRY / 60:.0f} minutes: {text}", flush=True)
            self.reported = True


class _Mlflow:
    """The newest run with Beeline's tag in the experiment. `last` is the last step that it holds, or -1."""

    def __init__(self, run_id: str, name: str, config: Mapping[str, Any]) -> None:
        for variable, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(f"MLFLOW_{variable}", value)
        import mlflow.entities  # pyright: ignore[reportMissingImports]

        self.client, self.entities = mlflow.MlflowClient(), mlflow.entities
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "beeline")
        experiment = self.client.get_experiment_by_name(title)
        where = self.client.create_experiment(title) if experiment is None else experiment.experiment_id
        runs = self.client.search_runs([where], f"tags.`{RUN_TAG}` = '{run_id}'", max_results=1)
        run = runs[0] if runs else self.client.create_run(where, tags={RUN_TAG: run_id}, run_name=name)
        self.id = run.info.run_id
        self.client.update_run(self.id, status="RUNNING")
        # An existing parameter cannot be logged again.
        new = [self.entities.Param(key, value) for key, value in _flat(config).items() if key not in run.data.params]
        self.client.log_batch(self.id, params=new)
        histories = [self.client.get_metric_history(self.id, key) for key in run.data.metrics]
        self.last = max((metric.step for history in histories for metric in history), default=-1)

    def send(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        now, metric = int(time.time() * 1000), self.entities.Metric
        metrics = [metric(key, value, now, step) for step, figures in rows.items() for key, value in figures.items()]
        self.client.log_batch(self.id, metrics)

    def finish(self) -> None:
        self.client.set_terminated(self.id)


class _Wandb:
    """The run with this id in the project. `last` is the last step that it holds, or -1.

    Offline, no server reports its steps, and every process writes a folder in WANDB_DIR that holds the run from its start.
    `wandb sync` must send only the newest folder, so the others are marked as sent. Otherwise wandb would get the same rows
    again and give them new steps.
    """

    def __init__(self, run_id: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        with contextlib.suppress(Exception):
            wandb.teardown()  # if its helper process died, `init` starts another only after this
        self.run = wandb.init(
            id=run_id, name=name, project=os.environ.get("WANDB_PROJECT", "beeline"), config=dict(config), resume="allow",
            reinit="create_new", settings=wandb.Settings(console="off", **WANDB_WAITS),
        )  # fmt: skip
        self.last = self.run.starting_step - 1
        if self.run.offline:
            own_folder = Path(self.run.sync_dir)
            for folder in set(own_folder.parent.glob(f"offline-run-*-{run_id}*")) - {own_folder}:
                (folder / f"run-{run_id}.wandb.synced").touch()

    def send(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        for step, figures in rows.items():
            self.run.log(dict(figures), step=step, commit=True)

    def finish(self) -> None:
        self.run.finish()


SERVICES = {"mlflow": _Mlflow, "wandb": _Wandb}


def _figures(row: Row) -> dict[str, float]:
    """The row's finite numbers, without its step."""
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != STEP}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}


def _flat(config: Any, at: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} as {"a.b": "1"}, cut to lengths that every MLflow server accepts."""
    if not isinstance(config, Mapping):
        return {at[1:251]: str(config)[:500]}
    return {name: text for key, value in config.items() for name, text in _flat(value, f"{at}.{key}").items()}
