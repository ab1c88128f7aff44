"""Parquet files with a column of encoded images, plain binary or {bytes, path} as on the Hugging Face Hub, and optionally a
column of classes.

Row groups are read from start to end, a page at a time: an image cannot be read without those before it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from beeline.config import ImagesConfig
from beeline.errors import BeelineError, reading
from pipeline.sources.labels import Classes, class_indices, unlabelled
from pipeline.sources.listing import Entries, check_splits
from pipeline.sources.pixels import MAX_BYTES, Pixels, kind_of

LABELS = (
    *("label", "labels", "class", "fine_label", "target", "targets", "category"),
    *("class_id", "class_label", "class_idx", "label_id", "category_id", "cls", "y"),
)
CLASS_TYPES = (
    *(pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string),
    *(pa.types.is_dictionary, pa.types.is_null),
)
MAGIC = b"PAR1"
ROWS = 8  # images decoded from Parquet at once
MAX_RATIO = 100  # compression ratio that images in Parquet can reach; they are compressed already
FEW = 2**20  # rows that even a small file may have, because repeated cells take no space
BUFFER = 2**20  # bytes read at once


class Columns(NamedTuple):
    """Names of the columns of images and of classes (None if there is none), and the classes' names."""

    image: str
    label: str | None
    names: Sequence[str]
    others: Sequence[str]


class ParquetImages:
    """Rows of the file `config.source`, or of the files `entries` in that folder, one file after the other."""

    sequential = True

    def __init__(self, config: ImagesConfig, entries: Entries) -> None:
        self.pixels = Pixels(config)
        files = [os.path.join(config.source, name) for name in entries.tables] or [config.source]
        check_splits({word: os.path.basename(file) for file in files for word in _words(file, config.source)}, config.source)
        self._groups: list[tuple[int, str, int]] = []  # first row, file, row group
        self.names: list[str] = []
        labels: list[Any] = []
        columns: Columns | None = None
        for file in files:
            with reading(f"{file} cannot be read", "expected a Parquet file with a column of images"):
                file_columns, more = self._survey(file)
            if columns is not None and file_columns[:2] != columns[:2]:
                raise BeelineError(
                    f"{file} has the columns {_described(file_columns)}, {files[0]} {_described(columns)}; expected the same "
                    f"in all files of {config.source}"
                )
            columns = file_columns
            labels += more
        if columns is None or not self.names:
            raise BeelineError(f"{config.source} holds no rows; expected Parquet with images")
        self._column = columns.image
        self.classes: Classes = unlabelled(len(self.names))
        self.notes = [f"images and classes from the columns {_described(columns)}", *entries.ignored()]
        if columns.label:
            with reading(f"the column {columns.label} of {config.source} cannot be read", "expected class indices"):
                classes = class_indices(labels, self.names, f"the column {columns.label} of {config.source}")
                self.classes = classes._replace(names=classes.names or columns.names)
        if columns.others:
            self.notes.append(f"ignored the columns {', '.join(columns.others)}")
        self._starts = np.array([start for start, *_ in self._groups])
        self._at: tuple[int, int] = (-1, 0)  # row group, and first row of the last batch read
        self._batch: pa.Array = pa.nulls(0)
        self._batches: Iterator[pa.RecordBatch] = iter(())
        with reading(f"{files[0]} cannot be read", "expected a Parquet file with a column of images"):
            if all(_encoded(self._value(row)) is None for row in range(min(ROWS, len(self.names)))):
                raise BeelineError(
                    f"{files[0]} holds only the paths of its images: column {columns.image} has no bytes. Write it again with "
                    "the images in it (datasets: embed_external_files=True), or give the folder of images"
                )

    def image(self, index: int) -> np.ndarray:
        return self.pixels.decoded(lambda: _bytes(self._value(index)), self.names[index])

    def _survey(self, file: str) -> tuple[Columns, list[Any]]:
        """Read the columns of a file and its labels, and record its row groups."""
        _require_parquet(file)
        with pq.ParquetFile(file) as opened:
            metadata, columns = opened.metadata, _columns(opened.schema_arrow, file)
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            _check_sizes(groups, file)
            first = len(self.names)
            for number, group in enumerate(groups):
                self._groups.append((len(self.names), file, number))
                start = len(self.names) - first
                self.names += [f"{os.path.basename(file)} row {start + row}" for row in range(group.num_rows)]
            return columns, _labels(opened, columns.label, file) if columns.label else []

    def _value(self, index: int) -> Any:
        """Return the cell of a row. Continues from the last row read; an earlier row restarts the row group."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        group, start = self._at
        if number != group or index < start:
            first, file, inner = self._groups[number]
            opened = pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
            self._batches = opened.iter_batches(ROWS, row_groups=[inner], columns=[self._column])
            self._batch, start = next(self._batches).column(0), first
        while index >= start + len(self._batch):
            start += len(self._batch)
            self._batch = next(self._batches).column(0)
        self._at = number, start
        return self._batch[index - start].as_py()


def _labels(opened: pq.ParquetFile, column: str, file: str) -> list[Any]:
    """Read the cells of a column. Strings are read as a dictionary, so that a repeated word is in memory once."""
    kind = opened.schema_arrow.field(column).type
    if not any(is_kind(kind) for is_kind in CLASS_TYPES):
        raise BeelineError(f"the column {column} of {file} holds {kind}; expected one class for each image: a number or a word")
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        cells = pq.read_table(file, columns=[column], read_dictionary=[column])[column]
    else:
        cells = opened.read(columns=[column])[column]
    labels: list[Any] = []
    for chunk in cells.chunks:
        if pa.types.is_dictionary(chunk.type):
            known = [*chunk.dictionary.to_pylist(), None]
            labels += [known[-1 if index is None else index] for index in chunk.indices.to_pylist()]
        else:
            labels += chunk.to_pylist()
    return labels


def _require_parquet(file: str) -> None:
    with open(file, "rb") as opened:
        start = opened.read(200)
    if not start.startswith(MAGIC):
        raise BeelineError(f"{file} is not Parquet: {kind_of(start)}")


def _words(file: str, source: str) -> list[str]:
    """Split a file's name within the source into words, in lower case."""
    name = os.path.relpath(file, source) if file != source else ""
    return re.split(r"[^a-z]+", name.lower())


def _columns(schema: pa.Schema, file: str) -> Columns:
    images = [field.name for field in schema if _holds_images(field.type)]
    if len(images) != 1:
        types = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise BeelineError(
            f"{file} has the columns {types}; expected one column of images (binary, or a struct with bytes), found "
            f"{len(images)}"
        )
    classes = _class_names(schema)
    known = sorted((name for name in schema.names if name.lower() in LABELS), key=lambda name: LABELS.index(name.lower()))
    label = next((name for name in [*(name for name in known if name in classes), *classes, *known]), None)
    others = [name for name in schema.names if name not in (images[0], label)]
    return Columns(images[0], label, classes.get(label or "", ()), others)


def _class_names(schema: pa.Schema) -> dict[str, Sequence[str]]:
    """Return the columns that the Hub's metadata declare as class labels, with the names of their classes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: kind for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"}
        return {name: [str(word) for word in kind.get("names", ())] for name, kind in kinds.items() if name in schema.names}
    except (KeyError, TypeError, AttributeError, ValueError):  # metadata of other software can be anything
        return {}


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        parts = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return "bytes" in parts and (_holds_images(parts["bytes"]) or pa.types.is_null(parts["bytes"]))
    if pa.types.is_dictionary(kind):
        return _holds_images(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _check_sizes(groups: Sequence[pq.RowGroupMetaData], file: str) -> None:
    """Raise BeelineError if row groups claim far more memory than the file's size allows.

    Reads only the row groups' own sizes: Arrow crashes the process on damaged column metadata.
    """
    rows, size = sum(group.num_rows for group in groups), os.path.getsize(file)
    unpacked = max((group.total_byte_size for group in groups), default=0)
    few = all(group.num_rows >= 0 for group in groups) and rows <= max(size, FEW)
    if not few or unpacked > max(MAX_BYTES, MAX_RATIO * size):
        raise BeelineError(
            f"{file} has {size:,} bytes but claims {rows:,} rows, and row groups of up to {unpacked:,} bytes; it is damaged, "
            "or was not written for images"
        )


def _encoded(value: Any) -> bytes | None:
    return value["bytes"] if isinstance(value, dict) else value


def _bytes(value: Any) -> bytes:
    data = _encoded(value)
    if data is None:
        path = value.get("path") if isinstance(value, dict) else None
        raise ValueError(f"no bytes, only the path {path}" if path else "null")
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data):,} bytes, expected at most {MAX_BYTES:,}")
    return data


def _described(columns: Columns) -> str:
    return f"{columns.image} and {columns.label}" if columns.label else f"{columns.image} without classes"
