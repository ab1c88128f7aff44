"""Read shards for training, in an order that is a function of (seed, position) alone.

Each epoch shuffles the row groups of the whole store, then the rows within windows of WINDOW row groups. The state of a reader
is the position that the caller asks for: nothing needs to be saved, and any rank can ask for any rows. Background threads
prepare the next window and the next batch, including the noise, which is not stored but drawn from the index.

A reader of some classes first reads all labels. It then does the same with the rows of those classes, and leaves out row groups
without any.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from beeline.errors import BeelineError, StorageError
from beeline.files.arrays import spread
from beeline.noise import crc32, stream, unit_noise
from beeline.pixels import to_float
from pipeline.shards import (
    READERS,
    Columns,
    check_footer,
    check_group,
    check_rows,
    columns,
    decode,
    shard_count,
    shard_metadata,
    shard_name,
    shard_rows,
)
from pipeline.storage import Folder

WINDOW = 64  # row groups of about 6 MB each; two windows are in memory
LOADERS = 8  # row groups read at once
DRAWERS = 4  # threads that draw noise; NumPy releases the GIL for most of the work
ATTEMPTS = 3  # attempts to read a row group whose checksum fails: bits can also flip in transit


class _Window(NamedTuple):
    groups: list[Columns]
    starts: list[int]
    order: np.ndarray


class ShardReader:
    """Random access to batches of a finished images/ or pairs/ folder (`config` from its plan: count, shard_size).

    `classes` are those whose rows are read, by default all. `count` is the number of these rows. Raises BeelineError if a shard
    is damaged, if there are no such rows, or if this NumPy draws other noise than was used for the pairs.
    """

    def __init__(self, folder: Folder, config: dict[str, Any], seed: int, classes: range | None = None) -> None:
        self.folder, self.seed, self.classes = folder, seed, classes
        self.stored, self.shard_size = int(config["count"]), int(config["shard_size"])
        self.shards = shard_count(self.stored, self.shard_size)
        self.config, self.metadata = dict(config), {}
        self._footer = functools.lru_cache(maxsize=4096)(self._read_footer)
        self._group = functools.lru_cache(maxsize=2 * WINDOW)(self._read_group)
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)
        self._windows: dict[tuple[int, int], Future[_Window]] = {}
        self._next: tuple[tuple[int, int], Future[dict[str, np.ndarray]]] | None = None
        self._last: int | None = None
        self.waited = 0.0
        """Seconds that callers of `batch` have waited in total."""
        self._batches, self._ahead = ThreadPoolExecutor(1, "batches"), ThreadPoolExecutor(1, "windows")
        self._loaders, self._draw = ThreadPoolExecutor(LOADERS, "row-groups"), ThreadPoolExecutor(DRAWERS, "noise")
        self.metadata: dict[str, Any] = self._footer(0)[1]
        self.group_rows = min(self.metadata["group_rows"], self.shard_size)
        self._groups_of_shard = -(-self.shard_size // self.group_rows)
        last = len(shard_rows(self.shards - 1, self.shard_size, self.stored))
        groups = (self.shards - 1) * self._groups_of_shard - (-last // self.group_rows)
        sizes = np.fromiter(map(self._group_size, range(groups)), np.int64, groups)
        if classes is not None:
            labels = real_labels(folder, config)
            chosen = (labels >= classes.start) & (labels < classes.stop)
            sizes = np.add.reduceat(chosen, np.cumsum(sizes) - sizes, dtype=np.int64)
        self._members = sizes.nonzero()[0]  # groups with rows of the classes
        self._sizes, self.groups, self.count = sizes, len(self._members), int(sizes.sum())
        if not self.count:
            assert classes is not None
            raise BeelineError(
                f"{folder} has no rows of the classes {classes[0]} to {classes[-1]}; make it with more rows, or choose fewer "
                "subsets (--student.subsets)"
            )
        self._check_noise()

    def batch(self, start: int, size: int) -> dict[str, np.ndarray]:
        """Return rows start ... start + size - 1 of the endless shuffled stream, as arrays by column.

        Pairs: x1 and noise float32 (n, C, H, W), label and index (n,). Images: image uint8 (n, C, H, W), label, index.
        Prefetches the next batch at the same stride.
        """
        if self._next is None or self._next[0] != (start, size):
            self._next = self._submit(start, size)
        pending = self._next[1]
        following = start + (start - self._last if self._last is not None and start > self._last else size)
        self._last = start
        self._next = self._submit(following, size)
        start_waiting = time.monotonic()
        rows = pending.result()
        self.waited += time.monotonic() - start_waiting
        return rows

    def _submit(self, start: int, size: int) -> tuple[tuple[int, int], Future[dict[str, np.ndarray]]]:
        return (start, size), self._batches.submit(self._make, start, size)

    def _make(self, start: int, size: int) -> dict[str, np.ndarray]:
        parts = []
        while size > 0:
            epoch, offset = divmod(start, self.count)
            begins = self._epoch(epoch)[1]
            number = bisect.bisect_right(begins, offset) - 1
            window = self._window(epoch, number)
            take = window.order[offset - begins[number] : offset - begins[number] + size]
            if not len(take):
                raise BeelineError(
                    f"{self.folder}: row {offset} of {self.count} is in no row group; remove the folder and make it again"
                )
            parts.append(_gather(window, take))
            start, size = start + len(take), size - len(take)
        rows = Columns(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        if self.metadata["column"] == "image":
            return {"image": rows.images, "label": rows.labels, "index": rows.indices}
        x1 = to_float(rows.images) if rows.images.dtype == np.uint8 else rows.images.astype(np.float32, copy=False)
        return {"x1": x1, "noise": self._noise(rows.indices), "label": rows.labels, "index": rows.indices}

    def _noise(self, indices: np.ndarray) -> np.ndarray:
        seed, shape = self.metadata["plan"]["pairs"]["seed"], self.metadata["shape"]
        parts = np.array_split(indices, DRAWERS) if len(indices) >= DRAWERS else [indices]
        return np.concatenate(list(self._draw.map(lambda part: unit_noise(seed, part, shape), parts)))

    def _check_noise(self) -> None:
        if "x0_crc32" not in self.metadata:
            return
        rows = np.asarray(shard_rows(0, self.shard_size, self.stored))
        if crc32(self._noise(rows)) != self.metadata["x0_crc32"]:
            raise BeelineError(
                f"{self.folder}/{shard_name(0)} was made from other noise than NumPy {np.__version__} draws here: the CRC-32 "
                "sums differ. Install the pinned NumPy, or make the pairs again"
            )

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """Return an epoch's order of row groups, and the stream position at which each window of them begins."""
        order = self._members[stream(self.seed, "shards", epoch).permutation(self.groups)]
        begins = np.concatenate([[0], np.cumsum(self._sizes[order])])[:-1:WINDOW]
        return order, begins.tolist()

    def _group_size(self, group: int) -> int:
        """The number of stored rows of a group."""
        shard, inner = divmod(group, self._groups_of_shard)
        return min(self.group_rows, len(shard_rows(shard, self.shard_size, self.stored)) - inner * self.group_rows)

    def _window(self, epoch: int, number: int) -> _Window:
        """Return a window of row groups; the next one is loaded in the background."""
        last = number + 1 == len(self._epoch(epoch)[1])
        wanted = [(epoch, number), (epoch + 1, 0) if last else (epoch, number + 1)]
        for key in wanted:
            if key not in self._windows:
                self._windows[key] = self._ahead.submit(self._load_window, *key)
        for key in [key for key in self._windows if key not in wanted]:
            self._windows.pop(key, None)
        return self._windows[wanted[0]].result()

    def _load_window(self, epoch: int, number: int) -> _Window:
        members = self._epoch(epoch)[0][number * WINDOW : (number + 1) * WINDOW]
        groups = list(self._loaders.map(self._group, map(int, members)))
        starts = list(itertools.accumulate((len(group.labels) for group in groups), initial=0))
        return _Window(groups, starts[:-1], stream(self.seed, "rows", epoch, number).permutation(starts[-1]))

    def _read_group(self, group: int) -> Columns:
        shard, inner = divmod(group, self._groups_of_shard)
        first = shard * self.shard_size + inner * self.group_rows
        rows = range(first, first + self._group_size(group))
        for attempt in itertools.count(1):
            try:
                with reading(self.folder, shard):
                    footer, metadata = self._footer(shard)
                    with self.folder.open(shard_name(shard)) as source:
                        file = pq.ParquetFile(source, metadata=footer, page_checksum_verification=True, pre_buffer=True)
                        rows_read = columns(file.read_row_group(inner), metadata)
                    check_group(rows_read, metadata, rows, inner)
                    return self._chosen(rows_read)
            except StorageError:
                raise
            except BeelineError:
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError

    def _chosen(self, rows: Columns) -> Columns:
        """The rows of the reader's classes."""
        if self.classes is None:
            return rows
        chosen = (rows.labels >= self.classes.start) & (rows.labels < self.classes.stop)
        return Columns(*(column[chosen] for column in rows))

    def _read_footer(self, shard: int) -> tuple[pq.FileMetaData, dict[str, Any]]:
        with reading(self.folder, shard):
            with self.folder.open(shard_name(shard)) as source:
                footer = pq.read_metadata(source)
            metadata = shard_metadata(footer)
            check_plan(metadata, self.config, self.metadata)
            check_footer(footer, metadata, shard_rows(shard, self.shard_size, self.stored))
            return footer, metadata


def check_plan(metadata: Mapping[str, Any], config: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raise ValueError unless a shard belongs to the plan with `config` and matches the `first` shard of the folder."""
    planned = metadata["plan"].get("pairs", metadata["plan"].get("images", config))
    other = [key for key, value in config.items() if planned.get(key) != value]
    other += [
        key for key in ("column", "shape", "dtype", "group_rows", "plan_fingerprint") if first and metadata[key] != first[key]
    ]
    if other:
        raise ValueError(f"it was made by another plan: {', '.join(other)} differ")


@contextlib.contextmanager
def reading(folder: Folder, shard: int) -> Iterator[None]:
    """Turn every exception about a shard into one BeelineError: damaged files can raise anything."""
    try:
        yield
    except BeelineError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BeelineError(
            f"{folder}/{shard_name(shard)} is damaged ({reason}); remove it and run the command that makes this folder again"
        ) from error


def _gather(window: _Window, take: np.ndarray) -> Columns:
    """Return rows `take` of the window, counted over its concatenated row groups."""
    which = np.searchsorted(window.starts, take, side="right") - 1
    first = window.groups[0]
    gathered = Columns(*(np.empty((len(take), *column.shape[1:]), column.dtype) for column in first))
    for g in np.unique(which):
        rows = which == g
        for target, column in zip(gathered, window.groups[g], strict=True):
            target[rows] = column[take[rows] - window.starts[g]]
    return gathered


def real_labels(folder: Folder, config: dict[str, Any]) -> np.ndarray:
    """Read the labels of images/ or pairs/ in order, int32 (n,), without reading the images."""
    count, shard_size = int(config["count"]), int(config["shard_size"])

    def labels_of(k: int) -> np.ndarray:
        rows = shard_rows(k, shard_size, count)
        with reading(folder, k), folder.open(shard_name(k)) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            metadata = shard_metadata(file.metadata)
            check_footer(file.metadata, metadata, rows)
            table = file.read(["index", "label"])
            indices, labels = (table[name].to_numpy() for name in ("index", "label"))
            size = metadata["group_rows"]
            for number, start in enumerate(range(0, len(rows), size)):
                part = slice(start, start + size)
                check_rows(indices[part], labels[part], metadata, rows[part], number)
            return labels.astype(np.int32, copy=False)

    with ThreadPoolExecutor(READERS) as readers:
        return np.concatenate(list(readers.map(labels_of, range(shard_count(count, shard_size)))))


def decoded(folder: Folder, k: int) -> Columns:
    """Read all of shard k and verify every checksum. Raises BeelineError if it is damaged or holds other rows."""
    with reading(folder, k):
        rows_read, metadata = decode(folder.read(shard_name(k)))
        plan = metadata["plan"].get("pairs", metadata["plan"].get("images", {}))
        if {"count", "shard_size"} <= plan.keys():
            rows = shard_rows(k, plan["shard_size"], plan["count"])
            if (rows_read.indices[0], len(rows_read.indices)) != (rows[0], len(rows)):
                raise ValueError(
                    f"{len(rows_read.indices)} rows from index {rows_read.indices[0]} on; expected {len(rows)} from {rows[0]}"
                )
        return rows_read


def some_images(folder: Folder, config: dict[str, Any], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Read uint8 images (n, C, H, W) and labels (n,) of images/ in order: all of them, or those of about `most` images' worth
    of evenly spread shards."""
    shards, size = shard_count(int(config["count"]), int(config["shard_size"])), int(config["shard_size"])
    wanted = spread(min(shards, max(1, most // size)), shards)
    parts = [decoded(folder, int(k)) for k in wanted]
    return np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts])
