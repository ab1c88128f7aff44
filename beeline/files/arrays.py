"""Storage of named arrays as bytes, for statistics and features; evenly spread rows."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from beeline.errors import reason

ZIP = b"PK"
MAX_UNPACKED = 2**30  # bytes of a compressed file; Beeline's own files are not compressed


def pack(arrays: Mapping[str, Any]) -> bytes:
    """Encode the arrays as the bytes of an .npz file; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unpack(data: bytes, expected: str) -> dict[str, np.ndarray]:
    """Invert `pack`. Raises ValueError, naming what was `expected`, for anything else. Runs no code from the data and reserves
    no memory for arrays that it does not contain."""
    if not data.startswith(ZIP):
        raise ValueError(f"not {expected}: it starts with {data[:8]!r}, and .npz files start with {ZIP!r}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            sizes = {info.filename: info.file_size for info in file.infolist()}
            if sum(sizes.values()) > max(MAX_UNPACKED, len(data)):
                raise ValueError(f"it unpacks to {sum(sizes.values()):,} bytes, which is too many")
            return {name.removesuffix(".npy"): _array(file.open(name).read(size)) for name, size in sizes.items()}
    except Exception as error:  # damaged data can raise anything
        raise ValueError(f"not {expected}: {reason(error)}") from error


def _array(data: bytes) -> np.ndarray:
    """Read the array of an .npy file."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which Beeline does not read")
    return np.ndarray(shape, dtype, data, file.tell(), order="F" if fortran else "C").copy()


def spread(count: int, total: int) -> np.ndarray:
    """Return `count` of range(total), evenly spread, int64.

    If `count` exceeds `total`: repeats all of range(total) as often as it fits, then adds the rest, evenly spread.
    """
    turns, rest = divmod(count, total)
    return np.concatenate([np.tile(np.arange(total), turns), np.arange(rest) * total // max(rest, 1)])
