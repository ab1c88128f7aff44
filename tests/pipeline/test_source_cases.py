"""Inputs that users give as images.source: used correctly if they are clear, refused in one line if not, and nothing is left
out silently. Also tries the inputs in ../shared/cases, if they exist."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import ROOT, Run
from mutations import bounded
from PIL import Image, ImageOps

from beeline.config import EvaluateConfig, ImagesConfig
from beeline.errors import BeelineError
from evaluation.evaluate import _given_reference
from pipeline.sources import CorruptImage, Source, open_source
from pipeline.sources.labels import summary

CASES = ROOT.parent / "shared" / "cases"
EDM = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00000002.png", "00001/img00000003.png"]


def picture(value: int = 100, mode: str = "RGB", form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 12), (value,) * 3).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


PNG = picture()


def opened(path: Path, **settings: Any) -> Source:
    return open_source(ImagesConfig(**{"source": str(path), "resolution": 8, "channels": 3, **settings}))


def folder(place: Path, *names: str, **contents: bytes) -> Path:
    """Write a folder of files: images by these names, and others with their contents."""
    for name, data in {**dict.fromkeys(names, PNG), **contents}.items():
        (place / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "data" / name).write_bytes(data)
    return place / "data"


def zipped(place: Path, *names: str, contents: dict[str, bytes] | None = None, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Write a zip of such files."""
    with zipfile.ZipFile(place / "data.zip", "w", method) as file:
        for name, data in [*((name, PNG) for name in names), *(contents or {}).items()]:
            file.writestr(zipfile.ZipInfo(name), data, method)
    return place / "data.zip"


def listed(place: Path, labels: Any, names: list[str] = EDM, prefix: str = "") -> Path:
    """Write EDM's zip with these labels, or with this whole dataset.json."""
    found = labels if isinstance(labels, bytes) else json.dumps({"labels": labels}).encode()
    return zipped(place, *(prefix + name for name in names), contents={f"{prefix}dataset.json": found})


def each(*labels: Any) -> list[list[Any]]:
    return [[name, label] for name, label in zip(EDM, labels, strict=True)]


def table(place: Path, features: dict[str, Any] | None = None, name: str = "data.parquet", **columns: Any) -> Path:
    """Write a Parquet file, with metadata as the Hugging Face Hub writes them."""
    made = pa.table(columns)
    if features:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, place / name)
    return place / name


def cells(count: int = 4) -> list[dict[str, Any]]:
    return [{"bytes": PNG, "path": f"{k}.png"} for k in range(count)]


def splits(place: Path) -> Path:
    for part in ("train", "test"):
        table(place, name=f"hub/data/{part}-00000-of-00001.parquet", image=cells())
    return place / "hub"


def mixed(place: Path) -> Path:
    table(place, name="both/0.parquet", image=cells(), label=[0] * 4)
    return table(place, name="both/1.parquet", img=cells()).parent


def both(place: Path) -> Path:
    folder(place, "0.png")
    return table(place, name="data/a.parquet", image=cells()).parent


def tarred(place: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(place / "data.tar.gz", "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return place / "data.tar.gz"


def batch(count: int = 2, **others: Any) -> bytes:
    found = {"data": np.zeros((count, 3072), np.uint8), "labels": list(range(count)), **others}
    return pickle.dumps({key.encode(): value for key, value in found.items() if value is not None}, protocol=2)


def cifar(place: Path, **changed: bytes) -> Path:
    return tarred(place, {f"data_batch_{k}": batch() for k in range(1, 6)} | changed)


def linked(place: Path, target: str = "cat") -> Path:
    found = folder(place, "cat/0.png", "dog/0.png")
    (found / "fox").symlink_to(target)
    return found


def outside(place: Path) -> Path:
    """Write a class folder that is a link to a folder elsewhere."""
    folder(place / "elsewhere", "0.png")
    found = folder(place, "cat/0.png")
    (found / "dog").symlink_to(place / "elsewhere/data")
    return found


def pipe(place: Path) -> Path:
    found = folder(place, "0.png")
    os.mkfifo(found / "1.png")
    return found


def nowhere(place: Path) -> Path:
    found = folder(place, "0.png")
    (found / "1.png").symlink_to(".git/annex/objects/1.png")
    return found


def as_bytes(place: Path) -> Path:
    """Write a file whose name is not UTF-8, and one whose name has a line break."""
    found = folder(place, "a\nb.png")
    with open(os.path.join(os.fsencode(found), b"caf\xe9.png"), "wb") as file:
        file.write(PNG)
    return found


HUB = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
Make = Callable[[Path], Path]
# What it is, how to make it, its labels, and what is said of it.
USED: list[tuple[str, Make, list[int], str]] = [
    ("one class folder", lambda p: folder(p, "cat/0.png", "cat/1.png"), [-1, -1], "2 images without classes"),
    ("class folders", lambda p: folder(p, "b/0.png", "a/1.PNG", "a/2.png"), [0, 0, 1],
     r"from 1 in class 1 \(b\) to 2 in class 0 \(a\)"),
    ("class folders further down", lambda p: folder(p, "x/train/a/0.png", "x/train/b/1.png"), [0, 1], "2 classes"),
    ("folders within class folders", lambda p: folder(p, "a/images/0.png", "b/images/1.png"), [0, 1], "2 classes"),
    ("folders named by numbers", lambda p: folder(p, *(f"{k}/0.png" for k in range(11))), [0, 1, 10, *range(2, 10)],
     "11 classes"),
    ("EDM's zip, unpacked", lambda p: folder(p, *EDM, **{"dataset.json": json.dumps({"labels": each(6, 9, 0, 9)}).encode()}),
     [6, 9, 0, 9], "7 of the classes have no images, the first of them class 1|from dataset.json"),
    ("hidden files",
     lambda p: folder(p, "a/0.png", "b/0.png", ".trash/0.png", "a/._0.png", "b/.DS_Store", "b/Thumbs.db", "@eaDir/0.png"),
     [0, 1], r"ignored 5 hidden files \(\.trash, @eaDir/0\.png, a/\._0\.png, \.\.\.\)"),
    ("other files", lambda p: folder(p, "0.png", "notes.txt", "1.heic", "2.eps"), [-1],
     r"ignored 3 other files \(1\.heic, 2\.eps, notes\.txt\)"),
    ("a folder that is a link", outside, [0, 1], "2 classes"),
    ("a link to a folder beside it", linked, [0, 1], r"ignored 1 other file \(fox\)"),
    ("a link in a circle", lambda p: linked(p, "."), [0, 1], r"ignored 1 other file \(fox\)"),
    ("a link to the folder above", lambda p: linked(p, "../.."), [0, 1], r"ignored 1 other file \(fox\)"),
    ("names of any kind", as_bytes, [-1, -1], "2 images"),
    ("a zip of class folders", lambda p: zipped(p, "cat/", "cat/0.png", "dog/0.png"), [0, 1], r"\(cat\)"),
    ("a zip with dataset.json one folder down", lambda p: listed(p, each(1, 0, 1, 1), prefix="cifar/"), [1, 0, 1, 1],
     "cifar/dataset"),
    ("a Mac's zip", lambda p: listed(p, each(0, 1, 0, 1), names=[*EDM, "__MACOSX/00000/._img00000000.png"]), [0, 1, 0, 1],
     "ignored 1 hidden"),
    ("a zip in a zip", lambda p: zipped(p, "0.png", "more.zip"), [-1], r"ignored 1 other file \(more\.zip\)"),
    ("backslashes", lambda p: listed(p, [[name.replace("/", "\\"), 1] for name in EDM], [n.replace("/", "\\") for n in EDM]),
     [1] * 4, "classes from"),
    ("names that lead elsewhere", lambda p: zipped(p, "/root/cat/0.png", "../root/dog/0.png"), [0, 1], r"\(cat\)"),
    ("EDM's folders without labels", lambda p: zipped(p, *EDM), [-1] * 4, "numbered folders"),
    ("labels null", lambda p: listed(p, None), [-1] * 4, "without classes"),
    ("labels of -1 throughout", lambda p: listed(p, each(-1, -1, -1, None)), [-1] * 4, "without classes"),
    ("dataset.json with a byte order mark",
     lambda p: listed(p, b"\xef\xbb\xbf" + json.dumps({"labels": each(0, 1, 0, 1)}).encode()), [0, 1, 0, 1], ""),
    ("whole floats", lambda p: listed(p, each(0.0, 1.0, 2.0, 1.0)), [0, 1, 2, 1], ""),
    ("truth values", lambda p: listed(p, each(True, False, False, True)), [1, 0, 0, 1], ""),
    ("numbers in quotes", lambda p: listed(p, each("10", "9", "0", "10")), [10, 9, 0, 10], ""),
    ("words", lambda p: listed(p, each("dog", "cat", "cat", "dog")), [1, 0, 0, 1], r"\(cat\)"),
    ("one-hot", lambda p: listed(p, each([0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0])), [1, 0, 2, 1], "3 classes"),
    ("labels by name", lambda p: listed(p, dict(each(0, 1, 0, 1))), [0, 1, 0, 1], ""),
    ("a class without images", lambda p: listed(p, each(3, 7, 3, 3)), [3, 7, 3, 3], "6 of the classes have no images"),
    ("the Hub", lambda p: table(p, HUB, image=cells(), label=[1, 0, 1, 1]), [1, 0, 1, 1],
     r"1 in class 0 \(cat\) to 3 in class 1 \(dog\)"),
    ("the Hub, its label by another name",
     lambda p: table(p, {"breed": HUB["label"]}, img=cells(), id=[5, 6, 7, 8], breed=[1, 0, 1, 1]), [1, 0, 1, 1],
     r"columns img and breed|ignored the columns id"),
    ("a column called target", lambda p: table(p, pixel_values=[PNG] * 4, target=[1, 0, 1, 0]), [1, 0, 1, 0],
     "pixel_values and target"),
    ("other columns alone", lambda p: table(p, image=cells(), width=[12] * 4), [-1] * 4,
     "without classes|ignored the columns width"),
    ("fine and coarse labels", lambda p: table(p, img=cells(), coarse_label=[0] * 4, fine_label=[0, 1, 2, 3]), [0, 1, 2, 3],
     "coarse_label"),
    ("Parquet, words", lambda p: table(p, image=cells(), label=pa.array(["b", "a", "b", "b"]).dictionary_encode()),
     [1, 0, 1, 1], r"\(b\)"),
    ("Parquet, nulls alone", lambda p: table(p, image=cells(2), label=pa.array([None, None], pa.int64())), [-1, -1],
     "without classes"),
    ("Parquet files in folders", lambda p: table(p, name="data/data/train-00000-of-00001.parquet", image=cells(2)).parents[1],
     [-1, -1], ""),
    ("CIFAR-10", cifar, [0, 1] * 5, "10 images in 2 classes"),
    ("CIFAR-100",
     lambda p: tarred(p, {"cifar-100-python/train": batch(labels=None, fine_labels=[0, 1]), "cifar-100-python/test": b""}),
     [0, 1], "fine"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "labels", "said"), [case[1:] for case in USED], ids=[case[0] for case in USED])
def test_what_is_clear_is_used(tmp_path: Path, make: Make, labels: list[int], said: str) -> None:
    source = opened(make(tmp_path))
    assert source.classes.labels.tolist() == labels
    notes = "; ".join([summary(source.classes), *source.notes])
    assert all(re.search(part, notes) for part in said.split("|")), notes
    for index in range(len(labels)):
        assert source.image(index).shape == (3, 8, 8)


def pixel_bomb() -> bytes:
    """A PNG that claims 60,000 x 60,000 pixels."""
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + PNG[24:29]
    return PNG[:12] + header + zlib.crc32(header).to_bytes(4, "big") + PNG[33:]


REFUSED: list[tuple[str, Make, str]] = [
    ("nothing", lambda p: p / "nothing", "does not exist"),
    ("an empty folder", lambda p: folder(p, ".hidden").parent / "data", "no images in .*; it holds 1 hidden file"),
    ("an empty file", lambda p: folder(p, **{"a.zip": b""}) / "a.zip", r"\(it is empty\) is neither"),
    ("a web page", lambda p: folder(p, **{"a.zip": b"<!DOCTYPE html><html>404"}) / "a.zip", "it is a web page"),
    ("a pointer of Git LFS", lambda p: folder(p, **{"a.parquet": b"version https://git-lfs.github.com/spec/v1"}),
     "git lfs pull"),
    ("train and val", lambda p: folder(p, "train/a/0.png", "val/a/1.png"), "several splits of a data set: train, val"),
    ("train and test, each with labels",
     lambda p: folder(p, "train/a.png", "train/dataset.json", "test/a.png", "test/dataset.json"), "holds 2 data sets"),
    ("images beside class folders", lambda p: folder(p, "cat/0.png", "dog/0.png", "1.png"),
     r"1 images next to its folders of images, the first of them 1\.png"),
    ("two levels of classes", lambda p: folder(p, "animal/cat/0.png", "animal/dog/0.png", "car/0.png"),
     "animal/cat and animal/dog"),
    ("a pipe", pipe, r"1\.png is not a regular file"),
    ("a link that leads nowhere", nowhere, r"1\.png is not a regular file"),
    ("images and Parquet", both,
     "images .* and Parquet"),
    ("save_to_disk", lambda p: folder(p, "data-00000-of-00001.arrow", "state.json"), "save_to_disk.*to_parquet"),
    ("CIFAR-10 unpacked", lambda p: folder(p, "data_batch_1", "batches.meta"), "archive itself"),
    ("arrays", lambda p: folder(p, "a.npy", "b.npy"), "no images in .*2 other files"),
    ("a multi-label", lambda p: listed(p, each([0, 1], [1, 1], [0, 1], [0, 1])),
     r"img00000001.png the label \[1, 1\].*not several"),
    ("fractions", lambda p: listed(p, each(0, 0.5, 1, 1)), r"label 0\.5; expected a whole number"),
    ("not a number", lambda p: listed(p, each(0, float("nan"), 1, 1)), "label nan"),
    ("words and numbers", lambda p: listed(p, each(0, "cat", 1, 1)), "label 'cat'"),
    ("-1 among classes", lambda p: listed(p, each(-1, 0, 1, None)), "2 of 4 images no class"),
    ("a huge label", lambda p: listed(p, each(0, 2**40, 1, 1)), "label 1099511627776; expected a class index below"),
    ("labels from 1", lambda p: listed(p, each(1, 2, 3, 1)), "labels 1 to 3; class indices count from 0"),
    ("too few labels", lambda p: listed(p, each(0, 1, 0, 1)[:3]), "no label for 1 images, the first of them 00001/img00000003"),
    ("too many labels", lambda p: listed(p, each(0, 1, 0, 1), EDM[:3]), "lists 1 images that do not exist"),
    ("labels twice", lambda p: listed(p, [*each(0, 1, 0, 1), [EDM[0], 1]]), "lists 1 names twice"),
    ("no labels", lambda p: listed(p, b'{"classes": []}'), 'has no "labels"'),
    ("a list for a dict", lambda p: listed(p, b"[]"), 'has no "labels"'),
    ("a number for labels", lambda p: listed(p, 7), "dataset.json in .*data.zip cannot be read"),
    ("no JSON", lambda p: listed(p, b'{"labels": [["a", 1],]}'), "dataset.json in .*data.zip cannot be read .*line 1 column"),
    ("deep JSON", lambda p: listed(p, b"[" * 10**5 + b"]" * 10**5), "dataset.json in .* cannot be read"),
    ("long JSON", lambda p: listed(p, b" " * 2**21), "2,097,152 bytes, expected at most"),
    ("a zip with a name twice", lambda p: zipped(p, "a.png", "./a.png"), r"holds a\.png twice"),
    ("a zip with bzip2", lambda p: zipped(p, "a.png", method=zipfile.ZIP_BZIP2), r"a\.png in .* is compressed with bzip2"),
    ("a zip without images", lambda p: zipped(p, "a.txt"), r"no images in .*1 other file \(a\.txt\)"),
    ("half a zip", lambda p: folder(p, **{"a.zip": zipped(p, *EDM).read_bytes()[:300]}) / "a.zip", "neither"),
    ("paths without bytes", lambda p: table(p, image=[{"bytes": None, "path": "/a.png"}] * 2),
     "holds only the paths of its images"),
    ("two columns of images", lambda p: table(p, image=cells(), mask=cells()), "found 2"),
    ("lists of images", lambda p: table(p, images=[cells(), cells()]), r"images \(list<.*found 0"),
    ("Parquet, a huge label", lambda p: table(p, image=cells(1), label=[2**40]), "row 0 the label 1099511627776"),
    ("Parquet, a null among labels", lambda p: table(p, image=cells(2), label=[0, None]), "1 of 2 images no class"),
    ("Parquet, lists of classes", lambda p: table(p, image=cells(2), label=[[0, 1], [1, 0]]), "holds list<.*one class for"),
    ("no rows", lambda p: table(p, image=pa.array([], pa.binary())), "holds no rows"),
    ("Parquet of train and test",
     splits,
     "several splits of a data set: test-00000-of-00001.parquet, train-"),
    ("schemas that differ",
     mixed,
     "1.parquet has the columns img without classes, .*0.parquet image and label"),
    ("one batch of CIFAR's", lambda p: tarred(p, {"data_batch_1": batch()}), "a tar with data_batch_1 alone"),
    ("CIFAR-10 for C", lambda p: tarred(p, {f"data_batch_{k}.bin": b"\0" for k in range(1, 6)}), "is damaged|a tar with"),
    ("a tar of images", lambda p: tarred(p, {"a/0.png": PNG, "b/0.png": PNG}), "a tar with none of them.*unpack any other tar"),
    ("labels that are too few for a batch", lambda p: cifar(p, data_batch_3=batch(labels=[1])),
     "data_batch_3 in .* is damaged"),
    ("a batch of 10 bytes that asks for 3 GB", lambda p: cifar(p, data_batch_1=b"\x80\x02Nr\xff\xff\xff\x7f."),
     "data_batch_1 in .* is damaged"),
    ("a batch that asks for 2^40 bytes",
     lambda p: cifar(p, data_batch_1=b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"."), "is damaged"),
    ("a batch with a key whose hash takes for ever",  # a tuple of the tuple before, twice, a hundred times
     lambda p: cifar(p, data_batch_1=b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"}h\x00Ns."), "a tuple is a key"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "said"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_is_not_clear_is_refused(tmp_path: Path, make: Make, said: str) -> None:
    path = make(tmp_path)
    with bounded(), pytest.raises(BeelineError, match=said) as caught:
        opened(path)
    assert str(caught.value).isprintable()
    assert "BytesIO" not in str(caught.value)


CORRUPT: list[tuple[str, bytes, str]] = [
    ("empty", b"", "it is empty"),
    ("truncated", picture(form="JPEG")[:300], "(?i)truncated"),
    ("a web page", b"<html>", "it is a web page"),
    ("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("EPS, which is a program", picture(form="EPS"), "unknown format"),
    ("too many pixels", pixel_bomb(), "decompression bomb"),
    ("floats", picture(mode="F", form="TIFF"), "32-bit pixels"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "said"), [case[1:] for case in CORRUPT], ids=[case[0] for case in CORRUPT])
def test_an_image_that_cannot_be_used_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    for path in (
        folder(tmp_path, **{"b.png": data}),
        zipped(tmp_path, contents={"b.png": data}),
        table(tmp_path, image=[data]),
    ):
        source = opened(path)
        with pytest.raises(CorruptImage, match=said) as caught:
            source.image(0)
        assert re.match(r"b\.png|data\.parquet row 0", str(caught.value))
        assert "BytesIO" not in str(caught.value)


def test_an_image_of_a_size_that_no_image_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.folder.MAX_BYTES", 1000)
    monkeypatch.setattr("pipeline.sources.archive.MAX_BYTES", 1000)
    for path in (folder(tmp_path, **{"b.png": bytes(2000)}), zipped(tmp_path, contents={"b.png": bytes(2000)})):
        with pytest.raises(CorruptImage, match=r"b\.png .*2,000 bytes, expected at most 1,000"):
            opened(path).image(0)
    path = zipped(tmp_path, contents={"b.png": bytes(10**6)})
    path.write_bytes(path.read_bytes().replace((10**6).to_bytes(4, "little"), (200).to_bytes(4, "little")))  # what it claims
    with bounded(), pytest.raises(CorruptImage, match="CRC"):
        opened(path).image(0)


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files that unpack to far too much."""
    monkeypatch.setattr("pipeline.sources.cifar.MAX_UNPACKED", 2**24)
    with gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=1) as file:
        info = tarfile.TarInfo("data_batch_1")
        info.size = 2**28
        file.write(info.tobuf() + bytes(2**26))
    with bounded(), pytest.raises(BeelineError, match="unpacks to over 16,777,216 bytes"):
        opened(tmp_path / "a.tar.gz")
    pq.write_table(pa.table({"image": [bytes(2**27 + 1)]}), tmp_path / "a.parquet", compression="zstd", write_statistics=False)
    with bounded(), pytest.raises(BeelineError, match="claims 1 rows, and row groups of up to 134,"):
        opened(tmp_path / "a.parquet")
    rows = pa.array(np.zeros(2**22, np.int8)).dictionary_encode()
    images = pa.DictionaryArray.from_arrays(rows.indices, pa.array([PNG]))
    pq.write_table(pa.table({"image": images}), tmp_path / "b.parquet")
    with bounded(), pytest.raises(BeelineError, match="claims 4,194,304 rows"):
        opened(tmp_path / "b.parquet")


# Pixels -----------------------------------------------------------------------------------------------------------------


def pixels(tmp_path: Path, **settings: Any) -> tuple[np.ndarray, dict[str, int]]:
    source = opened(tmp_path, resolution=12, **settings)
    return source.image(0), dict(source.pixels.changes)


@pytest.mark.parametrize(("suffix", "form"), [("png", "PNG"), ("pgm", "PPM"), ("tif", "TIFF"), ("jp2", "JPEG2000")])
def test_16_bits_are_scaled(tmp_path: Path, suffix: str, form: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 12).astype(np.uint16), (12, 1))
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}", form)
    image, changes = pixels(tmp_path, channels=1)
    assert np.abs(image[0] - ramp / 257).max() <= 0.5
    assert changes == {"had 16 bits per channel and were scaled to 8": 1}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    image, changes = pixels(tmp_path)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    assert (image == np.asarray(expected).transpose(2, 0, 1)).all()
    assert len(changes) == (orientation > 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_composed_on_white(tmp_path: Path, mode: str) -> None:
    """The left half is transparent with black below it; palette and RGB images name the transparent colour."""
    values = np.full((12, 12, 4), (200, 200, 200, 255), np.uint8)
    values[:, :6] = 0
    options = {"P": {"transparency": 0}, "RGB": {"transparency": (0, 0, 0)}}.get(mode, {})
    Image.fromarray(values).convert(mode).save(tmp_path / "a.png", **options)
    image, changes = pixels(tmp_path)
    assert image[:, 0, 0].tolist() == [255] * 3
    assert image[:, 0, -1].tolist() == [200] * 3
    assert changes == {"had transparent parts and were composed on white": 1}


@pytest.mark.parametrize(
    ("mode", "form"), [("1", "PNG"), ("L", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("YCbCr", "JPEG")]
)
def test_opaque_pictures_of_any_mode_stay_as_they_are(tmp_path: Path, mode: str, form: str) -> None:
    (tmp_path / "a.png").write_bytes(picture(255, mode, form))
    image, changes = pixels(tmp_path)
    assert image.min() >= 254
    assert not changes


def test_of_a_film_the_first_frame_is_taken_and_it_is_said(tmp_path: Path) -> None:
    frames = [Image.new("L", (12, 12), value) for value in (50, 100, 150)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    image, changes = pixels(tmp_path)
    assert image.max() == 50
    assert changes == {"had several frames; the first was used": 1}


# The command ------------------------------------------------------------------------------------------------------------

# In the shared folder: labels where they are used, else what the one line says.
SHARED: dict[str, list[int] | str] = {
    "c01_16bit": [-1], "c02_alpha": [-1], "c03_exif": [-1], "c05_suffix": [-1] * 7,
    "c07_mac.zip": [-1] * 3, "c07b_mac_labels.zip": [0, 1], "c08_edmfolder": [6, 9, 9, 4, 1, 1],
    "c10_classzip.zip": [0, 0, 0, 1, 1, 1], "c11_nolabelskey.zip": 'has no "labels"', "c13_multilabel.zip": "not several",
    "c14_float.zip": "whole number", "c16_words.zip": [0] * 6, "c18_trailingcomma.zip": "dataset.json in .* cannot be read",
    "c19b_onebased.zip": "count from 0", "c20_negative.zip": "no class", "c20b_huge.zip": "below",
    "c22_backslash.zip": [0, 1, 0, 1, 0, 1], "c23_enc.zip": "is encrypted", "c24_deflate64.zip": "with Deflate64",
    "c25_baddeflate.zip": "img00000000.png .*decompressing", "c29_trainval": "several splits", "c29f_hidden": [0, 1],
    "p01_pathonly.parquet": "paths of its images", "p04_labelname.parquet": [0, 1, 0, 1, 0, 1],
    "p12_int64big.parquet": "below", "p13_zerorows.parquet": "no rows", "p14_mixed": "has the columns",
    "p15_hubclone": "several splits", "p18_savetodisk": "save_to_disk", "t04_short.tar.gz": "data_batch_1 alone",
}  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), SHARED.items(), ids=SHARED)
def test_shared_cases(name: str, expected: list[int] | str) -> None:
    if not (CASES / name).exists():
        pytest.skip(f"no {CASES / name} here")
    if isinstance(expected, list):
        source = opened(CASES / name)
        assert source.classes.labels.tolist() == expected
        assert all(source.image(index).shape == (3, 8, 8) for index in range(len(expected)))
    else:
        with pytest.raises((BeelineError, CorruptImage), match=expected):
            opened(CASES / name).image(0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: listed(p, each([0, 1], [1, 1], [0, 1], [0, 1])), "not several"),
        (lambda p: tarred(p, {"data_batch_1": batch()}), "data_batch_1 alone"),
        (
            lambda p: table(p, name="d/data/train-0.parquet", image=[{"bytes": None, "path": "/a.png"}]).parents[1],
            "paths of its images",
        ),
        (pipe, "is not a regular file"),
    ],
)
def test_the_command_refuses_in_one_line_and_leaves_nothing(run: Run, tmp_path: Path, make: Make, said: str) -> None:
    done = run(*command(tmp_path, make(tmp_path)), ok=False)
    assert done.returncode == 1
    assert re.fullmatch(rf"error: .*{said}.*\n", done.stderr)
    assert not (tmp_path / "ws").exists()


def command(place: Path, source: Path) -> list[Any]:
    return [
        "pipeline/ingest_images.py", "digits", "--workspace", place / "ws", "--images.source", source,
        "--images.resolution", "8", "--images.channels", "3",
    ]  # fmt: skip


def test_the_command_says_what_it_takes_and_corrupt_images_do_not_block_it(run: Run, tmp_path: Path) -> None:
    photos = folder(tmp_path, "cat/0.png", "cat/1.png", "dog/0.png", ".DS_Store", **{"dog/1.png": PNG[:40]})
    failed = run(*command(tmp_path, photos), ok=False)
    assert len([line for line in failed.stderr.splitlines() if line.startswith("error: 1 of 4 images")]) == 1
    assert "dog/1.png" in failed.stderr
    assert "Traceback" not in failed.stderr
    (photos / "dog/1.png").write_bytes(picture(0, "RGBA"))
    os.remove(photos / "cat/1.png")  # another source now
    done = run(*command(tmp_path, photos))
    assert "images: 3 images in 2 classes, from 1 in class 0 (cat) to 2 in class 1 (dog)" in done.stdout
    assert "images: ignored 1 hidden file (.DS_Store)" in done.stdout


@pytest.mark.parametrize("data", [b"<html>404</html>", b"", b"PK\x03\x04 and no more"])
def test_references_that_are_something_else(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "r.npz").write_bytes(data)
    with pytest.raises(BeelineError, match=r"r\.npz: not an \.npz file with mu and sigma"):
        _given_reference(EvaluateConfig(features=("inception",), reference=str(tmp_path / "r.npz")))


@pytest.mark.parametrize("name", ["r11_plain.npy", "r12_html.npz"])
def test_shared_references(name: str) -> None:
    if not (CASES / name).exists():
        pytest.skip(f"no {CASES / name} here")
    with pytest.raises(BeelineError, match=r"not an \.npz file with mu and sigma: it starts with"):
        _given_reference(EvaluateConfig(features=("inception",), reference=str(CASES / name)))
