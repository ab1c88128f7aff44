"""Convert the labels of data sets to class indices: numbers, words or one-hot rows; ambiguous labels are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from beeline.errors import BeelineError

MAX_CLASSES = 2**20


class Classes(NamedTuple):
    """Class of each image, int32 (n,), -1 for all images of a source without classes; the classes' names, if it has any."""

    labels: np.ndarray
    names: Sequence[str] = ()


def unlabelled(count: int) -> Classes:
    """Return `count` images without classes."""
    return Classes(np.full(count, -1, np.int32))


def class_indices(values: Sequence[Any], images: Sequence[str], where: str) -> Classes:
    """Convert `values`, the labels of `images`, to classes; `where` they come from is named in errors.

    Whole numbers, including floats, booleans and strings of digits, are class indices. Other strings are class names, numbered
    in alphabetical order. Lists are one-hot rows. -1 or null for all images means no classes.
    """
    if all(value is None or value == -1 for value in values):
        return unlabelled(len(values))
    if all(isinstance(value, str) for value in values) and not all(_is_number(value) for value in values):
        return ranked(values)
    return Classes(_checked([_index(value, name, where) for value, name in zip(values, images, strict=True)], images, where))


def ranked(words: Sequence[str]) -> Classes:
    """Number the classes by their names: in alphabetical order, or by value if all are numbers."""
    names = sorted(set(words))
    if all(_is_number(name) for name in names):
        names.sort(key=int)
    index = {name: k for k, name in enumerate(names)}
    return Classes(np.array([index[word] for word in words], np.int32), names)


def _is_number(word: str) -> bool:
    return word.isascii() and word.removeprefix("-").isdigit() and len(word) < 20


def _index(value: Any, name: str, where: str) -> int:
    """Return the class index that `value` stands for, -1 for none."""
    if value is None:
        return -1
    if isinstance(value, list):
        if all(isinstance(one, int | float) for one in value) and sorted(value) == [0] * (len(value) - 1) + [1]:
            return value.index(1)
        raise BeelineError(f"{where} gives {name} the label {value!r:.80}; expected one class for each image, not several")
    if (
        isinstance(value, int)
        or (isinstance(value, float) and value.is_integer())
        or (isinstance(value, str) and _is_number(value))
    ):
        return int(value)
    raise BeelineError(f"{where} gives {name} the label {value!r:.80}; expected a whole number, the class index")


def _checked(labels: list[int], images: Sequence[str], where: str) -> np.ndarray:
    lowest, highest = min(labels), max(labels)
    if lowest < 0:
        without = [name for name, label in zip(images, labels, strict=True) if label < 0]
        raise BeelineError(
            f"{where} gives {len(without):,} of {len(labels):,} images no class (null or below 0), the first of them "
            f"{without[0]}; expected a class for every image, or for none"
        )
    if highest >= MAX_CLASSES:
        name = images[labels.index(highest)]
        raise BeelineError(f"{where} gives {name} the label {str(highest)[:40]}; expected a class index below {MAX_CLASSES:,}")
    if lowest == 1 and highest > 1 and len(set(labels)) == highest:
        raise BeelineError(f"{where} has the labels 1 to {highest}; class indices count from 0: subtract 1 from each")
    return np.array(labels, np.int32)


def summary(classes: Classes) -> str:
    """Summarise the classes for a printed line: how many there are, and the smallest and the largest of them."""
    labels, names = classes
    images = f"{len(labels):,} image{'s' if len(labels) > 1 else ''}"
    if labels.max() < 0:
        return f"{images} without classes"
    counts = np.bincount(labels)
    held, empty = np.flatnonzero(counts), np.flatnonzero(counts == 0)

    def described(k: int) -> str:
        return f"{counts[k]:,} in class {k}{f' ({names[k]})' if k < len(names) else ''}"

    smallest, largest = int(held[counts[held].argmin()]), int(counts.argmax())
    ends = f"from {described(smallest)} to {described(largest)}"
    if counts[smallest] == counts[largest]:
        ends = described(largest) if len(held) == 1 else f"the same number in each: {described(largest)}"
    text = f"{images} in {len(counts):,} class{'es' if len(counts) > 1 else ''}, {ends}"
    return (
        text if not len(empty) else f"{text}; {len(empty):,} of the classes have no images, the first of them class {empty[0]}"
    )
