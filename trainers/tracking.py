"""A run's figures for those who watch: TensorBoard's file and, where asked for, MLflow and Weights & Biases.

All are made of the rows of train.jsonl, which remains the record. What is read back from a tracker is the last step that it
has: a resumed run goes on from there, with no point twice and none left out.
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
RETRY = 600.0  # seconds: an attempt to reach a server that is gone can take most of a minute
RUN_TAG = "beeline.run_id"  # MLflow chooses its runs' ids itself
# By its own defaults MLflow would hold a step up for 20 minutes before it gives up a server that hangs.
MLFLOW_DEFAULTS = {"HTTP_REQUEST_TIMEOUT": "10", "HTTP_REQUEST_MAX_RETRIES": "1", "DISABLE_TELEMETRY": "true"}
WANDB_WAITS: dict[str, Any] = {"init_timeout": 30.0, "finish_timeout": 60.0}  # seconds


def tensorboard_events(rows: Sequence[Row]) -> bytes:
    """One TensorBoard event file with every finite number of every row as a scalar (float32) at the row's "step".

    The bytes are a function of the rows. The file is to be published whole, under one name, whenever train.jsonl is: object
    storage cannot append, and so a restarted run leaves no doubled or orphaned points, as a file per process would.
    `wall_time` is seconds of training over all restarts (those show by "seconds" that begin anew), so that TensorBoard's
    relative axis leaves pauses out. A running TensorBoard sees new points with --load_fast=false only: its fast reader
    stays with the file that was replaced. (On S3 also with FSSPEC_S3='{"use_listings_cache": false}' in its environment.)
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
    """Where rows go, on rank 0. Neither method raises: a server that is gone must not end a training.

    Rows that could not be sent wait in memory and go with a later one, at most one attempt every ten minutes; the first
    failure is told on stdout. What still waits at the end is in train.jsonl.
    """

    def log(self, row: Row) -> None:
        """Send a row, unless the tracker has its step. After a resume, hand in all rows of train.jsonl again."""
        ...

    def close(self) -> None:
        """Send what waits and mark the run as finished. Not for runs that failed: they go on when they are resumed."""
        ...


def check_trackers(names: Sequence[str]) -> None:
    """Raise BeelineError, naming the fix, unless all names are of trackers that are installed here. Connects to nothing."""
    for name in names:
        if name not in SERVICES:
            raise BeelineError(f"tracker {name!r} is unknown; expected {' or '.join(SERVICES)}")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of results, mlflow/ or wandb/, is no package
            raise BeelineError(f"tracker {name!r} is not installed; in Beeline's folder: pip install --editable '.[tracking]'")


def open_trackers(
    names: Sequence[str], *, run_id: str, name: str, config: Mapping[str, Any], resumed: bool = False
) -> list[Tracker]:
    """Start the run `run_id` in each tracker, or continue it where it is there; `name` is what people see.

    Where the server is, and who asks, is in the libraries' own variables (MLFLOW_TRACKING_URI, WANDB_API_KEY, WANDB_MODE
    ...), the project in MLFLOW_EXPERIMENT_NAME and WANDB_PROJECT, "beeline" by default. Raises BeelineError for a tracker
    that is not installed or cannot be reached; for a `resumed` run the latter is a failure like those in `Tracker`.
    """
    check_trackers(names)
    trackers = [_Patient(which, functools.partial(SERVICES[which], run_id, name, config)) for which in dict.fromkeys(names)]
    for tracker in trackers:
        tracker.send(must=not resumed)
    return list(trackers)


class _Patient:
    """A tracker around a service that may fail. After a failure it connects anew, and so learns what had arrived."""

    def __init__(self, which: str, connect: Callable[[], _Mlflow | _Wandb]) -> None:
        self.which, self.connect, self.service = which, connect, None
        self.rows: dict[int, Row] = {}
        self.told, self.not_before = False, 0.0

    def log(self, row: Row) -> None:
        self.rows[row[STEP]] = row
        if time.monotonic() >= self.not_before:
            self.send()

    def close(self) -> None:
        self.send(last=True)

    def send(self, *, must: bool = False, last: bool = False) -> None:
        try:
            if self.service is None:
                self.service = self.connect()
                there = f"goes on after step {self.service.last}" if self.service.last >= 0 else "begins"
                print(f"{self.which}: the run {there}", flush=True)
            steps = sorted(step for step in self.rows if step > self.service.last)
            self.service.send({step: _figures(self.rows[step]) for step in steps})
            self.service.last = max([self.service.last, *steps])
            if last:
                self.service.finish()
        except Exception as error:  # whatever the libraries raise
            self.service, self.not_before = None, time.monotonic() + RETRY
            text = re.sub(r"//[^/\s]*@", "//", " ".join(str(error).split()))[:500].removesuffix(".")  # no credentials
            if must:
                raise BeelineError(
                    f"{self.which}: {text}. Check the {self.which.upper()}_* variables, or go without"
                ) from error
            if not self.told:
                print(f"{self.which} failed; it is tried again every {RETRY / 60:.0f} minutes: {text}", flush=True)
            self.told = True


class _Mlflow:
    """The newest run with our tag in the experiment, by a client of its own; `last` is the last step there, or -1."""

    def __init__(self, run_id: str, name: str, config: Mapping[str, Any]) -> None:
        for variable, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(f"MLFLOW_{variable}", value)
        import mlflow.entities  # pyright: ignore[reportMissingImports]

        self.client, self.entities = mlflow.MlflowClient(), mlflow.entities
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "beeline")
        experiment = self.client.get_experiment_by_name(title)
        where = self.client.create_experiment(title) if experiment is None else experiment.experiment_id
        found = self.client.search_runs([where], f"tags.`{RUN_TAG}` = '{run_id}'", max_results=1)
        run = found[0] if found else self.client.create_run(where, tags={RUN_TAG: run_id}, run_name=name)
        self.id = run.info.run_id
        self.client.update_run(self.id, status="RUNNING")
        # A parameter that is there cannot be logged again.
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
    """The run of this id in the project; `last` as above. Offline, no server tells what it has, and every process writes a
    folder in WANDB_DIR that holds the run from its start: `wandb sync` is to send the newest alone, so the others are marked
    as sent. Sent after one another, they would give the same rows again under steps that wandb makes up."""

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
            here = Path(self.run.sync_dir)
            for folder in set(here.parent.glob(f"offline-run-*-{run_id}*")) - {here}:
                (folder / f"run-{run_id}.wandb.synced").touch()

    def send(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        for step, figures in rows.items():
            self.run.log(dict(figures), step=step, commit=True)

    def finish(self) -> None:
        self.run.finish()


SERVICES = {"mlflow": _Mlflow, "wandb": _Wandb}


def _figures(row: Row) -> dict[str, float]:
    """The row's finite numbers but its step."""
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != STEP}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}


def _flat(config: Any, at: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} as {"a.b": "1"}, cut to lengths that every MLflow server takes."""
    if not isinstance(config, Mapping):
        return {at[1:251]: str(config)[:500]}
    return {name: text for key, value in config.items() for name, text in _flat(value, f"{at}.{key}").items()}
