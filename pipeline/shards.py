"""Sharded work: work item k makes file k, whose name and bytes depend only on the plan and k.

A shard is a Parquet file with columns index (int64), label (int32, -1 for none) and one image column, in row groups of
about 6 MB, each page with a checksum. Images are uint8 in fixed-size binary, or float16 or float32 in Arrow's
fixed_shape_tensor (docs/pair-store.md). To resume, list the files, check each footer, and make what is missing.

Parquet stores checksums of pages, but not of its footer: one flipped bit there may send a reader to other rows. So the metadata
holds CRC-32 sums of each row group's rows and images, and of itself, and readers compare the data with the plan.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from beeline.errors import BeelineError
from pipeline.stage import fingerprint
from pipeline.storage import Folder

FORMAT = 2
ROW_GROUP_BYTES = 6 * 2**20
MAX_SHARD_BYTES = 128 * 2**20
READERS = 32  # footers read at once
OWN_CRC = "metadata_crc32"
GROUP_BYTES = 400  # of a row group's entry in the footer, measured


def shard_name(k: int) -> str:
    """Return the file name of work item k."""
    return f"part-{k:05d}.parquet"


def shard_rows(k: int, shard_size: int, count: int) -> range:
    """Return the indices that shard k holds."""
    return range(k * shard_size, min((k + 1) * shard_size, count))


def shard_count(count: int, shard_size: int) -> int:
    """Return the number of shards that hold `count` rows."""
    return -(-count // shard_size)


def group_rows(row_bytes: int) -> int:
    """Return the number of rows in a row group of images of `row_bytes` bytes each."""
    return max(1, ROW_GROUP_BYTES // row_bytes)


def encode(
    column: str, images: np.ndarray, labels: np.ndarray, indices: Iterable[int], plan: Mapping[str, Any], **facts: Any
) -> bytes:
    """Encode a shard as bytes. `images` (n, C, H, W) are uint8, float16 or float32; `facts` are added to the metadata."""
    shape = images.shape[1:]
    images, labels, indices = np.ascontiguousarray(images), np.asarray(labels, np.int32), np.array(list(indices), np.int64)
    row_bytes = images[0].nbytes
    size = group_rows(row_bytes)
    groups = [slice(start, start + size) for start in range(0, len(images), size)]
    if images.dtype == np.uint8:
        array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(row_bytes), len(images), [None, pa.py_buffer(images)])
    else:
        array = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    metadata = {
        "format": FORMAT,
        "column": column,
        "shape": list(shape),
        "dtype": str(images.dtype),
        "group_rows": size,
        "rows_crc32": [_crc(indices[group], labels[group]) for group in groups],
        "images_crc32": [_crc(images[group]) for group in groups],
        "plan": dict(plan),
        "plan_fingerprint": fingerprint(plan),
        **facts,
    }
    metadata[OWN_CRC] = _own_crc(metadata)
    fields = [
        pa.field("index", pa.int64()),
        pa.field("label", pa.int32()),
        pa.field(column, array.type, metadata={"shape": json.dumps(list(shape)), "dtype": str(images.dtype)}),
    ]
    table = pa.table(
        [pa.array(indices), pa.array(labels), array],
        schema=pa.schema(fields, metadata={"beeline": json.dumps(metadata, sort_keys=True)}),
    )
    sink = io.BytesIO()
    pq.write_table(
        table, sink, row_group_size=metadata["group_rows"], use_dictionary=False, compression="none",
        write_statistics=["index"],  # pyright: ignore[reportArgumentType]  (pyarrow takes column names)
        write_page_checksum=True,
    )  # fmt: skip
    return sink.getvalue()


def store_bytes(column: str, shape: Sequence[int], dtype: str, count: int, shard_size: int, plan: Mapping[str, Any]) -> int:
    """Bytes of a store of `count` images of `shape` (C, H, W) before it is made, to about 3 %: its rows, and the footers with
    the plan."""
    image = np.zeros((1, *shape), dtype)
    row = image.nbytes + 8 + 4  # index and label
    footer = len(encode(column, image, np.zeros(1, np.int32), [0], plan, x0_generator="", x0_crc32=0)) - row
    groups = -(-min(count, shard_size) // group_rows(image.nbytes))
    return count * row + shard_count(count, shard_size) * (footer + (groups - 1) * GROUP_BYTES)


class Columns(NamedTuple):
    """Rows of a shard: images (n, C, H, W) in their stored dtype, labels (n,) int32, indices (n,) int64."""

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray


def decode(data: bytes) -> tuple[Columns, dict[str, Any]]:
    """Decode a shard into rows and metadata, verifying every checksum: of pages, rows, images and metadata.

    Raises an exception of any type unless `data` is a whole shard of this format.
    """
    file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    metadata = shard_metadata(file.metadata)
    content = columns(file.read(), metadata)
    rows = range(int(content.indices[0]), int(content.indices[0]) + len(content.indices))
    check_footer(file.metadata, metadata, rows)
    size = metadata["group_rows"]
    for number, start in enumerate(range(0, len(rows), size)):
        check_group(
            Columns(*(column[start : start + size] for column in content)), metadata, rows[start : start + size], number
        )
    return content, metadata


def columns(table: pa.Table, metadata: Mapping[str, Any]) -> Columns:
    """Return the columns of (part of) a shard as arrays. Raises an exception of any type if their types are wrong."""
    shape = (len(table), *metadata["shape"])
    column = table[metadata["column"]].combine_chunks()
    types = table.schema.field("index").type, table.schema.field("label").type
    if types != (pa.int64(), pa.int32()) or any(column.null_count for column in table.columns):
        raise ValueError(f"index and label are {types[0]} and {types[1]}, or values are missing; expected int64 and int32")
    if metadata["dtype"] == "uint8":
        if column.type != pa.binary(int(np.prod(shape[1:]))):
            raise ValueError(f"images are {column.type}; expected shape {shape[1:]}")
        start = column.offset * column.type.byte_width
        images = np.frombuffer(column.buffers()[1], np.uint8)[start : start + int(np.prod(shape))].reshape(shape)
    else:
        images = column.to_numpy_ndarray().reshape(shape)
    return Columns(images, table["label"].to_numpy(), table["index"].to_numpy())


def shard_metadata(footer: pq.FileMetaData) -> dict[str, Any]:
    """Read Beeline's metadata from a shard's footer. Raises ValueError if the format or the metadata's checksum is wrong."""
    metadata = json.loads((footer.metadata or {}).get(b"beeline", b"{}"))
    if metadata.get("format") != FORMAT:
        raise ValueError(f"format {metadata.get('format')!r}, written by another version of Beeline; expected {FORMAT}")
    crc = metadata.pop(OWN_CRC, None)  # earlier shards of the format have none
    if crc is not None and crc != _own_crc(metadata):
        raise ValueError("the CRC-32 of its metadata does not match")
    return metadata


def check_footer(footer: pq.FileMetaData, metadata: Mapping[str, Any], rows: range) -> None:
    """Raise ValueError unless a shard's row groups hold exactly the indices `rows`."""
    size, groups = int(metadata["group_rows"]), [footer.row_group(i) for i in range(footer.num_row_groups)]
    expected = [rows[start : start + size] for start in range(0, len(rows), size)]
    lengths = [group.num_rows for group in groups]
    if lengths != [len(part) for part in expected] or footer.num_rows != len(rows):
        raise ValueError(f"{footer.num_rows} rows in {len(groups)} row groups; expected {len(rows)} in {len(expected)}")
    for group, part in zip(groups, expected, strict=True):
        statistics = group.column(0).statistics
        if statistics is not None and statistics.has_min_max and (statistics.min, statistics.max) != (part[0], part[-1]):
            raise ValueError(f"indices {statistics.min} to {statistics.max}; expected {part[0]} to {part[-1]}")


def check_group(group: Columns, metadata: Mapping[str, Any], rows: range, number: int) -> None:
    """Raise ValueError unless row group `number` of a shard holds the indices `rows` and its checksums match."""
    check_rows(group.indices, group.labels, metadata, rows, number)
    if group.images.shape != (len(rows), *metadata["shape"]) or str(group.images.dtype) != metadata["dtype"]:
        raise ValueError(
            f"images are {group.images.dtype} {group.images.shape}; expected {metadata['dtype']} {metadata['shape']}"
        )
    _compare(metadata, "images_crc32", number, group.images)


def check_rows(indices: np.ndarray, labels: np.ndarray, metadata: Mapping[str, Any], rows: range, number: int) -> None:
    """Check like `check_group`, without the images."""
    if not np.array_equal(indices, np.asarray(rows)):
        raise ValueError(f"{len(indices)} rows from index {indices[:1].tolist()} on; expected {len(rows)} from {rows[:1]}")
    classes = _classes(metadata["plan"])
    if len(labels) != len(rows) or (len(labels) and (labels.min() < -1 or labels.max() >= classes)):
        raise ValueError(f"{len(labels)} labels, up to {labels.max(initial=-1)}; expected {len(rows)} of {classes} classes")
    _compare(metadata, "rows_crc32", number, indices, labels)


def _classes(plan: Mapping[str, Any]) -> float:
    """Return the number of classes in a plan of images/ or pairs/, or infinity if it states none."""
    classes = plan.get("num_classes", plan.get("images", {}).get("num_classes"))
    return float("inf") if classes is None else classes


def _compare(metadata: Mapping[str, Any], key: str, number: int, *arrays: np.ndarray) -> None:
    if key in metadata and _crc(*arrays) != metadata[key][number]:  # earlier shards of the format have none
        raise ValueError(f"the CRC-32 of row group {number} does not match {key}")


def _crc(*arrays: np.ndarray) -> int:
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, crc)
    return crc


def _own_crc(metadata: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(metadata, sort_keys=True).encode())


def damage(folder: Folder, name: str, rows: range, plan_fingerprint: str) -> str | None:
    """Describe the damage of an existing shard, or return None: its footer must parse, name this plan and hold `rows`.

    Reads only the end of the file. Readers and verify_pairs.py find flipped bits in the rest.
    """
    try:
        with folder.open(name) as file:
            footer = pq.read_metadata(file)
        metadata = shard_metadata(footer)
        if metadata["plan_fingerprint"] != plan_fingerprint:
            return "made by another plan"
        check_footer(footer, metadata, rows)
    except BeelineError:
        raise
    except Exception as error:  # a damaged footer can raise anything
        return f"unreadable ({_message(error)})"
    return None


def _message(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Found(NamedTuple):
    """Content of a folder of shards: the size in bytes of each intact shard, and the remaining work items, in order."""

    sizes: dict[int, int]
    todo: list[int]


def survey(folder: Folder, plan: Mapping[str, Any], count: int, shard_size: int) -> Found:
    """Check the shards of a folder. Damaged ones are named in a printed line and made again."""
    files, shards = folder.sizes(), range(shard_count(count, shard_size))
    present = [k for k in shards if shard_name(k) in files]
    expected = fingerprint(plan)

    def trouble(k: int) -> str | None:
        return damage(folder, shard_name(k), shard_rows(k, shard_size, count), expected)

    sizes = {}
    with ThreadPoolExecutor(READERS) as readers:
        for k, problem in zip(present, readers.map(trouble, present), strict=True):
            if problem is None:
                sizes[k] = files[shard_name(k)]
            else:
                print(f"{folder}/{shard_name(k)}: {problem}; it will be made again", flush=True)
    return Found(sizes, [k for k in shards if k not in sizes])
