"""Sources of real images: a source lists its images and decodes any one of them.

digits                      scikit-learn's digits, built in
photos/                     a folder of images; sub-folders are classes, or dataset.json lists them
cifar10.zip                 a zip of the same: EDM's, or one of class folders
cifar-10-python.tar.gz      CIFAR-10's own archive: the 50,000 training images; CIFAR-100's as well
train.parquet, parquet/     Parquet with an image column, as on the Hugging Face Hub

Sources are untrusted files. Opening one raises only BeelineError, decoding an image only CorruptImage, whatever they contain.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from beeline.config import ImagesConfig
from beeline.errors import BeelineError, reading
from pipeline.sources.archive import ZipImages
from pipeline.sources.cifar import CifarArchive, is_tar
from pipeline.sources.digits import Digits
from pipeline.sources.folder import FolderImages, walk
from pipeline.sources.labels import Classes
from pipeline.sources.listing import sorted_out
from pipeline.sources.parquet import MAGIC, ParquetImages
from pipeline.sources.part import Part
from pipeline.sources.pixels import CorruptImage as CorruptImage
from pipeline.sources.pixels import Pixels, kind_of

BUILT_IN = "digits"  # scikit-learn's digits; needs no files


class Source(Protocol):
    """Images of a data set, their names in error messages, and their classes."""

    classes: Classes
    pixels: Pixels
    """Decoder of the images, with a count of the changes it made."""
    notes: list[str]
    """Lines to print about the source: where classes come from, what was ignored."""
    sequential: bool
    """Whether images are cheap to read only in increasing order of their indices."""

    @property
    def names(self) -> Sequence[str]: ...

    def image(self, index: int) -> np.ndarray:
        """Return image `index` as uint8 (C, H, W). Raises CorruptImage."""
        ...


def open_source(config: ImagesConfig) -> Source:
    """Open the source that `config.source` names, or a part of it. Raises BeelineError if it is missing, damaged or
    ambiguous."""
    source = _whole(config)
    return Part(source, config.limit) if 0 < config.limit < len(source.names) else source


def _whole(config: ImagesConfig) -> Source:
    if config.source == BUILT_IN:
        return Digits(config)
    with reading(f"images.source {config.source} cannot be read", "check the file, or make or download it again"):
        return _opened(config)


def _opened(config: ImagesConfig) -> Source:
    path = config.source
    if os.path.isdir(path):
        entries = sorted_out(walk(path))
        if entries.tables and entries.images:
            raise BeelineError(
                f"{path} holds images ({entries.images[0]}) and Parquet ({entries.tables[0]}); give a folder of one of them"
            )
        return ParquetImages(config, entries) if entries.tables else FolderImages(config, entries)
    kind = ", which does not exist,"
    if os.path.isfile(path):
        with open(path, "rb") as file:
            start = file.read(200)
        if start.startswith(MAGIC) or path.lower().endswith(".parquet"):
            return ParquetImages(config, sorted_out([]))
        if zipfile.is_zipfile(path):
            return ZipImages(config)
        if is_tar(path):
            return CifarArchive(config)
        kind = f" ({kind_of(start)})"
    raise BeelineError(
        f"images.source {path!r}{kind} is neither 'digits', nor a folder of images, nor a zip of images, nor CIFAR's python "
        "archive, nor Parquet with an image column"
    )
