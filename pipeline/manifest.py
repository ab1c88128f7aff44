"""Manifest of a shard store: one row per shard with its CRC-32 and, for pairs/, production time and device.

The driver holds the manifest in memory and publishes it every 30 seconds. For shards published just before a driver is killed,
only their sizes are known. The manifest is used for totals only: each shard file itself shows whether it is complete.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from beeline.errors import reason
from pipeline.storage import Folder

MANIFEST = "manifest.parquet"
EVERY = 30.0  # seconds between two publications
MAX_ROWS = 1_000_000  # shards
MAX_BYTES = 1 << 28  # of an unpacked manifest
SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int64()),
        pa.field("pairs", pa.int64()),
        pa.field("bytes", pa.int64()),
        pa.field("crc32", pa.int64(), metadata={"of": "the file"}),
        pa.field("evaluations", pa.int64()),
        pa.field("published", pa.timestamp("ms", "UTC")),
        pa.field("sampling_seconds", pa.float64()),
        pa.field("writing_seconds", pa.float64()),
        pa.field("waiting_seconds", pa.float64()),
        pa.field("retries", pa.int64()),
        pa.field("node", pa.string()),
        pa.field("device", pa.string(), metadata={"of": "the sampler: a GPU's name, or CPU"}),
    ]
)
# Columns used in totals and comparisons, and their types.
SUMMED: dict[str, Any] = {
    "shard": int, "bytes": int, "device": str | None,
    **dict.fromkeys(("pairs", "evaluations", "retries"), int | None),
    **dict.fromkeys(("sampling_seconds", "writing_seconds", "waiting_seconds"), float | None),
}  # fmt: skip


class Manifest:
    """The manifest in `folder`, read if it exists; `sizes` maps each intact shard to its size in bytes."""

    def __init__(self, folder: Folder, sizes: Mapping[int, int]) -> None:
        self.folder = folder
        self.rows: dict[int, dict[str, Any]] = {k: {"shard": k, "bytes": size} for k, size in sizes.items()}
        for row in read_manifest(folder):
            if sizes.get(row["shard"]) == row["bytes"]:
                self.rows[row["shard"]] = row
        self._published = time.monotonic()

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the row of a shard that was just published."""
        self.rows[row["shard"]] = {name: row.get(name) for name in SCHEMA.names}
        if time.monotonic() - self._published > EVERY:
            self.publish()

    def publish(self) -> None:
        """Write manifest.parquet."""
        table = pa.Table.from_pylist([self.rows[k] for k in sorted(self.rows)], schema=SCHEMA)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self.folder.write(MANIFEST, sink.getvalue())
        self._published = time.monotonic()

    def seconds_by_device(self) -> dict[str, float]:
        """Sum the sampling time in seconds by device, over the shards whose device is known."""
        devices = sorted({row["device"] for row in self.rows.values() if row.get("device")})
        rows_by_device = {device: [row for row in self.rows.values() if row.get("device") == device] for device in devices}
        return {device: round(sum(row["sampling_seconds"] or 0 for row in rows), 1) for device, rows in rows_by_device.items()}

    def total(self, name: str) -> float:
        """Sum a column over the shards whose value is known."""
        return sum(row.get(name) or 0 for row in self.rows.values())


def seconds_per_pair(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds of one actor for a pair: the median over shards, since an actor's first one may compile. None where no row has
    a time."""
    timed = [row["sampling_seconds"] / row["pairs"] for row in rows if row.get("sampling_seconds") and row.get("pairs")]
    return statistics.median(timed) if timed else None


def read_manifest(folder: Folder) -> list[dict[str, Any]]:
    """Read the rows of a folder's manifest; [] if it is missing or unreadable, because only totals depend on it."""
    try:
        data = folder.read(MANIFEST)
    except FileNotFoundError:
        return []
    try:
        rows = rows_of(data)
        if any(not isinstance(row.get(name), SUMMED[name]) for row in rows for name in SUMMED):
            raise ValueError("its columns are not those of a manifest")
        return rows
    except Exception as error:  # a damaged file can raise anything
        print(f"{folder}/{MANIFEST}: unreadable ({reason(error)}); sampling times of its shards are unknown", flush=True)
        return []


def rows_of(data: bytes) -> list[dict[str, Any]]:
    """Read the rows of a small Parquet file such as a manifest.

    Raises ValueError above MAX_ROWS or MAX_BYTES: a file of a few bytes can announce any number of rows and repeat a long text.
    Other damage can raise any exception.
    """
    file = pq.ParquetFile(io.BytesIO(data))
    if file.metadata.num_rows > MAX_ROWS:
        raise ValueError(f"it has {file.metadata.num_rows:,} rows; expected at most {MAX_ROWS:,}")
    rows: list[dict[str, Any]] = []
    size = 0
    for batch in file.iter_batches(batch_size=64):
        size += batch.nbytes
        if size > MAX_BYTES:
            raise ValueError(f"it unpacks to more than the allowed {MAX_BYTES:,} bytes")
        rows += batch.to_pylist()
    return rows


def sampling_seconds(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """The sampling time of each shard whose time is known, in seconds."""
    return [row["sampling_seconds"] for row in rows if row.get("sampling_seconds") is not None]
