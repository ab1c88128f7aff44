"""Shards with flipped bits, copies under other names, shards of other plans: the right rows, or an error naming the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beeline import noise
from beeline.errors import BeelineError
from pipeline import reader, shards
from pipeline.reader import ShardReader, decoded, real_labels
from pipeline.storage import Folder

FLIPS = int(os.environ.get("BEELINE_FLIPS", "200"))  # bits that are flipped in each kind of shard
COUNT, SIZE, CLASSES = 20, 8, 5
CHANCE = np.random.default_rng(0)
IMAGES = CHANCE.integers(0, 256, (COUNT, 1, 4, 4), dtype=np.uint8)
X1 = CHANCE.standard_normal((COUNT, 1, 4, 4)).astype(np.float32)
LABELS = CHANCE.permutation(COUNT).astype(np.int32) % CLASSES
KINDS = ("images", "pairs")


def plan_of(kind: str, **changes: Any) -> dict[str, Any]:
    config = {"count": COUNT, "shard_size": SIZE, "seed": 3} | changes
    return {kind: config | {"num_classes": CLASSES}} if kind == "images" else {kind: config, "num_classes": CLASSES}


def shard(kind: str, k: int, plan: dict[str, Any]) -> bytes:
    rows = shards.shard_rows(k, SIZE, COUNT)
    if kind == "images":
        return shards.encode("image", IMAGES[rows], LABELS[rows], rows, plan)
    return shards.encode("x1", X1[rows], LABELS[rows], rows, plan, x0_crc32=noise.crc32(noise.unit_noise(3, rows, (1, 4, 4))))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """Three shards of several row groups each."""
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 3 * (16 if kind == "images" else 64))
    folder = Folder(str(tmp_path))
    for k in range(3):
        folder.write(shards.shard_name(k), shard(kind, k, plan_of(kind)))
    return folder


def everything(folder: Folder, kind: str) -> None:
    """Read all rows in every way, and check that they are right."""
    config = plan_of(kind)[kind]
    rows = ShardReader(folder, config, 0).batch(0, COUNT)
    order = np.argsort(rows["index"])
    assert rows["index"][order].tolist() == list(range(COUNT))
    right(rows["image" if kind == "images" else "x1"][order], rows["label"][order], kind)
    if kind == "pairs":
        np.testing.assert_array_equal(rows["noise"], noise.unit_noise(3, rows["index"], (1, 4, 4)))
    parts = [decoded(folder, k) for k in range(3)]
    right(np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts]), kind)
    np.testing.assert_array_equal(real_labels(folder, config), LABELS)


def right(images: np.ndarray, labels: np.ndarray, kind: str) -> None:
    np.testing.assert_array_equal(images, IMAGES if kind == "images" else X1)
    np.testing.assert_array_equal(labels, LABELS)


def refused(call: Callable[[], Any]) -> str:
    """Return the message of the one allowed kind of error; "" for none."""
    try:
        call()
    except BeelineError as error:
        return str(error)
    return ""


def test_flipped_bits_give_the_right_rows_or_a_named_error(folder: Folder, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them in the footer, which has no checksum in Parquet."""
    everything(folder, kind)
    monkeypatch.setattr(reader, "ATTEMPTS", 1)
    path = Path(folder.uri) / shards.shard_name(1)
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    assert footer < len(whole) / 1.2
    chance, harmless = np.random.default_rng(1), 0
    for number in range(FLIPS):
        data = bytearray(whole)
        place = chance.integers(len(data) - footer, len(data)) if number % 2 else chance.integers(len(data))
        data[place] ^= 1 << chance.integers(8)
        path.write_bytes(data)
        said = refused(lambda: everything(folder, kind))
        assert not said or "part-00001.parquet is damaged" in said, (place, said)
        harmless += not said
        shards.damage(folder, path.name, shards.shard_rows(1, SIZE, COUNT), shards.fingerprint(plan_of(kind)))  # raises nothing
    assert harmless < FLIPS / 2  # statistics, versions, padding: what nobody reads


def test_a_copy_of_another_shard_is_noticed(folder: Folder, kind: str) -> None:
    copied = folder.read(shards.shard_name(0))
    folder.write(shards.shard_name(1), copied)
    config = plan_of(kind)[kind]
    for call in (
        lambda: ShardReader(folder, config, 0).batch(0, COUNT),
        lambda: decoded(folder, 1),
        lambda: real_labels(folder, config),
    ):
        assert "part-00001.parquet is damaged" in refused(call)
    assert shards.survey(folder, plan_of(kind), COUNT, SIZE).todo == [1]


@pytest.mark.parametrize("changes", [{"seed": 4}, {"count": COUNT + 1}])
def test_a_shard_of_another_plan_is_noticed(folder: Folder, kind: str, changes: dict[str, int]) -> None:
    folder.write(shards.shard_name(1), shard(kind, 1, plan_of(kind, **changes)))
    said = refused(lambda: ShardReader(folder, plan_of(kind)[kind], 0).batch(0, COUNT))
    assert f"made by another plan: {next(iter(changes))}" in said
    assert shards.survey(folder, plan_of(kind), COUNT, SIZE).todo == [1]


def rewritten(data: bytes, change: Callable[[pa.Table], pa.Table], **more: Any) -> bytes:
    """Rewrite a shard with plain pyarrow, with its metadata or `more`, all page checksums right."""
    table = pq.read_table(pa.BufferReader(data))
    metadata = json.loads(table.schema.metadata[b"beeline"]) | more
    table = change(table).replace_schema_metadata({"beeline": json.dumps(metadata)})
    sink = pa.BufferOutputStream()
    size = metadata["group_rows"]
    pq.write_table(table, sink, row_group_size=size, use_dictionary=False, compression="none", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def with_labels(labels: np.ndarray, kind: Any = None) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(1, "label", pa.array(labels, kind or pa.int32()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_labels(np.roll(LABELS[8:16], 1)), "the CRC-32 of row group 0 does not match"),
        (with_labels(np.full(8, CLASSES)), f"expected 3 of {CLASSES} classes"),
        (with_labels(np.full(8, -2)), "expected 3 of"),
        (with_labels(LABELS[8:16], pa.int64()), "index and label are"),
        (with_labels(LABELS[8:16], pa.float32()), "index and label are"),
        (lambda table: table.take([1, 0, *range(2, 8)]), "expected"),
        (lambda table: table.slice(0, 7), "7 rows in 3 row groups; expected 8"),
    ],
)
def test_what_a_row_group_says_is_compared_with_the_plan(
    folder: Folder, kind: str, change: Callable[[pa.Table], pa.Table], said: str
) -> None:
    folder.write(shards.shard_name(1), rewritten(folder.read(shards.shard_name(1)), change))
    found = refused(lambda: ShardReader(folder, plan_of(kind)[kind], 0).batch(0, COUNT))
    assert said in found
    assert "part-00001.parquet is damaged" in refused(lambda: decoded(folder, 1))


@pytest.mark.parametrize("key", ["group_rows", "shape", "dtype", "plan_fingerprint", "rows_crc32", "column"])
def test_metadata_that_was_changed_is_noticed(folder: Folder, kind: str, key: str) -> None:
    changed = {"group_rows": 4, "shape": [4, 4, 1], "dtype": "int8", "plan_fingerprint": "0", "rows_crc32": [], "column": "y"}[
        key
    ]
    data = folder.read(shards.shard_name(1))
    folder.write(shards.shard_name(1), rewritten(data, lambda table: table, **{key: changed}))
    for call in (lambda: ShardReader(folder, plan_of(kind)[kind], 0).batch(0, COUNT), lambda: decoded(folder, 1)):
        assert "part-00001.parquet is damaged" in refused(call)


def test_shards_of_earlier_versions_are_read(folder: Folder, kind: str) -> None:
    """They have only the checksums of their pages."""
    for k in range(3):
        data = folder.read(shards.shard_name(k))
        table = pq.read_table(pa.BufferReader(data))
        metadata = json.loads(table.schema.metadata[b"beeline"])
        for name in ("rows_crc32", "images_crc32", "metadata_crc32"):
            del metadata[name]
        table = table.replace_schema_metadata({"beeline": json.dumps(metadata, sort_keys=True)})
        sink = pa.BufferOutputStream()
        pq.write_table(
            table, sink, row_group_size=metadata["group_rows"], use_dictionary=False, compression="none",
            write_page_checksum=True,
        )  # fmt: skip
        folder.write(shards.shard_name(k), sink.getvalue().to_pybytes())
    everything(folder, kind)
    assert shards.survey(folder, plan_of(kind), COUNT, SIZE).todo == []


def test_a_reader_that_makes_no_progress_raises(folder: Folder, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ShardReader(folder, plan_of(kind)[kind], 0)
    window = one._window(0, 0)
    monkeypatch.setattr(one, "_window", lambda epoch, number: window._replace(order=window.order[:5]))
    with pytest.raises(BeelineError, match="row 5 of 20 is in no row group"):
        one.batch(0, COUNT)
