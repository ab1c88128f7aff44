"""One Ray head for the whole session, on loopback; commands run against it as their users run them: as processes."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
# Settings that make every stage of the recipe take seconds.
TINY_TEACHER = [
    "--teacher.iterations", "40",
    "--teacher.batch-size", "32",
    "--teacher.checkpoint-every", "10",
    "--teacher.log-every", "5",
]  # fmt: skip
TINY_PAIRS = [
    "--pairs.count", "300",
    "--pairs.shard-size", "50",
    "--pairs.batch-size", "25",
]  # fmt: skip


def free_port() -> int:
    """A port of loopback that nobody uses right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclasses.dataclass
class Head:
    """A Ray head node in a process of its own."""

    address: str
    dashboard: str
    folder: str
    process: subprocess.Popen[bytes]

    def environment(self) -> dict[str, str]:
        """What a command needs to join it."""
        return {**os.environ, "RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"}

    def workers(self, name: str) -> list[psutil.Process]:
        """The processes of this head's actors whose title has `name` in it: its raylet is their parent."""
        named = [p for p in psutil.process_iter() if name in _title(p)]
        return [p for p in named if (parent := p.parent()) and self.folder in _title(parent)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """A head node with 4 logical CPUs and a dashboard, ended by its process id."""
    address, dashboard = f"127.0.0.1:{free_port()}", free_port()
    with tempfile.TemporaryDirectory(prefix="bl", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={address.split(':')[1]}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
            "--num-cpus=4", "--object-store-memory=200000000", f"--temp-dir={folder}", "--disable-usage-stats",
        ]  # fmt: skip
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
        log = open(Path(folder) / "head.log", "wb")  # noqa: SIM115
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None, (Path(folder) / "head.log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            assert time.monotonic() < deadline, "the head node did not come up"
            time.sleep(0.2)
        try:
            yield Head(address, f"http://127.0.0.1:{dashboard}", folder, process)
        finally:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            for child in children:
                if child.is_running():
                    child.kill()


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run(head: Head) -> Run:
    """Run a command of the project on the session's Ray; `ok=False` where it is meant to fail."""

    def call(script: str, *arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, script, *map(str, arguments)],
            cwd=ROOT, env=head.environment(), capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert (done.returncode == 0) == ok, done.stdout[-4000:] + done.stderr[-4000:]
        return done

    return call


@pytest.fixture(scope="session")
def trained(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with images, probes, a barely trained teacher and 300 pairs. Copy it before changing it."""
    workspace = tmp_path_factory.mktemp("trained") / "ws"
    place = ("digits", "--workspace", workspace)
    run("pipeline/ingest_images.py", *place)
    run("trainers/train_probe.py", *place, "--probe.iterations", "150")
    run("trainers/train_teacher.py", *place, *TINY_TEACHER, "--teacher.workers.count", "1")
    run("pipeline/gen_pairs.py", *place, *TINY_PAIRS)
    return workspace


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    """Names and contents of the files of a folder that match."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)
