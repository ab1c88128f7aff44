"""Named arrays as bytes, and back: what statistics and features are stored as. And rows, evenly spread."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def pack(arrays: Mapping[str, Any]) -> bytes:
    """The arrays as the bytes of an .npz file; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unpack(data: bytes, expected: str) -> dict[str, np.ndarray]:
    """The inverse of `pack`. Raises ValueError, saying what was `expected`, for damaged files; nothing in them is ever run."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise ValueError(f"not {expected}: {error}") from error


def spread(count: int, total: int) -> np.ndarray:
    """`count` of range(total), evenly spread, int64. Where `count` is more: all in turn, again and again, then the rest of
    `count` evenly spread."""
    turns, rest = divmod(count, total)
    return np.concatenate([np.tile(np.arange(total), turns), np.arange(rest) * total // max(rest, 1)])
