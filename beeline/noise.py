"""Noise as a function of (seed, index): the noise of pair `index` is drawn again wherever it is needed, never stored.

Philox is counter-based, and each index has its own stream. So a pair is the same for any batch size, number of actors, retry or
restart. NumPy guarantees the raw bits of Philox across versions, but not the normal numbers drawn from them. A golden hash in
the tests and a CRC-32 in each shard detect a change.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

X0_GENERATOR = "numpy.Philox(key=[seed,index]).standard_normal(float32)"


def unit_noise(seed: int, indices: Iterable[int], shape: Sequence[int]) -> np.ndarray:
    """Draw the unit-variance noise z = x0 / sigma_max of pairs: float32 (n, *shape), row i a function of (seed, index_i)."""
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, int(i)])).standard_normal(tuple(shape), dtype=np.float32)
        for i in indices
    ]
    return np.stack(rows) if rows else np.empty((0, *shape), np.float32)


def crc32(noise: np.ndarray) -> int:
    """Compute the CRC-32 of an array's bytes. Shards record it, so that a reader can check the noise it draws."""
    return zlib.crc32(np.ascontiguousarray(noise).tobytes())


def stream(seed: int, *where: int | str) -> np.random.Generator:
    """Return a generator that depends only on `seed` and a place, such as ("order", epoch): the order and noise of training.

    Checkpoints need no generator state: a resumed run draws the same numbers at the same place.
    """
    key = hashlib.sha256(repr((int(seed), *where)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], np.uint64)))


def stream_seed(seed: int, *where: int | str) -> int:
    """Return a 63-bit seed for torch's generators with the same property as `stream`."""
    return int(stream(seed, *where).integers(2**63))
