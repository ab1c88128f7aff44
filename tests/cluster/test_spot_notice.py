"""A cloud's notice reaches Ray: exactly the node of the leaving machine is drained, a real node of the session's head."""

from __future__ import annotations

import contextlib
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from harness import ROOT, Head, wait_for
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]

from cluster import spot_notice

IP = "127.0.0.2"  # another machine, as far as Ray can tell


class Metadata(ThreadingHTTPServer):
    """An instance metadata service, version 2: it does not answer without a token."""

    def __init__(self, life_cycle: str = "spot") -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.items = {"instance-life-cycle": life_cycle}
        self.looks, self.faults = 0, {4, 5, 6}


class _Answer(BaseHTTPRequestHandler):
    server: Metadata  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_PUT(self) -> None:
        wanted = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200 if wanted else 400, "secret")

    def do_GET(self) -> None:
        item = self.path.removeprefix("/latest/meta-data/")
        self.server.looks += 1
        if self.headers["X-aws-ec2-metadata-token"] != "secret":
            self.answer(401)
        elif self.server.looks in self.server.faults:
            self.answer(503)
        else:
            self.answer(200 if item in self.server.items else 404, self.server.items.get(item, ""))

    def answer(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def nodes(head: Head) -> dict[str, Any]:
    """List the nodes that the head knows, by id, including those that have left."""
    return {node.node_id.hex(): node for node in GcsClient(address=head.address).get_all_node_info(timeout=10).values()}


@pytest.fixture
def node(head: Head) -> Iterator[str]:
    """Start a second node in a separate process; return its id."""
    ray = Path(sys.executable).parent / "ray"
    with tempfile.TemporaryDirectory(prefix="bl", dir="/tmp", ignore_cleanup_errors=True) as folder:
        log = open(Path(folder) / "node.log", "wb")  # noqa: SIM115
        process = subprocess.Popen(
            [
                str(ray), "start", "--block", f"--address={head.address}", f"--node-ip-address={IP}", f"--temp-dir={folder}",
                "--num-cpus=0", "--object-store-memory=80000000", "--min-worker-port=21000", "--max-worker-port=21100",
                "--dashboard-agent-listen-port=0",
            ],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            wait_for(lambda: bool(spot_notice.own_nodes(head.address, IP)), 60, "the node")
            yield spot_notice.own_nodes(head.address, IP)[0]
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            log.close()


@contextlib.contextmanager
def command(head: Head, *options: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "cluster/spot_notice.py", "--node-ip", IP, *options],
        cwd=ROOT, env=head.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def drained(head: Head, node: str) -> None:
    """Assert that `node` leaves as preempted, and that the head stays."""
    wait_for(lambda: not spot_notice.own_nodes(head.address, IP), 30, "the node to leave")
    death = nodes(head)[node].death_info
    assert (death.Reason.Name(death.reason), death.reason_message) == ("AUTOSCALER_DRAIN_PREEMPTED", "spot")
    assert [other.is_head_node for other in nodes(head).values() if other.state == 0] == [True]


def test_a_notice_drains_this_node_alone(head: Head, node: str, metadata: Metadata) -> None:
    with command(head, "--imds", metadata.url, "--interval", "0.1", "--margin", "20") as process:
        wait_for(lambda: metadata.looks >= 12 or process.poll() is not None, 30, "looks")
        assert spot_notice.own_nodes(head.address, IP) == [node], "drained without a notice"
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=120)
        metadata.items["spot/instance-action"] = json.dumps({"action": "terminate", "time": f"{end:%Y-%m-%dT%H:%M:%SZ}"})
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert output.count("503") == 1, "a failure is told once"
    left = int(output.split(f"draining node {node}: ")[1].split(" s left")[0])
    assert 90 < left <= 100
    drained(head, node)


def test_a_pod_that_must_go_waits_until_its_node_is_empty(head: Head, node: str) -> None:
    with command(head, "--now", "40") as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert f"draining node {node}: 40 s left" in output
    assert not spot_notice.own_nodes(head.address, IP), "it did not wait"
    drained(head, node)
    spot_notice.leave(head.address, IP, 40)  # the autoscaler drains idle pods itself, before their hook runs


def test_an_on_demand_machine_is_not_watched(metadata: Metadata, capsys: pytest.CaptureFixture[str]) -> None:
    metadata.items["instance-life-cycle"] = "on-demand"
    spot_notice.watch(metadata.url, "127.0.0.1:1", IP, interval=0.01, margin=15)
    assert "gets no notice" in capsys.readouterr().out


def test_the_deadline_is_never_in_the_past() -> None:
    notice = json.dumps({"action": "stop", "time": "2020-01-01T00:00:00Z"})
    assert spot_notice.seconds_left(notice, margin=15) == 1
