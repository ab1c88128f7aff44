"""verify_pairs.py finds the problems of a store, and removed shards are made again."""

from __future__ import annotations

import io
import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from harness import TINY_PAIRS, Run, files
from PIL import Image

import beeline
from beeline.checkpoint import dump
from pipeline.shards import shard_name
from pipeline.storage import Folder
from pipeline.verify_pairs import CheckShards


@pytest.fixture
def workspace(trained: Path, tmp_path: Path) -> Path:
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace)
    return workspace


def test_a_sound_store(run: Run, workspace: Path) -> None:
    done = run(
        "pipeline/verify_pairs.py", "digits", "--workspace", workspace, "--verify.resample", "3", "--verify.shown", "30"
    )  # fmt: skip
    assert "300 pairs in 6 shards" in done.stdout
    assert (
        "6 shards are intact, 6 with their noise drawn again; 3 batches sampled again, maximum RMS difference 0" in done.stdout
    )
    sheet = Image.open(io.BytesIO((workspace / "pairs" / "contact.png").read_bytes()))
    assert sheet.size == (5 * 44 - 4, 6 * 44 - 4)


def test_damage_is_named_removed_and_made_again(run: Run, workspace: Path) -> None:
    pairs = workspace / "pairs"
    expected = files(pairs, "part-*")
    flipped = bytearray(expected[shard_name(3)])
    flipped[len(flipped) // 2] ^= 1
    (pairs / shard_name(3)).write_bytes(flipped)
    (pairs / shard_name(1)).write_bytes(expected[shard_name(2)])
    (pairs / shard_name(5)).unlink()
    (pairs / shard_name(99)).write_bytes(b"")
    failed = run("pipeline/verify_pairs.py", "digits", "--workspace", workspace, "--verify.remove", ok=False)
    assert "part-00003.parquet: unreadable" in failed.stderr
    assert "part-00001.parquet: 50 rows from index [100]; expected range(50, 100)" in failed.stderr
    assert "part-00005.parquet: missing" in failed.stderr
    assert "part-00099.parquet: not of this plan" in failed.stderr
    assert "3 shards are intact" in failed.stdout
    (pairs / shard_name(99)).unlink()
    run("pipeline/gen_pairs.py", "digits", "--workspace", workspace, *TINY_PAIRS)
    assert files(pairs, "part-*") == expected
    run("pipeline/verify_pairs.py", "digits", "--workspace", workspace)
    assert "already complete" in run("pipeline/gen_pairs.py", "digits", "--workspace", workspace, *TINY_PAIRS).stdout


def test_pairs_of_another_teacher_are_noticed(run: Run, workspace: Path) -> None:
    teacher = beeline.load(workspace / "teacher")
    for parameter in teacher.parameters():
        parameter.data *= 0.7
    for name, data in dump(teacher, {}).items():
        (workspace / "teacher" / name).write_bytes(data)
    run("pipeline/verify_pairs.py", "digits", "--workspace", workspace)
    failed = run("pipeline/verify_pairs.py", "digits", "--workspace", workspace, "--verify.resample", "1", ok=False)
    assert "the teacher makes other images from the same noise" in failed.stderr


def test_a_teacher_that_makes_nan_is_another_teacher(workspace: Path) -> None:
    place = Folder(str(workspace))
    plan = place.read_json("pairs/plan.json")
    check = CheckShards(place, "digits", plan, {}, frozenset(), {0: 0}, {})
    assert check.work(0)["trouble"] == ""
    assert check.model is not None
    for parameter in check.model.parameters():
        parameter.data[:] = torch.nan
    assert "the teacher makes other images from the same noise" in check.work(0)["trouble"]


def test_what_is_not_finished_is_said(run: Run, workspace: Path) -> None:
    (workspace / "pairs" / "_SUCCESS").unlink()
    assert "_SUCCESS is missing" in run("pipeline/verify_pairs.py", "digits", "--workspace", workspace, ok=False).stderr
    shutil.rmtree(workspace / "pairs")
    failed = run("pipeline/verify_pairs.py", "digits", "--workspace", workspace, ok=False)
    assert f"make them with: python pipeline/gen_pairs.py digits --workspace {workspace}" in failed.stderr


def test_images_have_digests_as_pairs_have(trained: Path) -> None:
    from pipeline.manifest import read_manifest
    from pipeline.storage import Folder

    for name in ("images", "pairs"):
        digests = {shard_name(row["shard"]): row["crc32"] for row in read_manifest(Folder(str(trained / name)))}
        assert digests == {file: zlib.crc32(data) for file, data in files(trained / name, "part-*").items()}


def test_the_manifest_knows_every_shard(trained: Path) -> None:
    from pipeline.manifest import read_manifest
    from pipeline.storage import Folder

    rows = read_manifest(Folder(str(trained / "pairs")))
    assert [row["shard"] for row in rows] == list(range(6))
    assert {shard_name(row["shard"]): row["bytes"] for row in rows} == {
        name: len(data) for name, data in files(trained / "pairs", "part-*").items()
    }
    assert sum(row["pairs"] for row in rows) == 300
    assert sum(row["evaluations"] for row in rows) == json.loads((trained / "pairs" / "_SUCCESS").read_text())["evaluations"]
    assert all(row["sampling_seconds"] > 0 and row["node"] for row in rows)
