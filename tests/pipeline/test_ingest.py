"""Real images through the command: corrupt ones are counted and named, and cost nothing that is sound."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from harness import Run
from PIL import Image

from pipeline.shards import decode


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
    assert sorted(path.name for path in images.glob("part-*")) == ["part-00001.parquet", "part-00003.parquet"]

    for name, k in {"cat/03.jpg": 3, "dog/21.jpg": 21}.items():
        (photos / name).write_bytes(photo(8 * k))
    run("pipeline/ingest_images.py", *arguments)
    parts = [decode(path.read_bytes())[0] for path in sorted(images.glob("part-*"))]
    assert [index for part in parts for index in part.indices.tolist()] == list(range(30))
    assert [int(image.mean()) for part in parts for image in part.images] == [8 * k for k in range(30)]
    assert [label for part in parts for label in part.labels.tolist()] == [0] * 15 + [1] * 15
