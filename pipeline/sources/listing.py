"""Interpret the file names of a folder or zip: which files are images, which are ignored, and which class each image has.

Names are relative, with slashes. Classes come from dataset.json as EDM's tool writes it ({"labels": [[name, class], ...]}, or
null), else from the folders. Ambiguous folders are refused.
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
MAX_LISTING = 256 * 2**20  # bytes of dataset.json
MAX_ENTRY = 4096  # bytes of dataset.json per image
HIDDEN = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")  # files that operating systems add, in addition to dot files
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
NUMBERED = re.compile(r"(.*/)?\d{5}/img\d{8}\.\w+")  # EDM's tool makes a folder for every thousand images
NAMED = 3  # ignored files named in a message


class Entries(NamedTuple):
    """Names in a source, sorted, by kind."""

    images: list[str]
    tables: list[str]
    listings: list[str]
    hidden: list[str]
    others: list[str]

    def ignored(self) -> list[str]:
        """Return lines that say which files are ignored."""
        kinds = {"hidden": self.hidden, "other": self.others}
        return [f"ignored {_counted(names, kind)}" for kind, names in kinds.items() if names]


def _counted(names: Sequence[str], kind: str) -> str:
    shown = ", ".join([*names[:NAMED], "..."] if len(names) > NAMED else names)
    return f"{len(names):,} {kind} file{'s' if len(names) > 1 else ''} ({shown})"


def sorted_out(names: Iterable[str]) -> Entries:
    """Sort the names by kind: images and tables by suffix, dataset.json, hidden files, and others."""
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
    """Raise BeelineError, listing what was found, unless there are images."""
    if entries.images:
        return
    names = {os.path.basename(name) for name in entries.others}
    if names & {"data_batch_1", "data_batch_1.bin"}:
        raise BeelineError(f"{where} is CIFAR-10's archive, unpacked; give the archive itself, cifar-10-python.tar.gz")
    if any(name.endswith(".arrow") for name in names):
        raise BeelineError(
            f"{where} was written by save_to_disk of the datasets library; write it as Parquet with to_parquet, and give "
            "that file"
        )
    kinds = {"hidden": entries.hidden, "other": entries.others, "Parquet": entries.tables}
    held = ", ".join(_counted(names, kind) for kind, names in kinds.items() if names) or "nothing"
    raise BeelineError(f"no images in {where}; it holds {held}. Expected files such as .png, .jpg, .webp or .tif, or Parquet")


def check_splits(words: Mapping[str, str], where: str) -> None:
    """Raise BeelineError if several splits of a data set, such as train and test, lie together.

    `words` maps lower-case words to the names they come from.
    """
    splits = sorted(name for word, name in words.items() if word in SPLITS)
    if len(splits) > 1:
        raise BeelineError(
            f"{where} holds several splits of a data set: {', '.join(splits)}. Images of all of them would be mixed; give the "
            "one to train on as images.source, in a folder or zip of its own"
        )


def classes_of(entries: Entries, where: str, read: Callable[[str, int], bytes]) -> tuple[Classes, list[str]]:
    """Return the classes of `entries.images`, and lines about where they come from.

    `read(name, most)` reads a file of at most `most` bytes.
    """
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
    """Normalise a name from an archive or dataset.json: forward slashes, no empty, "." or ".." parts, so it stays inside."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", ".", ".."))


def _from_listing(content: Any, listing: str, images: Sequence[str], where: str) -> Classes:
    if not isinstance(content, dict) or "labels" not in content:
        raise BeelineError(
            f'{listing} in {where} has no "labels"; expected {{"labels": [[name, class], ...]}} or {{"labels": null}}'
        )
    if content["labels"] is None:
        return unlabelled(len(images))
    folder = os.path.dirname(listing)
    pairs = content["labels"].items() if isinstance(content["labels"], dict) else content["labels"]
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
            f"{listing} in {where} lists {len(absent):,} images that do not exist, the first of them {absent[0]}; complete "
            "the data set, or remove them from the list"
        )
    return class_indices([labels[name] for name in images], images, f"{listing} in {where}")


def _from_folders(images: Sequence[str], where: str) -> tuple[Classes, list[str]]:
    """Use folders as classes if images lie in more than one folder."""
    folders = sorted({os.path.dirname(name) for name in images})
    if len(folders) == 1:
        return unlabelled(len(images)), []
    if all(NUMBERED.fullmatch(name) for name in images):
        return unlabelled(len(images)), [
            f"no classes: numbered folders, as EDM's tool makes them, are not classes, and {LISTING} is missing"
        ]
    base = os.path.commonpath(folders)
    inner = [name[len(base) + 1 :] if base else name for name in images]
    loose = [name for name in inner if "/" not in name]
    tops = [name.split("/")[0] for name in inner]
    check_splits(
        {re.sub(r"[^a-z]", "", top.lower()): top for top in set(tops) - set(loose)}, os.path.join(where, base).rstrip("/")
    )
    if loose:
        raise BeelineError(
            f"{where} holds {len(loose):,} images next to its folders of images, the first of them {loose[0]}; expected "
            "one folder for each class, or only images"
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
