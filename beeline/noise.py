"""Noise that is a function of (seed, index): the x0 of pair `index` is made anew wherever it is needed, never stored.

Philox is counter-based: each index has a stream of its own, so a pair is the same for any batch size, number of actors,
retry or restart. NumPy promises the raw bits of Philox across versions, not the normals drawn from them: a golden hash
in the tests and a CRC-32 in each shard guard those.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

X0_GENERATOR = "numpy.Philox(key=[seed,index]).standard_normal(float32)"


def unit_noise(seed: int, indices: Iterable[int], shape: Sequence[int]) -> np.ndarray:
    """Unit-variance noise x0/sigma_max of the given pair indices: float32 (n, *shape), row i a function of (seed, index_i)."""
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, int(i)])).standard_normal(tuple(shape), dtype=np.float32)
        for i in indices
    ]
    return np.stack(rows) if rows else np.empty((0, *shape), np.float32)


def crc32(noise: np.ndarray) -> int:
    """CRC-32 of an array's bytes: what a shard records of its x0, so that a reader can tell that it remade the same."""
    return zlib.crc32(np.ascontiguousarray(noise).tobytes())


def stream(seed: int, *where: int | str) -> np.random.Generator:
    """A generator that depends on `seed` and a place, ("order", epoch) say, alone: the order and noise of training.

    Nothing of it needs saving in a checkpoint: a resumed run at the same place draws the same numbers.
    """
    key = hashlib.sha256(repr((int(seed), *where)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], np.uint64)))


def stream_seed(seed: int, *where: int | str) -> int:
    """A 63-bit seed for torch's generators with the same property as `stream`."""
    return int(stream(seed, *where).integers(2**63))
