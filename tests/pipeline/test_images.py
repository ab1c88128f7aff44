"""Real images come in from a folder or EDM's zip; what cannot be read is named."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beeline.config import ImagesConfig
from beeline.errors import BeelineError
from pipeline.images import open_source


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
    assert source.labels.tolist() == [0, 0, 1]
    assert source.image(2).shape == (3, 4, 4)
    assert [int(source.image(i).mean()) for i in range(3)] == [10, 20, 30]
    assert open_source(config(tmp_path, channels=1)).image(0).shape == (1, 4, 4)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    assert open_source(config(tmp_path)).labels.tolist() == [-1]


@pytest.mark.parametrize("labelled", [True, False])
def test_edm_zip(tmp_path: Path, labelled: bool) -> None:
    names = ["00000/img00000000.png", "00000/img00000001.png"]
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        for k, name in enumerate(names):
            file.writestr(name, png(50 * k))
        file.writestr("dataset.json", json.dumps({"labels": [[names[1], 7], [names[0], 3]] if labelled else None}))
    source = open_source(config(tmp_path / "data.zip"))
    assert source.labels.tolist() == ([3, 7] if labelled else [-1, -1])
    assert int(source.image(1).mean()) == 50


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png(1))
    (tmp_path / "torn.png").write_bytes(png(1)[:40])
    source = open_source(config(tmp_path))
    source.image(0)
    with pytest.raises(BeelineError, match=r"torn\.png cannot be read"):
        source.image(1)


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
    assert np.bincount(source.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
