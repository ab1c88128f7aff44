"""Where real images come from: a source lists its images and decodes any one of them.

digits                      scikit-learn's digits, built in
photos/                     a folder of images; sub-folders are classes
cifar10.zip                 EDM's zip: PNG or JPEG, labels in dataset.json
cifar-10-python.tar.gz      CIFAR-10's own archive: the 50,000 training images
train.parquet, parquet/     Parquet with an image column, as on the Hugging Face Hub
"""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from beeline.config import ImagesConfig
from beeline.errors import BeelineError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class CorruptImage(Exception):
    """An image that cannot be decoded; the message names it and says why."""


class Source(Protocol):
    """`labels` (n,) int32, -1 where there are none, and the image of each index."""

    labels: np.ndarray
    sequential: bool
    """Whether images are cheap to read only in rising order of their indices."""

    @property
    def names(self) -> Sequence[str]:
        """What each image is called in errors."""
        ...

    def image(self, index: int) -> np.ndarray:
        """uint8 (C, H, W). Raises CorruptImage."""
        ...


def open_source(config: ImagesConfig) -> Source:
    """The source that `config.source` names. Raises BeelineError where there is none, or where it is damaged."""
    path = config.source
    if path == "digits":
        return Digits(config)
    try:
        if os.path.isdir(path):
            tables = sorted(name for name in os.listdir(path) if name.endswith(".parquet"))
            return ParquetImages(config, [os.path.join(path, name) for name in tables]) if tables else FolderImages(config)
        if zipfile.is_zipfile(path):
            return ZipImages(config)
        if path.endswith(".parquet") and os.path.isfile(path):
            return ParquetImages(config, [path])
        if os.path.isfile(path) and tarfile.is_tarfile(path):
            return CifarArchive(config)
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, pa.ArrowException, json.JSONDecodeError) as error:
        raise BeelineError(f"images.source {path} cannot be read: {error}") from error
    missing = "" if os.path.exists(path) else ", which does not exist,"
    raise BeelineError(
        f"images.source {path!r}{missing} is neither 'digits', nor a folder of images, nor a zip in EDM's layout, nor "
        "CIFAR-10's python archive, nor Parquet with an image column"
    )


class Digits:
    """scikit-learn's digits: 1,797 images, 8x8, 16 grey levels, stretched to 0 ... 255."""

    sequential = False

    def __init__(self, config: ImagesConfig) -> None:
        from sklearn.datasets import load_digits

        if (config.resolution, config.channels) != (8, 1):
            raise BeelineError(
                f"the digits are 8x8 with 1 channel; images.resolution {config.resolution} and images.channels "
                f"{config.channels} were asked for"
            )
        pixels, target = load_digits(return_X_y=True)
        self.labels = np.asarray(target, np.int32)
        self.names = [f"digit {i}" for i in range(len(self.labels))]
        self._images = np.rint(np.asarray(pixels).reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)

    def image(self, index: int) -> np.ndarray:
        return self._images[index]


class FolderImages:
    """Images anywhere under a folder; with more than one sub-folder, these are the classes, in alphabetical order."""

    sequential = False

    def __init__(self, config: ImagesConfig) -> None:
        self.config = config
        self.names = sorted(
            os.path.relpath(os.path.join(folder, file), config.source)
            for folder, _, files in os.walk(config.source)
            for file in files
            if file.lower().endswith(SUFFIXES)
        )
        _require_some(self.names, config)
        classes = sorted({os.path.dirname(name) for name in self.names})
        known = {name: k for k, name in enumerate(classes)} if len(classes) > 1 else {}
        self.labels = np.array([known.get(os.path.dirname(name), -1) for name in self.names], np.int32)

    def image(self, index: int) -> np.ndarray:
        path = os.path.join(self.config.source, self.names[index])
        return decoded(lambda: open(path, "rb").read(), self.config, self.names[index])


class ZipImages:
    """EDM's data set zip: images anywhere in it, dataset.json {"labels": [[name, class], ...] or null}."""

    sequential = False

    def __init__(self, config: ImagesConfig) -> None:
        self.config = config
        self._zip = zipfile.ZipFile(config.source)
        self.names = sorted(name for name in self._zip.namelist() if name.lower().endswith(SUFFIXES))
        _require_some(self.names, config)
        self.labels = np.full(len(self.names), -1, np.int32)
        listed = json.loads(self._zip.read("dataset.json"))["labels"] if "dataset.json" in self._zip.namelist() else None
        if listed:
            labels = dict(listed)
            missing = [name for name in self.names if name not in labels]
            if missing:
                raise BeelineError(f"dataset.json has no label for {len(missing)} images, the first of them {missing[0]}")
            self.labels = np.array([labels[name] for name in self.names], np.int32)

    def image(self, index: int) -> np.ndarray:
        return decoded(lambda: self._zip.read(self.names[index]), self.config, self.names[index])


class CifarArchive:
    """cifar-10-python.tar.gz: the five training batches, in order. Its pickles are read as data, never run."""

    sequential = False

    def __init__(self, config: ImagesConfig) -> None:
        self.config = config
        images, labels = [], []
        with tarfile.open(config.source) as archive:
            members = sorted(name for name in archive.getnames() if os.path.basename(name).startswith("data_batch_"))
            for name in members:
                file = archive.extractfile(name)
                assert file is not None
                try:
                    batch = _BatchReader(io.BytesIO(file.read()), encoding="bytes").load()
                    images.append(batch[b"data"].array().reshape(-1, 3, 32, 32))
                    labels.append(np.asarray(batch[b"labels"], np.int32))
                except BeelineError:
                    raise
                except Exception as error:  # unpickling damaged data raises whatever the damage leads to
                    raise BeelineError(f"{config.source}: {name} is damaged ({type(error).__name__}: {error})") from error
        if not members:
            raise BeelineError(f"{config.source} holds no data_batch_N; expected CIFAR-10's python archive")
        self._images, self.labels = np.concatenate(images), np.concatenate(labels)
        self.names = [f"training image {i}" for i in range(len(self.labels))]

    def image(self, index: int) -> np.ndarray:
        pixels = self._images[index]
        if (self.config.resolution, self.config.channels) == (32, 3):
            return pixels
        return fitted(Image.fromarray(pixels.transpose(1, 2, 0)), self.config)


class ParquetImages:
    """Parquet files with a column of encoded images, plain binary or {bytes, path}, and perhaps one of classes."""

    sequential = True
    LABELS = ("label", "labels", "class", "fine_label")

    def __init__(self, config: ImagesConfig, files: list[str]) -> None:
        self.config = config
        self._files = [pq.ParquetFile(file) for file in files]
        schema = self._files[0].schema_arrow
        columns = [field.name for field in schema if _holds_images(field.type)]
        if len(columns) != 1:
            raise BeelineError(
                f"{config.source} has the columns {', '.join(schema.names)}; expected one of images (binary, or a struct with "
                f"bytes), found {len(columns)}"
            )
        self._column = columns[0]
        label = next((name for name in self.LABELS if name in schema.names), None)
        labels, self._groups, self.names = [], [], []
        for file, opened in zip(files, self._files, strict=True):
            for group in range(opened.metadata.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                self._groups.append((len(self.names), opened, group))
                self.names += [f"{os.path.basename(file)} row group {group} row {row}" for row in range(rows)]
            if label:
                labels += opened.read(columns=[label])[label].to_pylist()
        _require_some(self.names, config)
        if any(value is None or not isinstance(value, int) for value in labels):
            raise BeelineError(f"column {label} of {config.source} does not hold whole numbers alone; expected class indices")
        self.labels = np.asarray(labels, np.int32) if label else np.full(len(self.names), -1, np.int32)
        self._starts = np.array([start for start, *_ in self._groups])
        self._loaded: tuple[int, pa.ChunkedArray] | None = None

    def image(self, index: int) -> np.ndarray:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._loaded is None or self._loaded[0] != number:
            _, opened, group = self._groups[number]
            self._loaded = number, opened.read_row_group(group, columns=[self._column])[self._column]
        value = self._loaded[1][index - int(self._starts[number])].as_py()
        return decoded(lambda: value["bytes"] if isinstance(value, dict) else value, self.config, self.names[index])


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and _holds_images(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _require_some(names: Sequence[str], config: ImagesConfig) -> None:
    if not names:
        raise BeelineError(f"no images ({', '.join(SUFFIXES)}) in {config.source}")


def decoded(read: Callable[[], bytes], config: ImagesConfig, name: str) -> np.ndarray:
    """The image whose encoded bytes `read` returns, as asked for. Raises CorruptImage naming it."""
    try:
        return fitted(Image.open(io.BytesIO(read())), config)
    except (OSError, SyntaxError, ValueError, TypeError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
        raise CorruptImage(f"{name} ({error})") from error


def fitted(picture: Image.Image, config: ImagesConfig) -> np.ndarray:
    """uint8 (C, H, W) of the resolution and channels asked for, by `config.fit`."""
    picture = picture.convert("L" if config.channels == 1 else "RGB")
    want = config.resolution
    if picture.size != (want, want):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        if config.fit == "stretch":
            picture = picture.resize((want, want), Image.Resampling.LANCZOS)
        elif config.fit == "crop":
            box = (left, top, left + side, top + side)
            picture = picture.resize((want, want), Image.Resampling.LANCZOS, box=box)
        else:
            picture = _adm(picture, want)
    pixels = np.asarray(picture, np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _adm(picture: Image.Image, want: int) -> Image.Image:
    """As ADM prepared ImageNet (Dhariwal & Nichol 2021): halved by boxes while twice too large, then bicubic, then cropped."""
    while min(picture.size) >= 2 * want:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = want / min(picture.size)
    size = (max(want, round(picture.width * scale)), max(want, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (picture.width - want) // 2, (picture.height - want) // 2
    return picture.crop((left, top, left + want, top + want))


class _BatchReader(pickle.Unpickler):
    """Reads a CIFAR batch: plain Python, and one array of bytes, which is kept as a record."""

    def find_class(self, module: str, name: str) -> Any:
        admitted: dict[str, Any] = {"_reconstruct": lambda *_: _ArrayRecord(), "ndarray": _ArrayRecord, "dtype": _DtypeRecord}
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in admitted:
            return admitted[name]
        if (module, name) == ("_codecs", "encode"):  # how Python 2's byte strings look when Python 3 wrote them
            return lambda text, encoding: text.encode("latin1") if isinstance(text, str) else text
        raise BeelineError(
            f"a batch asks for {module}.{name}, which CIFAR-10's archive does not; it was refused, nothing was run"
        )


class _DtypeRecord:
    def __init__(self, code: Any, *_: Any) -> None:
        if code not in ("u1", b"u1"):
            raise BeelineError(f"a batch holds an array of {code!r}; expected uint8")

    def __setstate__(self, state: Any) -> None:
        pass


class _ArrayRecord:
    def __setstate__(self, state: Any) -> None:
        _, self.shape, _, fortran, self.data = state
        if fortran:
            raise BeelineError("a batch holds an array in Fortran order; expected CIFAR-10's rows")

    def array(self) -> np.ndarray:
        return np.frombuffer(self.data, np.uint8).reshape(self.shape)
