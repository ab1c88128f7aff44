"""Session fixtures: one Ray head, an S3 server behind a proxy that injects faults, and a small trained workspace. All run on
loopback, and commands run as processes, like those of users."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness import ROOT, S3_KEYS, TINY_PAIRS, TINY_TEACHER, Head, Run, free_port
from s3 import S3, FaultProxy, forget, swift

from pipeline.storage import Folder


def pytest_configure() -> None:
    """Make every Ray of the tests require a token, and give it to every command. Commands handle Ctrl-C even if a shell runs
    the tests in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """Start a head node with 4 logical CPUs and a dashboard; end it by its process id."""
    address, dashboard = f"127.0.0.1:{free_port()}", free_port()
    with tempfile.TemporaryDirectory(prefix="bl", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={address.split(':')[1]}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
            "--num-cpus=4", "--object-store-memory=200000000", f"--temp-dir={folder}", "--disable-usage-stats",
            "--dashboard-agent-listen-port=0",  # at its default the second head on a machine never starts a job
        ]  # fmt: skip
        environment = {**os.environ, "RAY_TRAIN_ENABLE_PRINT_PATCH": "0", **S3_KEYS}
        log = open(Path(folder) / "head.log", "wb")  # noqa: SIM115
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None, (Path(folder) / "head.log").read_text()
            with socket.socket() as one, socket.socket() as other:
                if not one.connect_ex(("127.0.0.1", dashboard)) and not other.connect_ex(
                    ("127.0.0.1", int(address.split(":")[1]))
                ):
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


@pytest.fixture(scope="session")
def run(head: Head) -> Run:
    """Run a command of the project on the session's Ray; with `ok=False` it must fail."""

    def call(
        script: str, *arguments: str, ok: bool = True, timeout: int = 600, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, ROOT / script, *map(str, arguments)],
            cwd=cwd, env=head.environment(), capture_output=True, text=True, timeout=timeout,
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


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with swift(tmp_path_factory.mktemp("swift")) as server:
        client = server.client()
        client.mkdir("bucket")
        yield server


@pytest.fixture(scope="session")
def proxy(server: S3) -> Iterator[FaultProxy]:
    proxy = FaultProxy(server)
    yield proxy
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture
def bucket(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Folder]:
    """A separate prefix for each test, as this process sees it through the proxy."""
    for name, value in proxy.s3.variables().items():
        monkeypatch.setenv(name, value)
    forget()
    proxy.faults, proxy.log = [], []
    yield Folder(f"s3://bucket/{re.sub('[^0-9A-Za-z_-]+', '-', request.node.name)}")
    proxy.faults = []
    forget()
