"""Everything is killed, in any order, and the pairs equal those of an undisturbed run, byte for byte."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from harness import ROOT, Head, Run, files, wait_for
from ray.cluster_utils import Cluster
from s3 import S3, Fault, FaultProxy

from pipeline.storage import Folder

pytestmark = pytest.mark.slow
SETTINGS = ["--pairs.count", "1500", "--pairs.shard-size", "25", "--pairs.batch-size", "25"]
SHARDS, KILLS = 60, 20


@pytest.fixture(scope="module")
def undisturbed(run: Run, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of an undisturbed run on local disk."""
    workspace = tmp_path_factory.mktemp("undisturbed") / "ws"
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("pairs"))
    run("pipeline/gen_pairs.py", "digits", "--workspace", workspace, *SETTINGS)
    shards = files(workspace / "pairs", "part-*")
    assert len(shards) == SHARDS
    return shards


@pytest.mark.s3
def test_twenty_kills_on_s3_through_faults(
    undisturbed: dict[str, bytes], trained: Path, bucket: Folder, server: S3, proxy: FaultProxy, head: Head, tmp_path: Path
) -> None:
    """Drivers and actors are killed at random moments, shards removed and cut, while the network misbehaves."""
    chance = random.Random(4)
    local = tmp_path / "ws"
    shutil.copytree(trained, local, ignore=shutil.ignore_patterns("pairs", "checkpoints"))
    client, pairs = server.client(), bucket / "pairs"
    client.put(f"{local}/", f"{bucket.uri.removeprefix('s3://')}/", recursive=True)
    proxy.faults = [
        Fault("storm", times=-1, chance=0.03, seed=1),
        Fault("reset", times=-1, chance=0.03, seed=2),
        Fault("lost_ack", method="PUT", times=-1, chance=0.1, seed=3),
    ]
    command = [sys.executable, "pipeline/gen_pairs.py", "digits", "--workspace", bucket.uri, *SETTINGS]

    def start() -> subprocess.Popen[bytes]:
        with open(tmp_path / "log", "ab") as log:
            environment = head.environment() | proxy.s3.variables()
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def shards() -> list[str]:
        return [name for name in pairs.sizes() if name.startswith("part-")]

    def moment(process: subprocess.Popen[bytes], count: int) -> Callable[[], bool]:
        return lambda: len(shards()) >= count or process.poll() is not None

    kills: list[str] = []
    process = start()
    while len(kills) < KILLS:
        time.sleep(chance.uniform(0, 1))
        wait_for(moment(process, len(shards()) + chance.randint(0, 2)), 240, "a moment to strike")
        victim = chance.choice(["driver", "actor", "actors"])
        if process.poll() is None and victim == "driver":
            process.kill()
            kills.append(victim)
        elif process.poll() is None and (actors := head.workers("MapWorker")):
            for actor in actors if victim == "actors" else actors[:1]:
                actor.send_signal(signal.SIGKILL)
            kills.append(victim)
        if process.poll() is not None or victim == "driver":
            assert process.wait() in (0, -signal.SIGKILL), (tmp_path / "log").read_text()[-4000:]
            names = shards()  # listed once: actors of a killed driver may still publish
            for name in chance.sample(names, min(8, len(names))):  # damage, so that work is left
                if chance.random() < 0.3:
                    client.pipe_file(f"{pairs.uri}/{name}", client.cat_file(f"{pairs.uri}/{name}")[:-10])
                else:
                    client.rm_file(f"{pairs.uri}/{name}")
            process = start()
    assert process.wait(400) == 0, (tmp_path / "log").read_text()[-4000:]
    assert len(set(kills)) == 3, kills
    assert sum(fault.hits for fault in proxy.faults) > 20
    proxy.faults = []
    final = subprocess.run(command, cwd=ROOT, env=head.environment() | proxy.s3.variables(), capture_output=True, text=True)
    assert "already complete" in final.stdout, final.stdout + final.stderr
    assert {name: pairs.read(name) for name in shards()} == undisturbed


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A separate cluster: a head without GPUs, to which nodes with one (as Ray is told) are added."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 150 * 2**20})
    yield cluster
    cluster.shutdown()


def test_nodes_come_and_go(undisturbed: dict[str, bytes], trained: Path, cluster: Cluster, head: Head, tmp_path: Path) -> None:
    """The pool uses nodes that join during the run; nodes that vanish only cost their shards in flight."""
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("pairs"))

    def add() -> object:
        return cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=150 * 2**20)

    def published() -> int:
        return len(files(workspace / "pairs", "part-*.parquet"))

    first = add()
    pool = ["--pairs.max-actors", "4", "--pairs.gpus", "1", "--pairs.cpus", "0.1"]
    process = subprocess.Popen(
        [sys.executable, "pipeline/gen_pairs.py", "digits", "--workspace", str(workspace), *SETTINGS, *pool],
        cwd=ROOT, env=head.environment() | {"RAY_ADDRESS": str(cluster.address)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for(lambda: published() >= 2 or process.poll() is not None, 120, "shards from the first node")
    second = add()
    wait_for(lambda: published() >= 20 or process.poll() is not None, 120, "shards from both")
    assert process.poll() is None, "the run was over before a node could be removed"
    cluster.remove_node(first, allow_graceful=False)
    add()
    wait_for(lambda: published() >= 40 or process.poll() is not None, 120, "shards from those that are left")
    cluster.remove_node(second, allow_graceful=False)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()[-4000:]
    assert files(workspace / "pairs", "part-*") == undisturbed
    nodes = pq.read_table(workspace / "pairs" / "manifest.parquet")["node"].to_pylist()
    assert len(set(nodes)) == 3, nodes
