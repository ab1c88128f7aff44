"""Training under faults: a failing bucket, machines that leave with and without notice, diverging weights."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT, TINY_LMM, TWO_RANKS, Head, Run, files, wait_for
from ray.cluster_utils import Cluster
from s3 import Fault, FaultProxy

from pipeline.storage import Folder
from trainers import checkpoints
from trainers.log import read_log

KD = [
    "--student", "kd",
    "--student.phases.training.iterations", "600",
    "--student.batch-size", "16",
    "--student.checkpoint-every", "100",
    "--student.log-every", "50",
    *TWO_RANKS,
]  # fmt: skip
# Ray's own patience, shortened: between looks for machines that leave, and before it goes on with fewer.
IMPATIENT = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}


@pytest.mark.s3
def test_checkpoints_in_a_bucket_with_faults(
    head: Head, proxy: FaultProxy, bucket: Folder, trained: Path, undisturbed: Path
) -> None:
    """Every third request for a checkpoint fails, and a rank is killed in each phase; the weights equal those of a local
    run."""
    proxy.behind.client().put(f"{trained}/", f"{bucket.uri.removeprefix('s3://')}/", recursive=True)
    proxy.faults = [
        Fault("storm", path="checkpoints", times=-1, chance=0.3),
        Fault("lost_ack", method="PUT", path="checkpoints", times=5, chance=0.3, seed=1),
    ]
    process = subprocess.Popen(
        [sys.executable, "trainers/train_lmm.py", "digits", "--workspace", bucket.uri, *TINY_LMM, *TWO_RANKS],
        cwd=ROOT, env=head.environment() | proxy.s3.variables(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    student = bucket / "students/lmm"
    for step in (20, 60):
        wait_for(lambda s=step: s in checkpoints.steps(student) or process.poll() is not None, 300, f"checkpoint {step}")
        ranks = head.workers("RayTrainWorker")
        assert ranks, "the run was over before it could be disturbed"
        ranks[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()[-4000:]
    assert sum(fault.hits for fault in proxy.faults) > 10
    assert output.count(b"resumed at step") == 2
    for name in ("students/lmm", "students/lmm/reconstruction"):
        assert (bucket / name).read("model.safetensors") == files(undisturbed / name, "*.safetensors")["model.safetensors"]
    assert checkpoints.steps(student) == [60, 70]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that runs no ranks, and two machines with room for one each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
    for _ in range(2):
        add(cluster)
    yield cluster
    cluster.shutdown()


def add(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)


def begin(head: Head, cluster: Cluster, workspace: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start the student on the cluster, and wait until it runs."""
    environment = head.environment() | {"RAY_ADDRESS": str(cluster.address)} | IMPATIENT
    process = subprocess.Popen(
        [sys.executable, "trainers/train_lmm.py", "digits_methods", "--workspace", str(workspace), *KD, *more],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    folder = Folder(str(workspace / "students/kd"))
    wait_for(lambda: bool(checkpoints.steps(folder)) or process.poll() is not None, 240, "a checkpoint")
    assert process.poll() is None, "the run was over before it could be disturbed"
    return process


def test_a_machine_that_leaves_with_notice_costs_no_step(
    head: Head, run: Run, cluster: Cluster, trained: Path, tmp_path: Path
) -> None:
    undisturbed, workspace = tmp_path / "undisturbed", tmp_path / "ws"
    for place in (undisturbed, workspace):
        shutil.copytree(trained, place)
    run("trainers/train_lmm.py", "digits_methods", "--workspace", undisturbed, *KD)
    process = begin(head, cluster, workspace)
    victim = sorted(cluster.worker_nodes, key=lambda node: node.node_id)[0]
    subprocess.run(
        [
            str(Path(sys.executable).parent / "ray"), "drain-node", f"--address={cluster.address}",
            f"--node-id={victim.node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=reclaimed",
            "--deadline-remaining-seconds=60",
        ],
        env=head.environment(), check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    add(cluster)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output[-4000:]
    left = re.search(r"about to leave; checkpoint at step (\d+)", output)
    resumed = re.findall(r"resumed at step (\d+) of", output)
    assert left, output[-4000:]
    assert resumed == [left[1]]
    ours, theirs = (files(place / "students/kd", "model.safetensors") for place in (workspace, undisturbed))
    assert ours == theirs


def test_training_goes_on_with_fewer_machines(head: Head, cluster: Cluster, trained: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace)
    process = begin(head, cluster, workspace, "--student.workers.min-count", "1")
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    output = process.communicate(timeout=400)[0].decode()
    assert process.returncode == 0, output[-4000:]
    assert "resumed at step" in output
    assert read_log(Folder(str(workspace / "students/kd")))[-1]["step"] == 600
    assert (workspace / "students/kd/_SUCCESS").exists()


def test_weights_that_diverge_end_the_run_with_one_message(run: Run, trained: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace)
    done = run(
        "trainers/train_lmm.py", "digits_methods", "--workspace", workspace, "--student", "kd", "--student.batch-size", "16",
        "--student.phases.training.iterations", "300", "--student.phases.training.optimizer.lr", "1e30",
        "--student.phases.training.optimizer.warmup", "0", ok=False,
    )  # fmt: skip
    assert re.search("^error: kd: the gradients of 100 steps in a row", done.stderr, re.MULTILINE)
    assert done.stderr.count("error: ") == 1
    assert "training function" not in done.stderr + done.stdout  # where Ray Train shows a traceback
    assert "resumed" not in done.stdout
