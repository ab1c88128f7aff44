"""Tools for tests of commands: settings that make them small, the Ray head they run on, and waiting."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import psutil
import pytest
import tyro

from beeline import entry

ROOT = Path(__file__).parent.parent
# Settings that make every stage of the recipe take seconds.
TINY_TEACHER = [
    "--teacher.iterations", "40",
    "--teacher.batch-size", "32",
    "--teacher.checkpoint-every", "10",
    "--teacher.log-every", "5",
]  # fmt: skip
LINES, ADVERSARIAL, FRECHET = (f"--student.phases.{name}" for name in ("reconstruction", "adversarial", "frechet"))
"""Phases of the main student."""
TINY_LMM = [
    f"{LINES}.iterations", "40",
    f"{ADVERSARIAL}.iterations", "40",
    f"{FRECHET}.iterations", "0",
    "--student.batch-size", "16",
    "--student.checkpoint-every", "10",
    "--student.log-every", "5",
    f"{LINES}.objective.num-steps", "6",
    f"{ADVERSARIAL}.objective.num-steps", "6",
]  # fmt: skip
TWO_RANKS = ("--student.workers.count", "2")
S3_KEYS = {"AWS_ACCESS_KEY_ID": "test:tester", "AWS_SECRET_ACCESS_KEY": "testing"}  # of the tests' own server
TINY_PAIRS = [
    "--pairs.count", "300",
    "--pairs.shard-size", "50",
    "--pairs.batch-size", "25",
]  # fmt: skip


def free_port() -> int:
    """Return a free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclasses.dataclass
class Head:
    """A Ray head node in a separate process."""

    address: str
    dashboard: str
    folder: str
    process: subprocess.Popen[bytes]

    def environment(self) -> dict[str, str]:
        """Return the environment that a command needs to join the head."""
        return {**os.environ, "RAY_ADDRESS": self.address, "PYTHONUNBUFFERED": "1"}

    def job(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `ray job COMMAND` with the head's token."""
        ray = Path(sys.executable).parent / "ray"
        environment = {key: value for key, value in self.environment().items() if key != "RAY_ADDRESS"}
        return subprocess.run(
            [str(ray), "job", command, "--address", self.dashboard, *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    def submit(self, *entrypoint: str | Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run `ray job submit` with a command of the project, as documented."""
        return self.job("submit", "--working-dir", ".", *options, "--", sys.executable, *map(str, entrypoint))

    def workers(self, name: str) -> list[psutil.Process]:
        """List the processes of this head's actors with `name` in their title; its raylet is their parent."""
        named = [p for p in psutil.process_iter() if name in _title(p)]
        return [p for p in named if (parent := p.parent()) and self.folder in _title(parent)]

    def left_over(self) -> tuple[list[str], list[str]]:
        """List placement groups and classes of actors that still exist, by the State API. Ray Data's services, one each per
        cluster, belong to no command."""
        program = (
            "import json; from ray.util.state import list_actors, list_placement_groups; "
            "groups = [g.placement_group_id for g in list_placement_groups() if g.state != 'REMOVED']; "
            "actors = [a.class_name for a in list_actors() if a.state != 'DEAD']; print(json.dumps([groups, actors]))"
        )
        environment = self.environment() | {"RAY_ADDRESS": self.dashboard}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        groups, actors = json.loads(done.stdout.splitlines()[-1])
        return groups, [name for name in actors if not name.startswith("_") and name != "ActorLocationTracker"]

    def session(self) -> str:
        """Return Ray's name for this head's session."""
        return (Path(self.folder) / "session_latest").resolve().name

    def series(self) -> list[tuple[str, dict[str, str], float]]:
        """Read this head's Prometheus series: names, labels and values. The second head on a machine has no port for its
        dashboard's own series, and would return the first one's."""
        discovery, session = Path(self.folder) / "prom_metrics_service_discovery.json", self.session()
        found = []
        for target in json.loads(discovery.read_text())[0]["targets"] if discovery.exists() else []:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                for line in answer.read().decode().splitlines():
                    if line and not line.startswith("#"):
                        series, value = line.rsplit(" ", 1)
                        labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', series))
                        if labels.get("SessionName") == session:
                            found.append((series.split("{")[0], labels, float(value)))
        return found

    def metrics(self) -> dict[str, float]:
        """Sum those series over their labels."""
        sums: dict[str, float] = {}
        for name, _, value in self.series():
            sums[name] = sums.get(name, 0.0) + value
        return sums


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


Run = Callable[..., subprocess.CompletedProcess[str]]


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    """Return names and contents of matching files in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def listening(processes: list[psutil.Process]) -> set[str]:
    """List the addresses at which processes listen."""
    found = set()
    for process in processes:
        try:
            found |= {place.laddr.ip for place in process.net_connections("inet") if place.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


class Parsed(Exception):
    """Raised once a command's options are parsed, before anything runs."""


def parse_command(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse ["python", "pipeline/gen_pairs.py", "digits", ...] or ["python", "-m", "beeline.weights", ...] in this process,
    without running it. Raises AssertionError if it is not a command of the project, or if it refuses its options."""
    cli, parse_args = tyro.cli, argparse.ArgumentParser.parse_args

    def stopped(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        def stop(*_: Any, **__: Any) -> None:
            raise Parsed

        stage = functools.partial(functools.wraps(call.func)(stop), **call.keywords) if _is_partial(call) else None
        cli(stage or functools.wraps(call)(stop), *arguments, **options)

    def parsed(self: argparse.ArgumentParser, *arguments: Any) -> None:
        parse_args(self, *arguments)
        raise Parsed

    monkeypatch.setenv("BEELINE_RECIPE", os.environ.get("BEELINE_RECIPE", ""))  # commands set it
    monkeypatch.setattr(entry, "_handle", lambda handler: None)  # Ctrl-C is for pytest
    monkeypatch.setattr(tyro, "cli", stopped)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    module = words[1] == "-m"
    name, arguments = (words[2], words[3:]) if module else (words[1], words[2:])
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        runpy.run_module(name, run_name="__main__") if module else runpy.run_path(str(ROOT / name), run_name="__main__")
    except Parsed:
        return
    except SystemExit as end:
        raise AssertionError(f"{' '.join(words)} ended with status {end.code} before anything was run") from end
    raise AssertionError(f"{' '.join(words)} took its options without parsing them")


def _is_partial(call: Any) -> TypeGuard[functools.partial[Any]]:
    return isinstance(call, functools.partial)
