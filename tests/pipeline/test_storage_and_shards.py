"""Files appear whole or not at all; shards are a function of their plan; damage is found."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.reader
from beeline import noise
from beeline.errors import BeelineError
from pipeline import shards, storage
from pipeline.reader import ShardReader
from pipeline.stage import Stage, differences, require
from pipeline.storage import Folder

PLAN = {"pairs": {"count": 50, "shard_size": 8, "seed": 3}}


def write_pairs(folder: Folder, plan: dict = PLAN) -> None:
    config = plan["pairs"]
    for k in range(shards.shard_count(config["count"], config["shard_size"])):
        rows = shards.shard_rows(k, config["shard_size"], config["count"])
        x1 = np.stack([np.full((1, 4, 4), i, np.float32) for i in rows])
        data = shards.encode("x1", x1, np.asarray(rows) % 10, rows, plan)
        folder.write(shards.shard_name(k), data)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path / "f"))
    folder.write("a", b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(BeelineError, match="No space left"):
        folder.write("a", b"new")
    assert folder.read("a") == b"old"
    assert list(folder.sizes()) == ["a"]
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["a"]


def test_leftovers_of_killed_writers_are_not_seen_and_are_cleaned(tmp_path: Path) -> None:
    """Removes files of dead processes on this machine and files older than a day, never those of live writers."""
    folder = Folder(str(tmp_path))
    folder.write("part", b"x")
    dead = subprocess.Popen(["true"])
    dead.wait()
    mine = storage._temporary_name()
    others = mine.replace(f".{os.getpid()}.", f".{dead.pid}.")
    elsewhere = others.replace(storage._machine(), "another-machine.example")
    old, older_version = f"old{elsewhere}", ".0123456789abcdef.tmp"
    for name in (mine, others, elsewhere, old, older_version):
        (tmp_path / name).write_bytes(b"half")
    for name in (old, older_version):
        os.utime(tmp_path / name, (0, 0))
    assert folder.sizes() == {"part": 1}
    folder.clean()
    assert {path.name for path in tmp_path.iterdir()} == {"part", mine, elsewhere}


def test_two_may_clean_and_remove_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path))
    (tmp_path / ".old.tmp").write_bytes(b"half")
    os.utime(tmp_path / ".old.tmp", (0, 0))
    names = os.listdir(tmp_path)
    folder.clean()
    monkeypatch.setattr("os.listdir", lambda path: names)  # as another has seen the folder before
    folder.clean()
    folder.remove("part-00000.parquet")


def test_a_folder_as_a_file_url(tmp_path: Path) -> None:
    folder = Folder(f"file://{tmp_path}/with%20space")
    (folder / "sub").write("name", b"data")
    assert folder.uri == f"{tmp_path}/with space"
    assert folder.is_local
    assert (folder / "sub").read("name") == b"data"
    assert (folder / "sub").sizes() == {"name": 4}
    assert folder.folders() == ["sub"]


def test_a_job_needs_a_place_that_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.JOB_MARK, "{}")
    for place in (str(tmp_path), f"file://{tmp_path}", "~/x", "s3://bucket/x"):
        Folder(place)
    with pytest.raises(BeelineError, match="is relative"):
        Folder("runs/digits")


@given(count=st.integers(1, 200), size=st.integers(1, 60))
def test_shards_cover_every_row_once(count: int, size: int) -> None:
    rows = [i for k in range(shards.shard_count(count, size)) for i in shards.shard_rows(k, size, count)]
    assert rows == list(range(count))


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_shard_round_trip_and_same_bytes(dtype: type) -> None:
    images = np.random.default_rng(0).integers(0, 255, (9, 3, 4, 4)).astype(dtype)
    labels = np.arange(9, dtype=np.int32)
    data = shards.encode("image", images, labels, range(9), PLAN, note=1)
    assert data == shards.encode("image", images, labels, range(9), PLAN, note=1)
    (back, back_labels, indices), metadata = shards.decode(data)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, images)
    np.testing.assert_array_equal(back_labels, labels)
    assert list(indices) == list(range(9))
    assert metadata["plan"] == PLAN


def test_a_flipped_bit_is_found() -> None:
    images = np.random.default_rng(0).normal(size=(9, 1, 8, 8)).astype(np.float32)
    data = bytearray(shards.encode("x1", images, np.zeros(9, np.int32), range(9), PLAN))
    data[data.find(images.tobytes()[:64]) + 5] ^= 1
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        shards.decode(bytes(data))


def test_plain_pyarrow_reads_a_shard(tmp_path: Path) -> None:
    write_pairs(Folder(str(tmp_path)))
    table = pq.read_table(tmp_path / "part-00001.parquet")
    assert table["index"].to_pylist() == list(range(8, 16))
    assert table["x1"].combine_chunks().to_numpy_ndarray()[3].tolist() == np.full((1, 4, 4), 11).tolist()


def test_todo_names_what_is_missing_truncated_or_foreign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(str(tmp_path))
    write_pairs(folder)
    assert shards.survey(folder, PLAN, 50, 8).todo == []
    (tmp_path / "part-00000.parquet").unlink()
    truncated = (tmp_path / "part-00002.parquet").read_bytes()[:-100]
    (tmp_path / "part-00002.parquet").write_bytes(truncated)
    other = shards.encode("x1", np.zeros((8, 1, 4, 4), np.float32), np.zeros(8), range(8), {"pairs": {"seed": 4}})
    (tmp_path / "part-00004.parquet").write_bytes(other)
    assert shards.survey(folder, PLAN, 50, 8).todo == [0, 2, 4]
    said = capsys.readouterr().out
    assert "part-00002.parquet: unreadable" in said
    assert "part-00004.parquet: made by another plan" in said


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 5),
    batch=st.integers(1, 30),
    ranks=st.sampled_from([1, 2, 3]),
    step=st.integers(0, 8),
    windows=st.booleans(),
)
def test_reader_order_depends_on_seed_and_position_alone(
    tmp_path_factory: pytest.TempPathFactory, seed: int, batch: int, ranks: int, step: int, windows: bool
) -> None:
    """Also with several row groups per shard, several windows per epoch, and after any read-ahead."""
    folder = tmp_path_factory.getbasetemp() / f"reader-{windows}"
    with (
        patch.object(shards, "ROW_GROUP_BYTES", 3 * 64 if windows else 2**20),
        patch.object(pipeline.reader, "WINDOW", 4 if windows else 64),
    ):
        if not folder.exists():
            write_pairs(Folder(str(folder)))

        def reader() -> ShardReader:
            return ShardReader(Folder(str(folder)), PLAN["pairs"], seed)

        def index(rows: dict[str, np.ndarray]) -> list[int]:
            assert rows["x1"][:, 0, 0, 0].astype(int).tolist() == rows["index"].tolist()
            assert rows["label"].tolist() == (rows["index"] % 10).tolist()
            return rows["index"].tolist()

        assert reader().groups == (19 if windows else 7)
        epoch = reader().batch(50, 50)
        assert sorted(index(epoch)) == list(range(50))
        np.testing.assert_array_equal(epoch["noise"], noise.unit_noise(3, index(epoch), (1, 4, 4)))
        assert index(reader().batch(0, 50)) != index(epoch)
        size = batch * ranks
        whole = index(reader().batch(step * size, size))
        assert whole == [i for r in range(ranks) for i in index(reader().batch(step * size + r * batch, batch))]
        one_after_the_other = reader()
        parts = [index(one_after_the_other.batch(k * size, batch)) for k in range(step + 1)]
        assert parts[-1] == whole[:batch]


@pytest.mark.parametrize("sorted_rows", [False, True])
def test_a_reader_of_some_classes(sorted_rows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads their rows alone, each once per epoch, in an order that seed and position determine; and of a sorted store only
    the row groups that hold them."""
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 3 * 64)
    monkeypatch.setattr(pipeline.reader, "WINDOW", 4)
    labels = np.arange(50, dtype=np.int32)
    labels = labels // 5 if sorted_rows else labels % 10
    folder, classes = Folder(str(tmp_path)), range(3, 6)
    for k in range(shards.shard_count(50, 8)):
        rows = shards.shard_rows(k, 8, 50)
        x1 = np.stack([np.full((1, 4, 4), i, np.float32) for i in rows])
        folder.write(shards.shard_name(k), shards.encode("x1", x1, labels[rows.start : rows.stop], rows, PLAN))

    def reader(seed: int = 2) -> ShardReader:
        return ShardReader(folder, PLAN["pairs"], seed, classes)

    first = reader()
    assert first.count == 15
    groups = {(i // 8, i % 8 // 3) for i in range(50) if labels[i] in classes}
    assert first.groups == len(groups) < 19
    stream = first.batch(0, 45)
    assert stream["x1"][:, 0, 0, 0].astype(int).tolist() == stream["index"].tolist()
    assert (stream["label"] == labels[stream["index"]]).all()
    np.testing.assert_array_equal(stream["noise"], noise.unit_noise(3, stream["index"], (1, 4, 4)))
    epochs = stream["index"].reshape(3, 15)
    for epoch in epochs:
        assert sorted(epoch) == [i for i in range(50) if labels[i] in classes]
    assert epochs[0].tolist() != epochs[1].tolist()
    for start, size in ((0, 4), (13, 5), (31, 14)):
        np.testing.assert_array_equal(reader().batch(start, size)["index"], stream["index"][start : start + size])
    assert reader(seed=3).batch(0, 45)["index"].tolist() != stream["index"].tolist()
    assert first._members.tolist() == sorted(shard * 3 + inner for shard, inner in groups)


def test_classes_without_rows_are_refused(tmp_path: Path) -> None:
    write_pairs(Folder(str(tmp_path)))
    with pytest.raises(BeelineError, match=r"has no rows of the classes 10 to 19; make it with more rows"):
        ShardReader(Folder(str(tmp_path)), PLAN["pairs"], 0, range(10, 20))


def test_noise_that_cannot_be_made_again_is_noticed(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    rows = range(50)
    x1 = np.zeros((50, 1, 4, 4), np.float32)
    config = {"count": 50, "shard_size": 50, "seed": 3}
    for crc, said in ((noise.crc32(noise.unit_noise(3, rows, (1, 4, 4))), None), (1, r"other noise than NumPy .* draws here")):
        data = shards.encode("x1", x1, np.zeros(50, np.int32), rows, {"pairs": config}, x0_crc32=crc)
        folder.write(shards.shard_name(0), data)
        with pytest.raises(BeelineError, match=said) if said else contextlib.nullcontext():
            ShardReader(folder, config, seed=0)


def test_a_damaged_shard_is_named_to_the_reader(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    write_pairs(folder)
    (tmp_path / "part-00003.parquet").write_bytes(b"PAR1 not quite")
    with pytest.raises(BeelineError, match=r"part-00003\.parquet is damaged"):
        ShardReader(folder, PLAN["pairs"], 0).batch(0, 50)


def test_stage_refuses_another_plan_and_notices_lost_files(tmp_path: Path) -> None:
    place = Folder(str(tmp_path))
    config = {"count": 2, "seed": 0, "shard_size": 2, "num_steps": 18, "dtype": "float32"}
    plan = {"pairs": config, "evaluations": 35, "num_classes": 0, "shape": [1, 8, 8], "sigmas": [80.0]}
    stage = Stage(place, "pairs", plan)
    assert stage.begin()
    with pytest.raises(
        BeelineError, match=r"pairs is missing or not complete; make it with: python pipeline/gen_pairs\.py digits"
    ):
        require(place, "pairs", "digits")
    stage.folder.write("part-00000.parquet", b"1234")
    stage.finish()
    assert not Stage(place, "pairs", dict(reversed(plan.items()))).begin()
    with pytest.raises(BeelineError, match=r"pairs\.count: 2 there, 3 asked for"):
        Stage(place, "pairs", plan | {"pairs": config | {"count": 3}}).begin()
    assert require(place, "pairs", "digits") == plan
    (tmp_path / "pairs" / "part-00000.parquet").write_bytes(b"12")
    with pytest.raises(BeelineError, match=r"has 2 bytes, expected 4 bytes; repair it with"):
        require(place, "pairs", "digits")
    assert stage.begin()


def test_differences_are_named_in_depth() -> None:
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 2}, "d": 3}) == [
        "a.b: 1 there, 2 asked for",
        "c: 2 there, None asked for",
        "d: None there, 3 asked for",
    ]
