"""Real images are read from a folder or EDM's zip; unreadable ones are named."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from beeline.config import ImagesConfig
from beeline.errors import BeelineError
from pipeline.sources import CorruptImage, open_source


def png(value: int, size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def config(source: Path, channels: int = 3) -> ImagesConfig:
    return ImagesConfig(source=str(source), resolution=4, channels=channels)


def test_a_folder_takes_classes_from_its_sub_folders(tmp_path: Path) -> None:
    for name, value in {"cat/a": 10, "cat/b": 20, "dog/a": 30}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(png(value))
    source = open_source(config(tmp_path))
    assert source.classes.labels.tolist() == [0, 0, 1]
    assert source.image(2).shape == (3, 4, 4)
    assert [int(source.image(i).mean()) for i in range(3)] == [10, 20, 30]
    assert open_source(config(tmp_path, channels=1)).image(0).shape == (1, 4, 4)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    assert open_source(config(tmp_path)).classes.labels.tolist() == [-1]


@pytest.mark.parametrize("labelled", [True, False])
def test_edm_zip(tmp_path: Path, labelled: bool) -> None:
    names = ["00000/img00000000.png", "00000/img00000001.png"]
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        for k, name in enumerate(names):
            file.writestr(name, png(50 * k))
        file.writestr("dataset.json", json.dumps({"labels": [[names[1], 7], [names[0], 3]] if labelled else None}))
    source = open_source(config(tmp_path / "data.zip"))
    assert source.classes.labels.tolist() == ([3, 7] if labelled else [-1, -1])
    assert int(source.image(1).mean()) == 50


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png(1))
    (tmp_path / "torn.png").write_bytes(png(1)[:40])
    source = open_source(config(tmp_path))
    source.image(0)
    with pytest.raises(CorruptImage, match=r"torn\.png"):
        source.image(1)


def cifar_archive(path: Path, module: str = "numpy._core.multiarray", count: int = 3) -> np.ndarray:
    """Write a small version of CIFAR-10's python archive: pickles of bytes-keyed dicts, as Python 2 wrote them. Returns the
    images."""
    images = np.random.default_rng(0).integers(0, 256, (5 * count, 3, 32, 32), np.uint8)
    with tarfile.open(path, "w:gz") as archive:
        for k in range(5):
            rows = images[k * count : (k + 1) * count].reshape(count, -1)
            batch = {b"batch_label": b"x", b"labels": [k] * count, b"data": rows, b"filenames": [b"a.png"] * count}
            data = pickle.dumps(batch, protocol=2).replace(b"numpy._core.multiarray", module.encode())
            info = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{k + 1}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        archive.addfile(info, io.BytesIO())
    return images


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_cifars_own_archive(tmp_path: Path, module: str) -> None:
    images = cifar_archive(tmp_path / "cifar-10-python.tar.gz", module)
    source = open_source(ImagesConfig(source=str(tmp_path / "cifar-10-python.tar.gz"), resolution=32, channels=3))
    assert source.classes.labels.tolist() == [k for k in range(5) for _ in range(3)]
    assert all((source.image(i) == images[i]).all() for i in range(15))


def test_an_archive_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil:
        def __reduce__(self):
            return exec, ("open('touched', 'w')",)

    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({b"data": Evil()}, protocol=2)
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("data_batch_1")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    with pytest.raises(BeelineError, match=r"asks for .*exec.*no code was run"):
        open_source(config(tmp_path / "evil.tar.gz"))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_as_on_the_hugging_face_hub(tmp_path: Path, as_struct: bool) -> None:
    for part in range(2):
        values = [png(10 * (5 * part + i)) for i in range(5)]
        images = [{"bytes": value, "path": "x.png"} for value in values] if as_struct else values
        table = pa.table({"img": images, "label": [part] * 5, "note": ["text"] * 5})
        pq.write_table(table, tmp_path / f"train-{part}.parquet", row_group_size=2)
    source = open_source(config(tmp_path))
    assert source.classes.labels.tolist() == [0] * 5 + [1] * 5
    assert [int(source.image(i).mean()) for i in (9, 0, 5, 4)] == [90, 0, 50, 40]
    assert len(open_source(config(tmp_path / "train-1.parquet")).names) == 5


def test_parquet_without_images_says_what_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1], "y": [2.0]}), tmp_path / "t.parquet")
    with pytest.raises(BeelineError, match=r"columns x .int64., y .double.; expected one column of images"):
        open_source(config(tmp_path / "t.parquet"))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(BeelineError, match=r"torn\.parquet cannot be read"):
        open_source(config(tmp_path / "torn.parquet"))


def test_fitting(tmp_path: Path) -> None:
    """A 64x32 image, left half black and right half white, in each fit."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    for fit in ("crop", "stretch", "adm"):
        source = open_source(ImagesConfig(source=str(tmp_path), resolution=8, channels=3, fit=fit))  # pyright: ignore[reportArgumentType]
        image = source.image(0).astype(int)
        assert image.shape == (3, 8, 8)
        assert image[:, :, 0].max() < 5
        assert image[:, :, -1].min() > 250
        assert abs(image.mean() - 127.5) < 3


def test_a_missing_source_says_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(BeelineError, match=r"neither 'digits', nor a folder of images, nor a zip"):
        open_source(config(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BeelineError, match="no images"):
        open_source(config(tmp_path / "empty"))


def test_digits_are_stretched_to_eight_bits() -> None:
    source = open_source(ImagesConfig())
    images = np.stack([source.image(i) for i in range(1797)])
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 255)
    assert np.bincount(source.classes.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
