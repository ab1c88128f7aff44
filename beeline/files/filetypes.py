"""Recognise the actual kind of a file: by its first bytes, and, if torch.save wrote it, by the names in it."""

from __future__ import annotations

import os
import pickletools
import zipfile
from pathlib import Path
from typing import Any

from beeline.errors import BeelineError
from beeline.files.unpickling import Bounded

HEAD = 512  # bytes
MAX_NAMES = 1 << 22  # bytes of torch.save's pickle to search for names
LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # start of torch.save's format before it used zips
BEGINNINGS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself (git lfs pull fetches it)",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a single NumPy array (.npy)",
    b"PAR1": "a Parquet file",
    b"%PDF": "a PDF document",
    b"GGUF": "a GGUF file",
    LEGACY_TORCH: "a file of torch.save",
}


def kind_of(head: bytes, size: int) -> str:
    """Name the kind of a file of `size` bytes that begins with `head`, like "a web page"; "" for a pickle or an unknown
    kind."""
    if not size:
        return "an empty file"
    start = head.lstrip()[:64].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page"
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= size - 8:
        return "a safetensors file"
    return next((kind for beginning, kind in BEGINNINGS.items() if head.startswith(beginning)), "")


def checked_file(file: Path, what: str) -> tuple[str, bytes]:
    """Return the kind of a readable regular file, and its first bytes. Raises BeelineError, naming `what` was expected, for
    a missing file, a folder, and anything else that is not a regular file."""
    try:
        if not os.path.lexists(file):
            raise BeelineError(f"{file} does not exist; expected {what}")
        if not file.is_file():
            raise BeelineError(f"{file} is {'a folder' if file.is_dir() else 'not a regular file'}; expected {what}")
        with open(file, "rb") as stream:
            head = stream.read(HEAD)
            return kind_of(head, file.stat().st_size), head
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise BeelineError(f"{file} cannot be read ({error}); check its permissions") from None


def torch_names(file: Path) -> set[str]:
    """Collect the texts, such as keys and tensor names, in the pickle of a torch.save file, without unpickling.

    In other or damaged files it returns the texts it meets first, possibly none.
    """
    names: set[str] = set()
    try:
        with open(file, "rb") as stream:
            if zipfile.is_zipfile(stream):
                with zipfile.ZipFile(stream) as archive:
                    entry = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                    with archive.open(entry) as pickled:
                        _collect(pickled, names)
            else:
                stream.seek(0)
                _collect(stream, names)
    except Exception:  # ignored: the names only help to describe the file
        return names
    return names


def _collect(stream: Any, names: set[str]) -> None:
    source: Any = Bounded(stream, MAX_NAMES)
    while source.left:
        for _, argument, _ in pickletools.genops(source):
            if isinstance(argument, str):
                names.add(argument)
