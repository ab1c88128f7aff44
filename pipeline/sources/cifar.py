"""CIFAR's own archives, cifar-10-python.tar.gz and cifar-100-python.tar.gz: their training images, in order.

Their pickles are read as data, never executed, and within size limits (beeline/files/unpickling.py).
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from beeline.config import ImagesConfig
from beeline.errors import BeelineError, reading
from beeline.files.unpickling import Bounded, unpickled
from pipeline.sources.labels import Classes, class_indices
from pipeline.sources.pixels import Pixels

MAX_UNPACKED = 256 * 2**20  # bytes; CIFAR-10 is 186 MB
BATCHES = [f"data_batch_{k}" for k in range(1, 6)]
GZIP = b"\x1f\x8b"


def is_tar(path: str) -> bool:
    """Return whether a file is a tar archive, possibly gzipped."""
    with open(path, "rb") as file:
        start = file.read(512)
    if start.startswith(GZIP):
        with gzip.open(path) as file:
            start = file.read(512)
    return start[257:262] == b"ustar"


class CifarArchive:
    """The training images of the archive `config.source`: five batches, or CIFAR-100's one with its fine labels."""

    sequential = False

    def __init__(self, config: ImagesConfig) -> None:
        self.path, self.pixels = config.source, Pixels(config)
        with reading(f"images.source {self.path} cannot be read", "download CIFAR's python archive again"):
            members = self._members()
        names = sorted(members)
        images, labels = [], []
        for name in names:
            with reading(f"{name} in {self.path} is damaged", "download the archive again"):
                batch = _batch(members.pop(name))
                images.append(batch[b"data"].array().reshape(-1, 3, 32, 32))
                labels += batch[b"labels" if b"labels" in batch else b"fine_labels"]
                if len(labels) != sum(map(len, images)):
                    raise ValueError(f"the number of labels differs from the number of images ({len(images[-1])})")
        if names not in (BATCHES, ["train"]):
            held = f"{', '.join(names)} alone" if names else "none of them"
            raise BeelineError(
                f"{self.path} is a tar with {held}; expected CIFAR-10's python archive with {BATCHES[0]} to {BATCHES[-1]}, or "
                "CIFAR-100's with train. Download it again; unpack any other tar and give the folder"
            )
        self._images = np.concatenate(images)
        self.names = [f"training image {i}" for i in range(len(self._images))]
        with reading(f"{self.path} is damaged", "download the archive again"):
            self.classes: Classes = class_indices(labels, self.names, self.path)
        self.notes = ["fine labels of CIFAR-100"] if names == ["train"] else []

    def image(self, index: int) -> np.ndarray:
        pixels = self._images[index]
        config = self.pixels.config
        if (config.resolution, config.channels) == (32, 3):
            return pixels
        return self.pixels.fitted(Image.fromarray(pixels.transpose(1, 2, 0)))

    def _members(self) -> dict[str, bytes]:
        """Read the training batches by name. The whole archive is unpacked in memory, so its size is limited."""
        with open(self.path, "rb") as file:
            packed = file.read(2) == GZIP
        with gzip.open(self.path) if packed else open(self.path, "rb") as file:
            data = file.read(MAX_UNPACKED + 1)
        if len(data) > MAX_UNPACKED:
            raise BeelineError(
                f"{self.path} unpacks to over {MAX_UNPACKED:,} bytes; expected CIFAR's archive. Unpack it and give the folder"
            )
        members: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                name = os.path.basename(member.name)
                if not member.isfile() or not (name == "train" or name.startswith("data_batch_")):
                    continue
                if name in members:
                    raise BeelineError(f"{self.path} holds {name} twice; expected CIFAR's archive as it was published")
                file = archive.extractfile(member)
                assert file is not None
                members[name] = file.read()
        return members


def _batch(data: bytes) -> dict[Any, Any]:
    """Unpickle a CIFAR batch: plain Python objects, and one array of bytes, which is kept as a record."""
    left = len(data)

    def encode(text: Any, encoding: Any) -> bytes:
        """Encode text as Python 3 pickles Python 2's byte strings. The total is limited: a file can encode one long text
        often."""
        nonlocal left
        encoded = text.encode("latin-1")
        left -= len(encoded)
        if left < 0:
            raise ValueError("texts longer than the batch")
        return encoded

    def find(module: str, name: str) -> Callable[..., Any]:
        admitted = {"_reconstruct": lambda *_: _ArrayRecord(), "ndarray": _ArrayRecord, "dtype": _DtypeRecord}
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in admitted:
            return admitted[name]
        if (module, name) == ("_codecs", "encode"):
            return encode
        raise BeelineError(
            f"a batch asks for {module}.{name}, which CIFAR's archives never do; it was refused and no code was run"
        )

    return unpickled(Bounded(io.BytesIO(data), len(data)), find, strings="bytes")


class _DtypeRecord:
    def __init__(self, code: Any, *_: Any) -> None:
        if code not in ("u1", b"u1"):
            held = f"{code!r:.50}" if isinstance(code, str | bytes) else type(code).__name__
            raise BeelineError(f"a batch holds an array of {held}; expected uint8")

    def __setstate__(self, state: Any) -> None:
        pass


class _ArrayRecord:
    def __setstate__(self, state: Any) -> None:
        _, self.shape, _, fortran, self.data = state
        if fortran:
            raise BeelineError("a batch holds an array in Fortran order; expected CIFAR-10's rows")

    def array(self) -> np.ndarray:
        return np.frombuffer(self.data, np.uint8).reshape(self.shape)
