"""What a file is that was taken for another: by its first bytes, and, where torch.save wrote it, by the names in it."""

from __future__ import annotations

import os
import pickletools
import zipfile
from pathlib import Path
from typing import Any

from beeline.errors import BeelineError
from beeline.files.unpickling import Bounded

HEAD = 512  # bytes
MAX_NAMES = 1 << 22  # bytes of torch.save's pickle that are searched for names
LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save began with before it wrote zips
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
    """What a file of `size` bytes is that begins with `head`, as "a web page"; "" for a pickle, and where nothing tells."""
    if not size:
        return "an empty file"
    start = head.lstrip()[:64].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page"
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= size - 8:
        return "a safetensors file"
    return next((kind for beginning, kind in BEGINNINGS.items() if head.startswith(beginning)), "")


def checked_file(file: Path, what: str) -> tuple[str, bytes]:
    """The kind of a regular file that can be read, and how it begins. Raises BeelineError for a missing file, a folder, and
    whatever is no file; `what` was expected."""
    try:
        if not os.path.lexists(file):
            raise BeelineError(f"{file} is not there; expected {what}")
        if not file.is_file():
            raise BeelineError(f"{file} is {'a folder' if file.is_dir() else 'not a regular file'}; expected {what}")
        with open(file, "rb") as stream:
            head = stream.read(HEAD)
            return kind_of(head, file.stat().st_size), head
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise BeelineError(f"{file} cannot be read ({error}); check its permissions") from None


def torch_names(file: Path) -> set[str]:
    """The texts in the pickle of a file of torch.save, such as keys and names of tensors, without unpickling; of other and of
    damaged files those that are met first, perhaps none."""
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
    except Exception:  # whatever is wrong with it: this only helps to say what the file is
        return names
    return names


def _collect(stream: Any, names: set[str]) -> None:
    source: Any = Bounded(stream, MAX_NAMES)
    while source.left:
        for _, argument, _ in pickletools.genops(source):
            if isinstance(argument, str):
                names.add(argument)
