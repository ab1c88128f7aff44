"""Zip archives of images: EDM's, with dataset.json, or one with class folders. Nothing is unpacked to disk, so names in the zip
cannot point outside it."""

from __future__ import annotations

import zipfile

import numpy as np

from beeline.config import ImagesConfig
from beeline.errors import BeelineError
from pipeline.sources.listing import classes_of, clean, require_images, sorted_out
from pipeline.sources.pixels import MAX_BYTES, Pixels

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others cannot be read incrementally
OTHER_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard"}
ENCRYPTED = 1  # bit of flag_bits


class ZipImages:
    """The images of the zip `config.source`."""

    sequential = False

    def __init__(self, config: ImagesConfig) -> None:
        self.path, self.pixels = config.source, Pixels(config)
        self._zip = zipfile.ZipFile(self.path)
        files = [info for info in self._zip.infolist() if not info.filename.endswith(("/", "\\"))]
        self._files = {clean(info.filename): info for info in files}
        entries = sorted_out(self._files)
        require_images(entries, self.path)
        needed = {*entries.images, *entries.listings}
        for info in files:
            if (name := clean(info.filename)) in needed:
                self._check(name, info)
        self.names = entries.images
        self.classes, notes = classes_of(entries, self.path, self._read)
        self.notes = notes + entries.ignored()

    def image(self, index: int) -> np.ndarray:
        name = self.names[index]
        return self.pixels.decoded(lambda: self._read(name, MAX_BYTES), name)

    def _check(self, name: str, info: zipfile.ZipInfo) -> None:
        if self._files[name] is not info:
            raise BeelineError(f"{self.path} holds {name} twice; make the zip again from its files")
        if info.flag_bits & ENCRYPTED:
            raise BeelineError(f"{name} in {self.path} is encrypted; unpack the zip with its password and give the folder")
        if info.compress_type not in METHODS:
            method = OTHER_METHODS.get(info.compress_type, f"method {info.compress_type}")
            raise BeelineError(
                f"{name} in {self.path} is compressed with {method}; expected Deflate or none. Unpack the zip and give the "
                "folder"
            )

    def _read(self, name: str, most: int) -> bytes:
        info = self._files[name]
        if info.file_size > most:
            raise ValueError(f"{info.file_size:,} bytes, expected at most {most:,}")
        with self._zip.open(info) as file:
            return file.read(info.file_size)  # inflates no more than the size stated in the zip
