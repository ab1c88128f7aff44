"""Readers of images and of reference statistics, given thousands of damaged files: each ends with a result or BeelineError,
within bounded memory, and runs nothing. BEELINE_FUZZ=20 tries twenty times as many; -s shows the outcomes."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutations import CASES, mutated, mutated_json, mutated_value, outcomes
from PIL import Image

from beeline.config import EvaluateConfig, ImagesConfig
from beeline.errors import BeelineError
from beeline.files.arrays import pack
from evaluation.evaluate import _given_reference
from pipeline.sources import CorruptImage, open_source

LARGEST = 2**31  # bytes for pictures: 89 million pixels, converted once or twice
NAMES = [f"{k % 2}/img{k}.png" for k in range(4)]
FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA", "AVIF", "JPEG2000", "ICO", "QOI", "SGI", "DDS", "PCX")


def picture(form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(values).save(buffer, form)
    return buffer.getvalue()


PNG = picture()


def zip_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            file.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


LABELS = {"labels": [[name, k] for k, name in enumerate(NAMES)]}


def edm_zip(rng: random.Random) -> bytes:
    """Mutate bytes of EDM's zip."""
    return mutated(zip_of([*((name, PNG) for name in NAMES), ("dataset.json", json.dumps(LABELS).encode())]), rng)


def listing(rng: random.Random) -> bytes:
    """Write an intact zip with a dataset.json of other values."""
    return zip_of([*((name, PNG) for name in NAMES), ("dataset.json", mutated_json(LABELS, rng))])


def members(rng: random.Random) -> bytes:
    """Write an intact zip with files of other names."""
    parts = (
        "a",
        "b",
        "..",
        "",
        ".",
        "__MACOSX",
        "train",
        "val",
        "x\ny",
        "C:\\x",
        "dataset.json",
        "0.png",
        "1.JPG",
        "é",
        "00000",
    )
    names = ["/".join(rng.choices(parts, k=rng.randrange(1, 4))) for _ in range(rng.randrange(6))]
    with warnings.catch_warnings(action="ignore"):  # names that come twice
        return zip_of([(name, PNG if name.endswith("png") else b"{}") for name in [*names, rng.choice(NAMES)] if name])


def batches() -> list[tuple[str, bytes]]:
    found = {b"data": np.zeros((2, 3072), np.uint8)[:, ::1], b"labels": [0, 1], b"filenames": [b"a.png"] * 2}
    return [(f"cifar-10-batches-py/data_batch_{k}", pickle.dumps(found, protocol=2)) for k in range(1, 6)]


def cifar_bytes(rng: random.Random) -> bytes:
    """Mutate bytes of the packed archive, or of the tar."""
    data = tar_of(batches())
    return mutated(gzip.compress(data, 1, mtime=0), rng) if rng.random() < 0.5 else mutated(data, rng)


def cifar_batch(rng: random.Random) -> bytes:
    """Write an intact archive with a damaged pickle, mostly outside its pixels."""
    found = batches()
    name, data = found[0]
    head, zeros, tail = data[:150], data[150:-100], data[-100:]
    found[0] = name, mutated(head, rng) + zeros + (mutated(tail, rng) if rng.random() < 0.5 else tail)
    return tar_of(found)


def parquet(rng: random.Random) -> bytes:
    """Mutate bytes of Parquet as on the Hub, with and without compression and dictionaries."""
    cells: list[Any] = [{"bytes": PNG, "path": None}] * 5
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}}}
    if rng.random() < 0.2:
        features = mutated_value(features, rng)
    table = pa.table({"image": cells, "label": [0, 1, 0, 1, 0]}).replace_schema_metadata({"huggingface": json.dumps(features)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression=rng.choice(("none", "snappy", "zstd")), use_dictionary=rng.random() < 0.5)
    data = buffer.getvalue()
    cut = rng.choice((0, len(data) // 2))  # the second half is the footer
    return data[:cut] + mutated(data[cut:], rng)


def picture_bytes(rng: random.Random) -> bytes:
    """Mutate bytes of a picture of any format."""
    return mutated(PICTURES[rng.randrange(len(PICTURES))], rng)


PICTURES = [picture(form) for form in FORMATS]


def reference(rng: random.Random) -> bytes:
    """Mutate bytes of EDM's statistics, plain and compressed."""
    arrays = {"mu": np.zeros(4), "sigma": np.eye(4)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return mutated(pack(arrays) if rng.random() < 0.5 else buffer.getvalue(), rng)


def use_source(path: Path) -> None:
    """Open a source and decode its first images."""
    source = open_source(ImagesConfig(source=str(path), resolution=8, channels=3))
    for index in range(min(2, len(source.names))):
        try:
            assert source.image(index).shape == (3, 8, 8)
        except CorruptImage as error:
            raise BeelineError(str(error)) from error


def use_folder(path: Path) -> None:
    use_source(path.parent)


def use_reference(path: Path) -> None:
    _given_reference(EvaluateConfig(features=("inception",), reference=str(path)))


@pytest.mark.parametrize(
    ("damage", "name", "count", "use"),
    [
        (edm_zip, "a.zip", 600, use_source),
        (listing, "a.zip", 600, use_source),
        (members, "a.zip", 400, use_source),
        (cifar_bytes, "a.tar.gz", 400, use_source),
        (cifar_batch, "a.tar.gz", 400, use_source),
        (parquet, "a.parquet", 600, use_source),
        (picture_bytes, "folder/a.png", 1500, use_folder),
        (reference, "a.npz", 500, use_reference),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_files(
    tmp_path: Path, damage: Callable[[random.Random], bytes], name: str, count: int, use: Callable[[Path], None]
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)

    def cases() -> Iterator[bytes]:
        for k in range(count * CASES):
            data = damage(random.Random(f"{damage.__name__} {k}"))
            path.write_bytes(data)
            yield data

    next(cases())
    with contextlib.suppress(BeelineError):
        use(path)  # what is imported and started once is not counted
    largest = LARGEST if name.endswith("png") else 2**29
    counts = outcomes(lambda _: use(path), cases(), memory=largest)
    print(f"{damage.__name__}: {counts.total():,} files, {dict(counts)}")
    assert counts["result"]
    assert counts["BeelineError"]
    assert sorted(os.listdir(tmp_path)) == [name.split("/")[0]]
