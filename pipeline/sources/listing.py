"""What the names of a folder or zip say: which files are images, what is ignored, and which class each image has.

Names are relative, with slashes. Classes come from dataset.json as EDM's tool writes it ({"labels": [[name, class], ...]}, or
null), else from the folders. Folders that can be read in two ways are refused.
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from beeline.errors import BeelineError, reading
from pipeline.sources.labels import Classes, class_indices, ranked, unlabelled
from pipeline.sources.pixels import is_image

LISTING = "dataset.json"
MAX_LISTING = 256 * 2**20  # bytes of dataset.json, and of what it may say of each image
MAX_ENTRY = 4096
HIDDEN = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")  # what systems add, besides names that begin with a dot
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
NUMBERED = re.compile(r"(.*/)?\d{5}/img\d{8}\.\w+")  # EDM's tool: a folder for every thousand images
NAMED = 3  # of ignored files


class Entries(NamedTuple):
    """The names of a source, sorted, by what they are."""

    images: list[str]
    tables: list[str]
    listings: list[str]
    hidden: list[str]
    others: list[str]

    def ignored(self) -> list[str]:
        """Lines that say what is left out."""
        kinds = {"hidden": self.hidden, "other": self.others}
        return [f"ignored {_counted(names, kind)}" for kind, names in kinds.items() if names]


def _counted(names: Sequence[str], kind: str) -> str:
    shown = ", ".join([*names[:NAMED], "..."] if len(names) > NAMED else names)
    return f"{len(names):,} {kind} file{'s' if len(names) > 1 else ''} ({shown})"


def sorted_out(names: Iterable[str]) -> Entries:
    """The names by what they are: images and tables by suffix, dataset.json, files that systems hide, and others."""
    entries = Entries([], [], [], [], [])
    for name in sorted(names):
        parts = name.split("/")
        if any(part.startswith(".") or part in HIDDEN for part in parts):
            entries.hidden.append(name)
        elif parts[-1] == LISTING:
            entries.listings.append(name)
        elif name.lower().endswith(".parquet"):
            entries.tables.append(name)
        else:
            (entries.images if is_image(name) else entries.others).append(name)
    return entries


def require_images(entries: Entries, where: str) -> None:
    """Raise BeelineError, saying what is there, unless there are images."""
    if entries.images:
        return
    names = {os.path.basename(name) for name in entries.others}
    if names & {"data_batch_1", "data_batch_1.bin"}:
        raise BeelineError(f"{where} is CIFAR-10's archive unpacked; give the archive itself, cifar-10-python.tar.gz")
    if any(name.endswith(".arrow") for name in names):
        raise BeelineError(
            f"{where} was written by save_to_disk of the library datasets; write it as Parquet, with to_parquet, and give "
            "that file"
        )
    kinds = {"hidden": entries.hidden, "other": entries.others, "Parquet": entries.tables}
    held = ", ".join(_counted(names, kind) for kind, names in kinds.items() if names) or "nothing"
    raise BeelineError(f"no images in {where}; it holds {held}. Expected files such as .png, .jpg, .webp or .tif, or Parquet")


def check_splits(words: Mapping[str, str], where: str) -> None:
    """Raise BeelineError if several parts of a data set, train and test say, lie together; `words` are lower-case, with the
    names that they come from."""
    found = sorted(name for word, name in words.items() if word in SPLITS)
    if len(found) > 1:
        raise BeelineError(
            f"{where} holds several parts of a data set: {', '.join(found)}. Images of all of them would be mixed; give the "
            "one to train on as images.source, in a folder or zip of its own"
        )


def classes_of(entries: Entries, where: str, read: Callable[[str, int], bytes]) -> tuple[Classes, list[str]]:
    """The classes of `entries.images`, and lines on where they come from; `read(name, most)` reads a file of at most `most`
    bytes."""
    if not entries.listings:
        return _from_folders(entries.images, where)
    if len(entries.listings) > 1:
        raise BeelineError(
            f"{where} holds {len(entries.listings)} data sets ({', '.join(entries.listings[:NAMED])}); give one of them"
        )
    (listing,) = entries.listings
    with reading(f"{listing} in {where} cannot be read", 'expected {"labels": [[name, class], ...]} or {"labels": null}'):
        data = read(listing, min(MAX_LISTING, MAX_ENTRY * (len(entries.images) + 256)))
        return _from_listing(json.loads(data), listing, entries.images, where), [f"classes from {listing}"]


def clean(name: str) -> str:
    """A name of an archive or of dataset.json with slashes, and without what leads up, to the root, or nowhere."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", ".", ".."))


def _from_listing(found: Any, listing: str, images: Sequence[str], where: str) -> Classes:
    if not isinstance(found, dict) or "labels" not in found:
        raise BeelineError(
            f'{listing} in {where} has no "labels"; expected {{"labels": [[name, class], ...]}} or {{"labels": null}}'
        )
    if found["labels"] is None:
        return unlabelled(len(images))
    folder = os.path.dirname(listing)
    pairs = found["labels"].items() if isinstance(found["labels"], dict) else found["labels"]
    labels = {os.path.join(folder, clean(name)): label for name, label in pairs}
    if len(labels) < len(pairs):
        raise BeelineError(
            f"{listing} in {where} lists {len(pairs) - len(labels):,} names twice; expected a label for each image"
        )
    missing = [name for name in images if name not in labels]
    if missing:
        raise BeelineError(f"{listing} in {where} has no label for {len(missing):,} images, the first of them {missing[0]}")
    absent = sorted(labels.keys() - set(images))
    if absent:
        raise BeelineError(
            f"{listing} in {where} lists {len(absent):,} images that are not there, the first of them {absent[0]}; complete "
            "the data set, or take them out of the list"
        )
    return class_indices([labels[name] for name in images], images, f"{listing} in {where}")


def _from_folders(images: Sequence[str], where: str) -> tuple[Classes, list[str]]:
    """With more than one folder of images, these are the classes."""
    folders = sorted({os.path.dirname(name) for name in images})
    if len(folders) == 1:
        return unlabelled(len(images)), []
    if all(NUMBERED.fullmatch(name) for name in images):
        return unlabelled(len(images)), [f"numbered folders as EDM's tool makes them are no classes, and there is no {LISTING}"]
    base = os.path.commonpath(folders)
    inner = [name[len(base) + 1 :] if base else name for name in images]
    loose = [name for name in inner if "/" not in name]
    tops = [name.split("/")[0] for name in inner]
    check_splits(
        {re.sub(r"[^a-z]", "", top.lower()): top for top in set(tops) - set(loose)}, os.path.join(where, base).rstrip("/")
    )
    if loose:
        raise BeelineError(
            f"{where} holds {len(loose):,} images beside its folders of images, the first of them {loose[0]}; expected "
            "folders, one for each class, or images alone"
        )
    first: dict[str, str] = {}
    for top, name in zip(tops, images, strict=True):
        folder = os.path.dirname(name)
        if first.setdefault(top, folder) != folder:
            raise BeelineError(
                f"{where} has images of one class in several folders, {first[top]} and {folder}; expected one folder for each "
                "class. Move them together, or give the folder whose folders are the classes"
            )
    return ranked(tops), ["classes from folders"]
