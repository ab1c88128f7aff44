"""Ray's own autoscaler on one machine: waiting shards start nodes, a lost node costs its shards in flight, idle nodes stop."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from harness import ROOT, Run, files, free_port, wait_for

PAIRS = ["--pairs.count", "2400", "--pairs.shard-size", "30", "--pairs.batch-size", "30"]
EMPTY_LISTS = (
    *("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands"),
    *("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
)


class Cluster:
    """A head without CPUs whose autoscaler may start two nodes of two CPUs (local_nodes.py)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, f"127.0.0.1:{free_port()}"
        config = {
            "cluster_name": "local",
            "max_workers": 2,
            "idle_timeout_minutes": 0.1,
            "upscaling_speed": 10,
            "provider": {
                "type": "external",
                "module": "local_nodes.LocalNodes",
                "address": self.address,
                "folder": str(folder),
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "auth": {"ssh_user": "nobody"},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            "head_node_type": "head",
            "available_node_types": {
                "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
            },
            **{name: [] for name in EMPTY_LISTS},
        }
        (folder / "autoscaling.yaml").write_text(yaml.safe_dump(config))
        self.environment = {
            **os.environ, "RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "PYTHONUNBUFFERED": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1", "PYTHONPATH": str(Path(__file__).parent),
        }  # fmt: skip
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={self.address.split(':')[1]}", f"--dashboard-port={free_port()}", "--num-cpus=0", f"--temp-dir={folder}",
            "--object-store-memory=100000000", "--disable-usage-stats", f"--autoscaling-config={folder}/autoscaling.yaml",
            "--dashboard-agent-listen-port=0",
        ]  # fmt: skip
        with open(folder / "head.log", "wb") as log:
            self.head = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        wait_for(lambda: "Ray runtime started" in (folder / "head.log").read_text(), 90, "the head")

    def nodes(self) -> list[psutil.Process]:
        """List the processes of the running nodes."""
        found = []
        for path in self.folder.glob("127.*.json"):
            try:
                process = psutil.Process(json.loads(path.read_text())["pid"])
            except (psutil.NoSuchProcess, json.JSONDecodeError):
                continue
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def started(self) -> int:
        """Count the nodes that have ever started."""
        return sum("Ray runtime started" in path.read_text() for path in self.folder.glob("127.*.log"))

    def end(self) -> None:
        """End the started processes by their ids: the head first, because its autoscaler might start more."""
        _end([psutil.Process(self.head.pid)])
        self.head.wait()
        _end(self.nodes())


def _end(processes: list[psutil.Process]) -> None:
    everything = [child for process in processes for child in process.children(recursive=True)] + processes
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in psutil.wait_procs(everything, timeout=10)[1]:
        process.kill()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="bla", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Cluster(Path(folder))
        try:
            yield made
        finally:
            made.end()


def test_nodes_come_and_go_with_the_work(cluster: Cluster, run: Run, trained: Path, tmp_path: Path) -> None:
    ours, plain = (
        Path(shutil.copytree(trained, tmp_path / name, ignore=shutil.ignore_patterns("pairs"))) for name in ("ours", "plain")
    )
    command = ["pipeline/gen_pairs.py", "digits", *PAIRS, "--pairs.max-actors", "4", "--pairs.cpus", "1"]
    run(*command, "--workspace", plain)
    assert cluster.started() == 0  # no work, no node
    environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
    with open(tmp_path / "driver.log", "wb") as log:
        driver = subprocess.Popen(
            [sys.executable, *command, "--workspace", str(ours)], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    said = (tmp_path / "driver.log").read_text
    shards = functools.partial((ours / "pairs").glob, "part-*.parquet")
    wait_for(lambda: driver.poll() is not None or len(list(shards())) >= 6, 120, "some shards")
    assert driver.poll() is None, said()
    there = {path: path.stat().st_mtime_ns for path in shards()}
    lost = cluster.nodes()[0]
    for process in [*lost.children(recursive=True), lost]:
        process.kill()
    assert driver.wait(240) == 0, said()
    assert cluster.started() >= 2  # another has come, before or in the lost one's place
    assert files(ours / "pairs", "part-*") == files(plain / "pairs", "part-*")
    remade = [path for path, time in there.items() if path.stat().st_mtime_ns != time]
    assert len(remade) <= 1  # one that was published, and not yet reported, when its machine was lost
    assert len(set(pq.read_table(ours / "pairs/manifest.parquet")["node"].to_pylist())) >= 2
    wait_for(lambda: not cluster.nodes(), 90, "idle nodes to be taken down")
