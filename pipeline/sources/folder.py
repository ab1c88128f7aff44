"""Folders of images: sub-folders are classes, or dataset.json gives the class of each image."""

from __future__ import annotations

import collections
import os
import stat
from collections.abc import Iterator

import numpy as np

from beeline.config import ImagesConfig
from beeline.errors import BeelineError
from pipeline.sources.listing import Entries, classes_of, require_images
from pipeline.sources.pixels import MAX_BYTES, Pixels, is_image


class FolderImages:
    """The images among `entries` of the folder `config.source`."""

    sequential = False

    def __init__(self, config: ImagesConfig, entries: Entries) -> None:
        self.folder, self.pixels = config.source, Pixels(config)
        require_images(entries, self.folder)
        self.names = entries.images
        self.classes, notes = classes_of(entries, self.folder, lambda name, most: self._read(name, most))
        self.notes = notes + entries.ignored()

    def image(self, index: int) -> np.ndarray:
        name = self.names[index]
        return self.pixels.decoded(lambda: self._read(name, MAX_BYTES), name)

    def _read(self, name: str, most: int) -> bytes:
        path = os.path.join(self.folder, name)
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file but a folder, pipe or device")
        if status.st_size > most:
            raise ValueError(f"{status.st_size:,} bytes, expected at most {most:,}")
        with open(path, "rb") as file:
            return file.read(most)


def walk(folder: str) -> Iterator[str]:
    """List the files under `folder`, relative to it, in no particular order; a hidden folder is listed without its content.

    Links to folders are followed, but no folder is read twice: a second link to it is listed like a file. Raises BeelineError
    for unreadable folders, and for images that are not regular files.
    """
    root = os.path.realpath(folder)
    seen: set[str] = set()
    waiting = collections.deque([""])
    while waiting:
        inner = waiting.popleft()
        path = os.path.join(folder, inner)
        real = os.path.realpath(path)
        if real in seen or (real != root and root.startswith(os.path.join(real, ""))):
            yield inner
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise BeelineError(f"the folder {path} cannot be read ({error.strerror}); check its permissions") from error
        for entry in entries:
            name, link = os.path.join(inner, entry.name), entry.is_symlink()
            if entry.name.startswith("."):
                yield name
                continue
            if os.path.isdir(entry.path) if link else entry.is_dir():  # only links need another stat call
                waiting.append(name) if link else waiting.appendleft(name)
                continue
            if is_image(name) and not (os.path.isfile(entry.path) if link else entry.is_file()):
                raise BeelineError(
                    f"{entry.path} is not a regular file but a broken link, a pipe or a device; remove it, or put the image in "
                    "its place"
                )
            yield name
