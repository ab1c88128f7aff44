"""Where real images come from: a source lists its images and decodes any one of them."""

from __future__ import annotations

import io
import json
import os
import zipfile
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from beeline.config import ImagesConfig
from beeline.errors import BeelineError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Source(Protocol):
    """`labels` (n,) int32, -1 where there are none, and the image of each index."""

    labels: np.ndarray

    def image(self, index: int) -> np.ndarray:
        """uint8 (C, H, W)."""
        ...


class Digits:
    """scikit-learn's digits: 1,797 images, 8x8, 16 grey levels, stretched to 0 ... 255."""

    def __init__(self, config: ImagesConfig) -> None:
        from sklearn.datasets import load_digits

        if (config.resolution, config.channels) != (8, 1):
            raise BeelineError(
                f"the digits are 8x8 with 1 channel; images.resolution {config.resolution} and images.channels "
                f"{config.channels} were asked for"
            )
        pixels, target = load_digits(return_X_y=True)
        self.labels = np.asarray(target, np.int32)
        self._images = np.rint(np.asarray(pixels).reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)

    def image(self, index: int) -> np.ndarray:
        return self._images[index]


class ImageFiles:
    """A folder of images, sub-folders being classes, or a zip in EDM's layout (dataset.json holds the labels)."""

    def __init__(self, config: ImagesConfig) -> None:
        self.config = config
        self._zip = zipfile.ZipFile(config.source) if zipfile.is_zipfile(config.source) else None
        if self._zip is not None:
            self.names = sorted(name for name in self._zip.namelist() if name.lower().endswith(SUFFIXES))
            self.labels = self._zip_labels()
        elif os.path.isdir(config.source):
            self.names = sorted(
                os.path.relpath(os.path.join(folder, file), config.source)
                for folder, _, files in os.walk(config.source)
                for file in files
                if file.lower().endswith(SUFFIXES)
            )
            classes = sorted({os.path.dirname(name) for name in self.names})
            known = {name: k for k, name in enumerate(classes)} if len(classes) > 1 else {}
            self.labels = np.array([known.get(os.path.dirname(name), -1) for name in self.names], np.int32)
        else:
            raise BeelineError(
                f"images.source {config.source!r} is neither 'digits', nor a folder of images, nor a zip in EDM's layout"
            )
        if not self.names:
            raise BeelineError(f"no images ({', '.join(SUFFIXES)}) in {config.source}")

    def _zip_labels(self) -> np.ndarray:
        assert self._zip is not None
        listed = json.loads(self._zip.read("dataset.json"))["labels"] if "dataset.json" in self._zip.namelist() else None
        if not listed:
            return np.full(len(self.names), -1, np.int32)
        labels = dict(listed)
        missing = [name for name in self.names if name not in labels]
        if missing:
            raise BeelineError(f"dataset.json has no label for {len(missing)} images, the first of them {missing[0]}")
        return np.array([labels[name] for name in self.names], np.int32)

    def image(self, index: int) -> np.ndarray:
        name = self.names[index]
        try:
            data = (
                self._zip.read(name) if self._zip else open(os.path.join(self.config.source, name), "rb").read()  # noqa: SIM115
            )
            picture = Image.open(io.BytesIO(data)).convert("L" if self.config.channels == 1 else "RGB")
        except (UnidentifiedImageError, OSError, zipfile.BadZipFile, SyntaxError) as error:
            raise BeelineError(f"{self.config.source}: image {name} cannot be read ({error}); mend or remove it") from error
        side, want = min(picture.size), self.config.resolution
        if picture.size != (want, want):
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            box = (left, top, left + side, top + side)
            picture = picture.resize((want, want), Image.Resampling.LANCZOS, box=box)
        pixels = np.asarray(picture, np.uint8)
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def open_source(config: ImagesConfig) -> Source:
    """The source that `config.source` names. Raises BeelineError where there is none."""
    return Digits(config) if config.source == "digits" else ImageFiles(config)
