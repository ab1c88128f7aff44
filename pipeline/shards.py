"""The scheme of sharded work: work item k makes file k, whose name and bytes depend on the plan and k alone.

A shard is a Parquet file with columns index (int64), label (int32, -1 for none) and one image column, in row groups of
about 6 MB, each page with a checksum. Images are uint8 in fixed-size binary, or float16 or float32 in Arrow's
fixed_shape_tensor (docs/pair-store.md). Resume is list-and-subtract, after looking into each footer that is there.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.stage import fingerprint
from pipeline.storage import Folder

FORMAT = 2
ROW_GROUP_BYTES = 6 * 2**20
MAX_SHARD_BYTES = 128 * 2**20
READERS = 32  # footers read at once


def shard_name(k: int) -> str:
    """File name of work item k."""
    return f"part-{k:05d}.parquet"


def shard_rows(k: int, shard_size: int, count: int) -> range:
    """The indices that shard k holds."""
    return range(k * shard_size, min((k + 1) * shard_size, count))


def shard_count(count: int, shard_size: int) -> int:
    """How many shards hold `count` rows."""
    return -(-count // shard_size)


def group_rows(row_bytes: int) -> int:
    """Rows of a row group of images of `row_bytes` bytes each."""
    return max(1, ROW_GROUP_BYTES // row_bytes)


def encode(
    column: str, images: np.ndarray, labels: np.ndarray, indices: Iterable[int], plan: Mapping[str, Any], **facts: Any
) -> bytes:
    """A shard's bytes. `images` (n, C, H, W), uint8, float16 or float32; `facts` go into the metadata beside the plan."""
    shape = images.shape[1:]
    images = np.ascontiguousarray(images)
    row_bytes = images[0].nbytes
    if images.dtype == np.uint8:
        array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(row_bytes), len(images), [None, pa.py_buffer(images)])
    else:
        array = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    metadata = {
        "format": FORMAT,
        "column": column,
        "shape": list(shape),
        "dtype": str(images.dtype),
        "group_rows": group_rows(row_bytes),
        "plan": dict(plan),
        "plan_fingerprint": fingerprint(plan),
        **facts,
    }
    fields = [
        pa.field("index", pa.int64()),
        pa.field("label", pa.int32()),
        pa.field(column, array.type, metadata={"shape": json.dumps(list(shape)), "dtype": str(images.dtype)}),
    ]
    table = pa.table(
        [pa.array(list(indices), pa.int64()), pa.array(labels, pa.int32()), array],
        schema=pa.schema(fields, metadata={"beeline": json.dumps(metadata, sort_keys=True)}),
    )
    sink = io.BytesIO()
    pq.write_table(
        table, sink, row_group_size=metadata["group_rows"], use_dictionary=False, compression="none",
        write_statistics=["index"],  # pyright: ignore[reportArgumentType]  (pyarrow takes column names)
        write_page_checksum=True,
    )  # fmt: skip
    return sink.getvalue()


class Columns(NamedTuple):
    """Rows of a shard: images (n, C, H, W) in their stored dtype, labels (n,) int32, indices (n,) int64."""

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray


def decode(data: bytes) -> tuple[Columns, dict[str, Any]]:
    """A shard's rows and metadata from its bytes; page checksums are verified.

    Raises pyarrow.ArrowException, OSError or ValueError for anything that is not a whole shard of this format.
    """
    file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    metadata = shard_metadata(file.metadata)
    return columns(file.read(), metadata), metadata


def columns(table: pa.Table, metadata: Mapping[str, Any]) -> Columns:
    """The columns of (part of) a shard as arrays."""
    shape = (len(table), *metadata["shape"])
    column = table[metadata["column"]].combine_chunks()
    if metadata["dtype"] == "uint8":
        start = column.offset * column.type.byte_width
        images = np.frombuffer(column.buffers()[1], np.uint8)[start : start + int(np.prod(shape))].reshape(shape)
    else:
        images = column.to_numpy_ndarray().reshape(shape)
    return Columns(images, table["label"].to_numpy(), table["index"].to_numpy())


def shard_metadata(footer: pq.FileMetaData) -> dict[str, Any]:
    """Beeline's metadata in a shard's footer. Raises ValueError if it is not of this format."""
    metadata = json.loads((footer.metadata or {}).get(b"beeline", b"{}"))
    if metadata.get("format") != FORMAT:
        raise ValueError(f"format {metadata.get('format')!r}, which another version of Beeline made; {FORMAT} is expected")
    return metadata


def damage(folder: Folder, name: str, rows: int, plan_fingerprint: str) -> str | None:
    """What is wrong with a shard that is there, or None: its footer must parse, name this plan and count `rows`.

    Only the end of the file is read: flipped bits further up are found by whoever reads them, and by verify_pairs.py.
    """
    try:
        with folder.open(name) as file:
            footer = pq.read_metadata(file)
        metadata = shard_metadata(footer)
    except (pa.ArrowException, ValueError, OSError) as error:
        return f"unreadable ({error})"
    if metadata["plan_fingerprint"] != plan_fingerprint:
        return "made by another plan"
    return None if footer.num_rows == rows else f"{footer.num_rows} rows where {rows} were expected"


class Found(NamedTuple):
    """What is in a folder of shards: bytes of each that is sound, and the work items that are left, in order."""

    sizes: dict[int, int]
    todo: list[int]


def survey(folder: Folder, plan: Mapping[str, Any], count: int, shard_size: int) -> Found:
    """Look at the shards of a folder. Those that are damaged are named in a printed line, and left to be made again."""
    there, shards = folder.sizes(), range(shard_count(count, shard_size))
    present = [k for k in shards if shard_name(k) in there]
    expected = fingerprint(plan)

    def trouble(k: int) -> str | None:
        return damage(folder, shard_name(k), len(shard_rows(k, shard_size, count)), expected)

    sizes = {}
    with ThreadPoolExecutor(READERS) as readers:
        for k, found in zip(present, readers.map(trouble, present), strict=True):
            if found is None:
                sizes[k] = there[shard_name(k)]
            else:
                print(f"{folder}/{shard_name(k)}: {found}; it will be made again", flush=True)
    return Found(sizes, [k for k in shards if k not in sizes])
