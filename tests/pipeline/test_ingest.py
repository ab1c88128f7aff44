"""Real images through the command: in an order that mixes classes. Corrupt images are counted and named, and cost no intact
one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Run, files
from PIL import Image

from beeline.config import ImagesConfig, to_dict
from beeline.errors import BeelineError
from pipeline.ingest_images import ImageShards, listing_digest, passes_for, shuffled
from pipeline.reader import WINDOW, ShardReader
from pipeline.shards import decode, shard_count
from pipeline.sources import open_source
from pipeline.storage import Folder


def photo(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((12, 16, 3), value, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_corrupt_images_are_counted_and_named(run: Run, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for k in range(30):
        path = photos / ("cat" if k < 15 else "dog") / f"{k:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(8 * k))
    (photos / "cat/03.jpg").write_bytes(photo(1)[:200])
    (photos / "dog/21.jpg").write_text("not an image")
    arguments = [
        "digits", "--workspace", tmp_path / "ws", "--images.source", photos, "--images.resolution", "8",
        "--images.channels", "3", "--images.shard-size", "8",
    ]  # fmt: skip
    failed = run("pipeline/ingest_images.py", *arguments, ok=False)
    assert "2 of 30 images" in failed.stderr
    assert "cat/03.jpg" in failed.stderr
    assert "dog/21.jpg" in failed.stderr
    assert "Traceback" not in failed.stderr
    images = tmp_path / "ws/images"
    assert not (images / "_SUCCESS").exists()
    order = shuffled(30).tolist()
    damaged = {order.index(3) // 8, order.index(21) // 8}
    assert sorted(files(images, "part-*")) == [f"part-{k:05}.parquet" for k in range(4) if k not in damaged]

    for name, k in {"cat/03.jpg": 3, "dog/21.jpg": 21}.items():
        (photos / name).write_bytes(photo(8 * k))
    run("pipeline/ingest_images.py", *arguments)
    parts = [decode(path.read_bytes())[0] for path in sorted(images.glob("part-*"))]
    assert [index for part in parts for index in part.indices.tolist()] == list(range(30))
    assert [int(image.mean()) for part in parts for image in part.images] == [8 * k for k in order]
    assert [label for part in parts for label in part.labels.tolist()] == [int(k >= 15) for k in order]


def ingested(place: Folder, config: ImagesConfig) -> dict[str, bytes]:
    """images/ as one of the command's actors makes it, in this process."""
    source = open_source(config)
    count = len(source.names)
    digest = listing_digest(source, shuffled(count))
    plan = {"images": to_dict(config, resources=False) | {"count": count, "listing_sha256": digest}}
    passes = passes_for(range(shard_count(count, config.shard_size)), source, config)
    worker = ImageShards(place, plan, config, passes)
    assert sum(worker.work(number)["images"] for number in range(len(passes))) == count
    return files(Path(place.uri) / "images", "part-*")


def in_class_order(path: Path, classes: int, each: int, row_group_size: int | None = None) -> Path:
    """Write Parquet with `each` images of the first class, then of the second, and so on; an image's grey value is its
    class."""
    pixels = [io.BytesIO() for _ in range(classes)]
    for k, buffer in enumerate(pixels):
        Image.new("L", (4, 4), k).save(buffer, "PNG")
    labels = np.repeat(np.arange(classes), each)
    pq.write_table(
        pa.table({"image": [pixels[k].getvalue() for k in labels], "label": labels}), path, row_group_size=row_group_size
    )
    return path


def test_every_window_of_the_reader_holds_the_classes_of_a_random_sample(tmp_path: Path) -> None:
    """A source in class order; a window mixes 64 row groups of 20 images."""
    config = ImagesConfig(source=str(in_class_order(tmp_path / "a.parquet", 100, 64)), resolution=4, channels=1, shard_size=20)
    ingested(Folder(str(tmp_path)), config)
    reader = ShardReader(Folder(str(tmp_path / "images")), {"count": 6400, "shard_size": 20}, seed=0)
    assert reader.group_rows == 20
    for window in range(5):
        rows = reader.batch(window * WINDOW * 20, WINDOW * 20)
        assert (rows["image"][:, 0, 0, 0] == rows["label"]).all()
        counts = np.bincount(rows["label"], minlength=100)
        assert (counts > 0).sum() >= 99
        assert ((counts - 12.8) ** 2 / 12.8).sum() < 140  # chi squared of 99 degrees of freedom; in class order, over 1,000


def test_the_order_never_changes() -> None:
    """Shards of one images/ may come from different actors, days and versions of NumPy."""
    assert shuffled(12).tolist() == [11, 1, 8, 5, 2, 7, 9, 4, 10, 3, 0, 6]
    assert sorted(shuffled(1000)) == list(range(1000))


@pytest.mark.parametrize("rows", [7, 64])
def test_shards_do_not_depend_on_the_passes_that_make_them(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = in_class_order(tmp_path / "a.parquet", 8, 8, row_group_size=rows)
    config = ImagesConfig(source=str(source), resolution=4, channels=1, shard_size=10, max_actors=1)
    together = ingested(Folder(str(tmp_path / "together")), config)
    monkeypatch.setattr("pipeline.ingest_images.PASS_BYTES", 1)
    assert len(passes_for(range(7), open_source(config), config)) == 7
    assert ingested(Folder(str(tmp_path / "apart")), config) == together


def test_a_source_that_differs_from_machine_to_machine_is_refused(tmp_path: Path) -> None:
    config = ImagesConfig(source=str(in_class_order(tmp_path / "a.parquet", 2, 2)), resolution=4, channels=1)
    plan = {"images": {"listing_sha256": listing_digest(open_source(config), shuffled(4))}}
    in_class_order(tmp_path / "a.parquet", 3, 2)
    with pytest.raises(BeelineError, match="holds other images here than on the machine that started the command"):
        ImageShards(Folder(str(tmp_path)), plan, config, [])
