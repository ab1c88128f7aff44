"""Shards read back for training, in an order that is a function of (seed, position) alone.

Each epoch shuffles the shards, then the rows within a window of WINDOW shards, which is what stays in memory. The state of
a reader is the position that the caller asks for: nothing of it needs saving, and any rank can ask for any rows.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from beeline.errors import BeelineError
from beeline.noise import stream, x0
from pipeline.shards import decode, shard_count, shard_name, shard_rows
from pipeline.storage import Folder

WINDOW = 16


class ShardReader:
    """Random access to batches of a finished images/ or pairs/ folder (`config` of its plan: count, shard_size)."""

    def __init__(self, folder: Folder, config: dict[str, Any], seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.count, self.shard_size = int(config["count"]), int(config["shard_size"])
        self.shards = shard_count(self.count, self.shard_size)
        self._window = functools.lru_cache(maxsize=2)(self._load_window)
        self._shard = functools.lru_cache(maxsize=2 * WINDOW)(self._load_shard)

    def batch(self, start: int, size: int) -> dict[str, np.ndarray]:
        """Rows at positions start ... start + size - 1 of the endless shuffled stream, as arrays by column."""
        parts = []
        while size > 0:
            epoch, offset = divmod(start, self.count)
            window_rows, window, begin = self._locate(epoch, offset)
            columns, order = self._window(epoch, window)
            take = order[offset - begin : offset - begin + size]
            parts.append({name: column[take] for name, column in columns.items()})
            assert len(order) == window_rows
            start, size = start + len(take), size - len(take)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _shard_order(self, epoch: int) -> np.ndarray:
        return stream(self.seed, "shards", epoch).permutation(self.shards)

    def _locate(self, epoch: int, offset: int) -> tuple[int, int, int]:
        """(rows, number, first position) of the window that holds position `offset` of the epoch."""
        order, begin = self._shard_order(epoch), 0
        for window in range(-(-self.shards // WINDOW)):
            members = order[window * WINDOW : (window + 1) * WINDOW]
            rows = sum(len(shard_rows(int(k), self.shard_size, self.count)) for k in members)
            if offset < begin + rows:
                return rows, window, begin
            begin += rows
        raise AssertionError(f"position {offset} beyond an epoch of {self.count}")

    def _load_window(self, epoch: int, window: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        members = self._shard_order(epoch)[window * WINDOW : (window + 1) * WINDOW]
        shards = [self._shard(int(k)) for k in members]
        columns = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
        return columns, stream(self.seed, "rows", epoch, window).permutation(len(columns["label"]))

    def _load_shard(self, k: int) -> dict[str, np.ndarray]:
        name = shard_name(k)
        try:
            images, labels, indices, metadata = decode(self.folder.read(name))
        except (OSError, ValueError) as error:
            raise BeelineError(
                f"{self.folder}/{name} is damaged ({error}); run the command that makes this folder again to mend it"
            ) from error
        if metadata["column"] == "image":
            return {"image": images, "label": labels}
        # x0 is made anew from (seed, index): it was never stored
        return {"x1": images, "noise": x0(metadata["plan"]["pairs"]["seed"], indices, images.shape[1:]), "label": labels}


def real_images(folder: Folder, config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """All of images/ in order: uint8 (n, C, H, W) and labels (n,). For data sets that fit in memory."""
    count, size = int(config["count"]), int(config["shard_size"])
    parts = [decode(folder.read(shard_name(k))) for k in range(shard_count(count, size))]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 images as float32 in [-1, 1]: EDM's u / 127.5 - 1."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)
