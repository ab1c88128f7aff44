"""The scheme of sharded work: work item k makes file k, whose name and bytes depend on the plan and k alone.

A shard is a Parquet file with columns index (int64), label (int32, -1 for none) and one image column. Images are stored as
uint8 in fixed-size binary, or as float32 in Arrow's fixed_shape_tensor. Plain pyarrow, polars or duckdb read all of it.
Resume is list-and-subtract, after looking into each footer that is there.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.stage import fingerprint
from pipeline.storage import Folder

FORMAT = 1
ROW_GROUP = 512


def shard_name(k: int) -> str:
    """File name of work item k."""
    return f"part-{k:05d}.parquet"


def shard_rows(k: int, shard_size: int, count: int) -> range:
    """The indices that shard k holds."""
    return range(k * shard_size, min((k + 1) * shard_size, count))


def shard_count(count: int, shard_size: int) -> int:
    """How many shards hold `count` rows."""
    return -(-count // shard_size)


def encode(
    column: str, images: np.ndarray, labels: np.ndarray, indices: Iterable[int], plan: Mapping[str, Any], **facts: Any
) -> bytes:
    """A shard's bytes. `images` (n, C, H, W), uint8 or float32; `facts` go into the file's metadata beside the plan."""
    shape = images.shape[1:]
    flat = np.ascontiguousarray(images).reshape(len(images), -1)
    if images.dtype == np.uint8:
        array = pa.array([row.tobytes() for row in flat], type=pa.binary(flat.shape[1]))
    else:
        array = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images.astype(np.float32)))
    metadata = {
        "format": FORMAT,
        "column": column,
        "shape": list(shape),
        "dtype": str(images.dtype),
        "plan": dict(plan),
        "plan_fingerprint": fingerprint(plan),
        **facts,
    }
    table = pa.table(
        {"index": pa.array(list(indices), pa.int64()), "label": pa.array(labels, pa.int32()), column: array}
    ).replace_schema_metadata({"beeline": json.dumps(metadata, sort_keys=True)})
    sink = io.BytesIO()
    pq.write_table(
        table, sink, row_group_size=ROW_GROUP, use_dictionary=False, compression="none", write_statistics=["index"],  # pyright: ignore[reportArgumentType]  (pyarrow takes column names)
        write_page_checksum=True,
    )  # fmt: skip
    return sink.getvalue()


def decode(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Images (n, C, H, W), labels (n,), indices (n,) and metadata of a shard's bytes; page checksums are verified.

    Raises pyarrow.ArrowException or ValueError for anything that is not a whole shard of this format.
    """
    table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()
    metadata = _metadata(table.schema)
    shape = (len(table), *metadata["shape"])
    column = table[metadata["column"]].combine_chunks()
    if metadata["dtype"] == "uint8":
        images = np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(shape)
    else:
        images = column.to_numpy_ndarray().reshape(shape)
    return images, table["label"].to_numpy(), table["index"].to_numpy(), metadata


def _metadata(schema: pa.Schema) -> dict[str, Any]:
    metadata = json.loads((schema.metadata or {}).get(b"beeline", b"{}"))
    if metadata.get("format") != FORMAT:
        raise ValueError(f"format {metadata.get('format')!r} where {FORMAT} was expected")
    return metadata


def damage(folder: Folder, name: str, rows: int, plan: Mapping[str, Any]) -> str | None:
    """What is wrong with a shard that is there, or None: its footer must parse, name this plan and count `rows`."""
    try:
        footer = pq.read_metadata(io.BytesIO(folder.read(name)))
        metadata = _metadata(footer.schema.to_arrow_schema())
    except (pa.ArrowException, ValueError, OSError) as error:
        return f"unreadable ({error})"
    if metadata["plan_fingerprint"] != fingerprint(plan):
        return "made by another plan"
    return None if footer.num_rows == rows else f"{footer.num_rows} rows where {rows} were expected"


def todo(folder: Folder, plan: Mapping[str, Any], count: int, shard_size: int) -> list[int]:
    """The work items still to make: shards that are missing or damaged, the latter named in a printed line."""
    there = folder.sizes()
    left = []
    for k in range(shard_count(count, shard_size)):
        name = shard_name(k)
        if name not in there:
            left.append(k)
        elif trouble := damage(folder, name, len(shard_rows(k, shard_size, count)), plan):
            print(f"{folder}/{name}: {trouble}; it will be made again", flush=True)
            left.append(k)
    return left
