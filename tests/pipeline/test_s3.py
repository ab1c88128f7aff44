"""The pipeline on a real S3 server (OpenStack Swift), through a proxy that injects faults."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest
from harness import ROOT, TINY_PAIRS, Head, files
from s3 import KEY, S3, SECRET, Fault, FaultProxy

from beeline.errors import BeelineError
from pipeline import shards, storage
from pipeline.reader import ShardReader
from pipeline.storage import Folder

pytestmark = pytest.mark.s3


def upload(server: S3, source: Path, uri: str) -> None:
    """Copy a folder to the bucket, past the proxy."""
    server.client().put(f"{source}/", f"{uri.removeprefix('s3://')}/", recursive=True)


@pytest.mark.parametrize(("kind", "times"), [("storm", 3), ("reset", 6), ("lost_ack", 6), ("truncate", 3)])
def test_requests_survive_faults(kind: str, times: int, bucket: Folder, proxy: FaultProxy) -> None:
    before = storage.retries()
    data = np.random.default_rng(0).bytes(3_000_000)
    proxy.faults = [Fault(kind, method="PUT", times=times)]
    bucket.write("file", data)
    assert proxy.faults[0].hits
    if kind != "truncate":  # half of an empty answer is the answer
        assert storage.retries() > before
    for method in ("GET", "HEAD"):
        proxy.faults = [Fault(kind, method=method, times=times)]
        assert bucket.read("file") == data
        assert proxy.faults[0].hits
    proxy.faults = [Fault(kind, method="GET", times=times)]
    assert bucket.sizes() == {"file": len(data)}


def test_a_server_that_hangs_is_asked_again(bucket: Folder, proxy: FaultProxy) -> None:
    bucket.write("file", b"1")
    proxy.faults = [Fault("hang", method="GET")]
    assert bucket.read("file") == b"1"
    proxy.faults = [Fault("hang", method="PUT")]
    bucket.write("file", b"2")
    assert bucket.read("file") == b"2"


def test_a_file_is_one_put(bucket: Folder, proxy: FaultProxy) -> None:
    bucket.write("large", bytes(120 * 2**20))
    assert [method for method, path, _ in proxy.log if "large" in path] == ["PUT"]
    assert bucket.sizes() == {"large": 120 * 2**20}


def test_a_bit_that_flips_on_the_way_is_read_again_and_on_the_disk_is_damage(bucket: Folder, proxy: FaultProxy) -> None:
    plan = {"pairs": {"count": 300, "shard_size": 100, "seed": 3}}
    x1 = np.random.default_rng(0).normal(size=(300, 3, 16, 16)).astype(np.float16)
    for k in range(3):
        rows = shards.shard_rows(k, 100, 300)
        bucket.write(shards.shard_name(k), shards.encode("x1", x1[rows], np.zeros(100, np.int32), rows, plan))
    reader = ShardReader(bucket, plan["pairs"], seed=0)
    proxy.faults = [Fault("flip", method="GET", path="part-00001")]
    batch = reader.batch(0, 300)
    np.testing.assert_array_equal(batch["x1"], x1[batch["index"]].astype(np.float32))
    proxy.faults = [Fault("flip", method="GET", path="part-00001", times=-1)]
    with pytest.raises(BeelineError, match=r"part-00001\.parquet is damaged"):
        ShardReader(bucket, plan["pairs"], seed=1).batch(0, 300)


@pytest.mark.parametrize(
    ("what", "variables", "uri", "said"),
    [
        ("secret", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "s3://bucket/ws", "cannot be read"),
        ("bucket", {}, "s3://no-such-bucket/ws", "bucket does not exist"),
        ("read-only", {}, "s3://bucket/read-only", "cannot be written"),
        ("in-the-uri", {}, "s3://KEY:topsecret@bucket/ws", "holds a password inside a URL"),
    ],
)
def test_what_is_wrong_with_a_bucket_is_said(
    what: str, variables: dict[str, str], uri: str, said: str, bucket: Folder, proxy: FaultProxy, head: Head
) -> None:
    if what == "read-only":
        proxy.faults = [Fault("forbid", method="PUT", times=-1)]
    done = subprocess.run(
        [sys.executable, "pipeline/ingest_images.py", "digits", "--workspace", uri],
        cwd=ROOT, env=head.environment() | proxy.s3.variables() | variables, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "topsecret" not in done.stdout + done.stderr


@pytest.fixture
def workspace(server: S3, bucket: Folder, trained: Path, tmp_path: Path) -> Folder:
    """The session's images and teacher on S3, without its pairs."""
    local = tmp_path / "ws"
    shutil.copytree(trained, local, ignore=shutil.ignore_patterns("pairs", "checkpoints"))
    upload(server, local, bucket.uri)
    return bucket


@pytest.fixture
def gen_pairs(head: Head, proxy: FaultProxy, workspace: Folder) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "pipeline/gen_pairs.py", "digits", "--workspace", workspace.uri, *TINY_PAIRS, *arguments],
            cwd=ROOT, env=head.environment() | proxy.s3.variables(), capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    return run


def test_pairs_on_s3_are_those_on_disk_whatever_the_network_does(
    gen_pairs: Callable[..., subprocess.CompletedProcess[str]], workspace: Folder, proxy: FaultProxy, trained: Path
) -> None:
    proxy.faults = [
        Fault("storm", times=-1, chance=0.1, seed=1),
        Fault("reset", times=-1, chance=0.05, seed=2),
        Fault("lost_ack", method="PUT", times=-1, chance=0.2, seed=3),
        Fault("truncate", method="GET", times=-1, chance=0.05, seed=4),
    ]
    done = gen_pairs()
    assert done.returncode == 0, done.stdout + done.stderr
    hits = {fault.kind: fault.hits for fault in proxy.faults}
    assert sum(hits.values()) > 5, hits
    proxy.faults = []
    names = [shards.shard_name(k) for k in range(6)]
    assert {name: (workspace / "pairs").read(name) for name in names} == files(trained / "pairs", "part-*")
    assert SECRET not in done.stdout + done.stderr
    assert KEY not in done.stdout + done.stderr


def test_a_corrupt_shard_on_s3_is_found_and_made_again(
    gen_pairs: Callable[..., subprocess.CompletedProcess[str]], workspace: Folder, server: S3, trained: Path
) -> None:
    assert gen_pairs().returncode == 0
    pairs, client = workspace / "pairs", server.client()
    whole = pairs.read("part-00002.parquet")
    client.pipe_file(f"{pairs.uri}/part-00002.parquet", whole[:-100])
    client.rm_file(f"{pairs.uri}/part-00004.parquet")
    again = gen_pairs()
    assert again.returncode == 0, again.stderr
    assert "part-00002.parquet: unreadable" in again.stdout
    assert "4 of 6 shards exist" in again.stdout
    assert {k: pairs.read(k) for k in pairs.sizes() if k.startswith("part")} == files(trained / "pairs", "part-*")
    other = gen_pairs("--pairs.seed", "7")
    assert other.returncode == 1
    assert "pairs.seed: 0 there, 7 asked for" in other.stderr
    assert pairs.read("part-00002.parquet") == whole


def test_arrow_writes_nothing_by_itself(bucket: Folder) -> None:
    """Reading through pyarrow must not create marker objects for folders."""
    assert bucket.sizes() == {}
    with pytest.raises(FileNotFoundError):
        bucket.open("nothing")
    assert isinstance(bucket.arrow()[0], pyarrow.fs.S3FileSystem)
    assert bucket.sizes() == {}
