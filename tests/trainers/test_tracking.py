"""TensorBoard's file, MLflow and Weights & Biases, by the real libraries; W&B's server is a fake that speaks its protocol."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import ROOT, free_port, wait_for

from beeline.errors import BeelineError
from pipeline.storage import Folder
from trainers import tracking
from trainers.tracking import check_trackers, open_trackers, tensorboard_events

EVENTS = "tensorboard/events.out.tfevents.0000000000.beeline"
MISSING = "an optional dependency is not installed: pip install --editable '.[tracking]'"
CONFIG = {"student": {"batch_size": 16, "optimizer": {"lr": 1e-3, "betas": [0.9, 0.999]}, "note": "x" * 9000}, "images": None}


def row(step: int) -> dict[str, Any]:
    """Return a row as the loop writes it."""
    return {"step": step, "loss": 1 / step, "lambda": 0.25, "skipped": 0, "seconds": step / 10}


STEPS = list(range(5, 55, 5))
ROWS = [row(step) for step in STEPS]


# TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[float, int, float]]]:
    """Return (wall time, step, value) by tag, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {tag: [(e.wall_time, e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_the_event_file_holds_every_figure_of_every_row(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = [
        {"step": 7 * k, "seconds": 2.0 * k, "skipped": k, **dict(zip("abc", generator.normal(size=3).tolist(), strict=True))}
        for k in range(1, 200)
    ]
    rows[3] |= {"only_here": 1e-30, "a": math.nan, "b": math.inf, "name": "not a number"}
    Folder(str(tmp_path)).write(EVENTS, tensorboard_events(rows))
    found = scalars(tmp_path / "tensorboard")
    assert set(found) == {"seconds", "skipped", "a", "b", "c", "only_here"}
    for tag, points in found.items():
        finite = [r for r in rows if tag in r and math.isfinite(r[tag])]
        assert points == [(r["seconds"], r["step"], float(np.float32(r[tag]))) for r in finite]


def test_the_bytes_of_an_event_file_are_a_function_of_the_rows() -> None:
    assert tensorboard_events(ROWS) == tensorboard_events([dict(row) for row in ROWS])
    assert tensorboard_events(ROWS).startswith(tensorboard_events(ROWS[:6]))  # who follows the file need not start again
    assert tensorboard_events(ROWS) != tensorboard_events([*ROWS[:-1], {**ROWS[-1], "loss": 2.0}])


def test_training_time_goes_on_over_restarts(tmp_path: Path) -> None:
    seconds = [1.0, 2.0, 3.0, 0.5, 1.5, 0.25]
    Folder(str(tmp_path)).write(EVENTS, tensorboard_events([{"step": k, "seconds": s} for k, s in enumerate(seconds)]))
    assert [time for time, _, _ in scalars(tmp_path / "tensorboard")["seconds"]] == [1, 2, 3, 3.5, 4.5, 4.75]
    assert scalars(tmp_path / "tensorboard")["seconds"][-1][2] == 0.25


def test_tensorboard_itself_follows_a_run(tmp_path: Path) -> None:
    folder, port = Folder(str(tmp_path / "students/lmm")), free_port()
    folder.write(EVENTS, tensorboard_events(ROWS[:6]))
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--load_fast=false"]
    command += ["--reload_interval=1", "--host=127.0.0.1", f"--port={port}"]

    def shown() -> list[int]:
        address = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run=students/lmm/tensorboard&tag=loss"
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return [step for _, step, _ in json.load(answer)]
        except OSError:
            return []

    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: shown() == STEPS[:6], 60, "TensorBoard to show the rows")
        folder.write(EVENTS, tensorboard_events(ROWS))
        wait_for(lambda: shown() == STEPS, 30, "TensorBoard to show the new rows")
    finally:
        server.kill()
        server.wait()


# Which trackers there are


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(BeelineError, match="'comet' is unknown; expected mlflow or wandb"):
        check_trackers(["comet"])
    assert open_trackers([], run_id="a", name="a", config={}) == []


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()  # what the library leaves where it ran
    (tmp_path / name / "results").touch()
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BeelineError, match=rf"'{name}' is not installed.*pip install --editable '\.\[tracking\]'"):
        check_trackers([name])
    with pytest.raises(BeelineError, match="not installed"):
        open_trackers([name], run_id="a", name="a", config={}, resumed=True)


# MLflow


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of MLflow's file store, which mlflow-skinny supports without a server."""
    pytest.importorskip("mlflow", reason=MISSING)
    for variable, value in tracking.MLFLOW_DEFAULTS.items():
        monkeypatch.setenv(f"MLFLOW_{variable}", value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path / "mlruns"


def mlflow_runs(experiment: str = "beeline") -> dict[str, tuple[Any, dict[str, list[tuple[int, float]]]]]:
    """Return by our run id: MLflow's run, and (step, value) by metric."""
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id]) if found else []
    assert len({run.data.tags[tracking.RUN_TAG] for run in runs}) == len(runs), "a run was started twice"
    points = {
        run.info.run_id: {
            key: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        for run in runs
    }
    return {run.data.tags[tracking.RUN_TAG]: (run, points[run.info.run_id]) for run in runs}


EXPECTED = {key: [(row["step"], float(row[key])) for row in ROWS] for key in ("loss", "lambda", "skipped", "seconds")}


def test_mlflow_gets_every_row_once_over_a_restart(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [tracker] = open_trackers(["mlflow"], run_id="one", name="lmm", config=CONFIG)
    for r in ROWS[:5]:
        tracker.log({**r, "grad_norm": math.nan, "name": "no number"})
    run, points = mlflow_runs()["one"]
    assert points == {key: values[:5] for key, values in EXPECTED.items()}
    assert (run.info.run_name, run.info.status) == ("lmm", "RUNNING")
    assert run.data.params == {
        "student.batch_size": "16",
        "student.optimizer.lr": "0.001",
        "student.optimizer.betas": "[0.9, 0.999]",
        "student.note": "x" * 500,
        "images": "None",
    }
    # Killed after step 25, resumed from a checkpoint at 15; some resources were changed, which the config shows.
    changed = {**CONFIG, "images": 1, "workers": 2}
    [resumed] = open_trackers(["mlflow"], run_id="one", name="lmm", config=changed, resumed=True)
    for r in [*ROWS[:3], *ROWS[3:]]:
        resumed.log(r)
    resumed.close()
    run, points = mlflow_runs()["one"]
    assert points == EXPECTED
    assert run.info.status == "FINISHED"
    assert (run.data.params["images"], run.data.params["workers"]) == ("None", "2")
    assert "mlflow: the run starts" in (told := capsys.readouterr().out)
    assert "mlflow: the run continues after step 25" in told


def test_mlflow_keeps_runs_and_experiments_apart(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run_id in ("one", "two"):
        open_trackers(["mlflow", "mlflow"], run_id=run_id, name="lmm", config={})[0].log(row(5))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    open_trackers(["mlflow"], run_id="one", name="lmm", config={})[0].log(row(10))
    assert {run_id: points["loss"] for run_id, (_, points) in mlflow_runs().items()} == {"one": [(5, 0.2)], "two": [(5, 0.2)]}
    assert mlflow_runs("elsewhere")["one"][1]["loss"] == [(10, 0.1)]


def test_mlflow_that_is_gone_for_a_while_loses_no_row(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [tracker] = open_trackers(["mlflow"], run_id="one", name="lmm", config={})
    for r in ROWS[:2]:
        tracker.log(r)
    store.rename(store.with_name("away"))
    store.touch()
    monkeypatch.setattr(tracking, "RETRY", 0.0)
    for r in ROWS[2:6]:
        tracker.log(r)
    monkeypatch.setattr(tracking, "RETRY", 600.0)
    tracker.log(ROWS[6])
    assert capsys.readouterr().out.count("mlflow failed") == 1
    store.unlink()
    store.with_name("away").rename(store)
    tracker.log(ROWS[7])
    assert mlflow_runs()["one"][1]["loss"] == EXPECTED["loss"][:2]  # it is not yet time for another attempt
    for r in ROWS[8:]:
        tracker.log(r)
    tracker.close()
    run, points = mlflow_runs()["one"]
    assert points == EXPECTED
    assert run.info.status == "FINISHED"


def test_mlflow_that_cannot_be_reached(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{free_port()}")
    with pytest.raises(BeelineError, match=r"Connection refused.*Check the MLFLOW_\* variables") as error:
        open_trackers(["mlflow"], run_id="one", name="lmm", config={})
    assert "secret" not in str(error.value)
    [tracker] = open_trackers(["mlflow"], run_id="one", name="lmm", config={}, resumed=True)
    for r in ROWS:
        tracker.log(r)
    tracker.close()
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert "retrying every 10 minutes" in told
    assert "secret" not in told


# Weights & Biases: its own process, which must not outlive the test, belongs to a training process that can be killed.

TRAINING = """
import json, sys
sys.path.insert(0, {root!r})
from trainers import tracking
tracking.WANDB_WAITS.update(dict.fromkeys(tracking.WANDB_WAITS, {patience}))
[tracker] = tracking.open_trackers(["wandb"], run_id={run_id!r}, name="lmm", config={config!r}, resumed={resumed})
for row in json.loads({rows!r}):
    tracker.log(row)
print("logged", flush=True)
sys.stdin.readline()
tracker.close()
print("closed", flush=True)
"""
RUN_ID = "ab" * 32


class Wandb(ThreadingHTTPServer):
    """The part of W&B's server that a run and its resumption need: `history` holds the rows it received, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.history: list[dict[str, Any]] = []
        self.config: str | None = None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore the broken connections of killed processes."""

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the data of a GraphQL operation."""
        names = {"project": {"name": "beeline", "entity": {"name": "me"}}, "config": self.config or "{}"}
        if operation == "Viewer":
            return {"viewer": {"entity": "me", "username": "me", "flags": "{}"}}
        if operation == "RunResumeStatus":
            tail = [json.dumps(line) for line in self.history[-1:]]
            found = {
                "name": RUN_ID, "summaryMetrics": "{}", "wandbConfig": '{"t": 1}', "tags": [], **names,
                "historyTail": json.dumps(tail), "historyLineCount": len(self.history),
                "eventsTail": "[]", "eventsLineCount": 0, "logLineCount": 0,
            }  # fmt: skip
            return {"model": {"bucket": None if self.config is None else found}}
        if operation == "UpsertBucket":
            assert variables["name"] == RUN_ID
            self.config = variables.get("config") or self.config
            return {"upsertBucket": {"bucket": {"id": "x", "name": RUN_ID, "displayName": "lmm", **names}, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        return {}


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Wandb  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer: dict[str, Any] = {}
        if self.path.startswith("/graphql"):
            asked = json.loads(body)
            answer = {"data": self.server.answer(asked["operationName"], asked.get("variables") or {})}
        elif "file_stream" in self.path:
            body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            if lines := (json.loads(body).get("files") or {}).get("wandb-history.jsonl"):
                self.server.history[lines["offset"] :] = map(json.loads, lines["content"])
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wandb]:
    """A server, and the variables that point to it."""
    pytest.importorskip("wandb", reason=MISSING)
    for variable in [variable for variable in os.environ if variable.startswith("WANDB_")]:
        monkeypatch.delenv(variable)
    with Wandb() as server:
        values = {"API_KEY": "0" * 40, "BASE_URL": server.url, "DIR": str(tmp_path), "ERROR_REPORTING": "false"}
        for variable, value in values.items():
            monkeypatch.setenv(f"WANDB_{variable}", value)
        monkeypatch.setenv("HOME", str(tmp_path))
        yield server
        server.shutdown()


def training(rows: list[dict[str, Any]], *, resumed: bool = False, patience: float = 60) -> subprocess.Popen[str]:
    """A process that has logged these rows, and waits for a line before it closes the tracker."""
    values = {"root": str(ROOT), "run_id": RUN_ID, "config": CONFIG, "resumed": resumed, "patience": patience}
    script = TRAINING.format(rows=json.dumps(rows), **values)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout
    said = []
    for line in process.stdout:
        said.append(line)
        if line == "logged\n":
            return process
    process.communicate()
    raise AssertionError("".join(said))


def close(process: subprocess.Popen[str]) -> str:
    """Let the process close its tracker; return its output."""
    said, _ = process.communicate("\n", timeout=60)
    assert process.returncode == 0, said
    assert "closed" in said
    return said


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL the process, as when a machine is lost."""
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


def points(server: Wandb) -> list[dict[str, float]]:
    """Return the rows on the server, without W&B's own fields."""
    return [{"step": line["_step"], **{k: v for k, v in line.items() if k[0] != "_"}} for line in server.history]


def test_wandb_gets_every_row_once_over_a_restart(server: Wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")  # 15 seconds by default
    process = training([{**r, "grad_norm": math.inf, "name": "no number"} for r in ROWS[:5]])
    wait_for(lambda: len(server.history) == 5, 60, "W&B to send the rows")
    kill(process)
    assert server.config
    assert json.loads(server.config)["student"]["value"] == CONFIG["student"]
    close(training(ROWS, resumed=True))
    assert points(server) == ROWS


def test_wandb_gets_what_a_killed_process_had_not_sent(server: Wandb) -> None:
    kill(training(ROWS[:5]))
    assert len(server.history) < 5
    close(training(ROWS, resumed=True))
    assert points(server) == ROWS


def test_wandb_offline_is_synced_without_doubled_points(server: Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    close(training(ROWS[:5]))
    close(training(ROWS, resumed=True))
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert not server.history
    monkeypatch.delenv("WANDB_MODE")
    command = [sys.executable, "-m", "wandb", "sync", "--yes"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert points(server) == ROWS


def test_wandb_that_is_gone_does_not_end_a_training(server: Wandb) -> None:
    process = training(ROWS, patience=3)
    server.shutdown()
    server.server_close()
    assert "Traceback" not in close(process)
    kill(training(ROWS, resumed=True, patience=1))


def test_wandb_without_a_key_is_refused_at_the_start(server: Wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(AssertionError, match=r"BeelineError: wandb: No API key configured.*Check the WANDB_\* variables"):
        training(ROWS)
