"""Part of a source, for rehearsals, which need a few images of every class."""

from __future__ import annotations

from typing import Any

import numpy as np

from beeline.files.arrays import spread
from pipeline.sources.labels import Classes


class Part:
    """`count` images of a source, spread evenly over its classes and including the highest class, which gives their number."""

    def __init__(self, source: Any, count: int) -> None:
        labels, classes = source.classes
        chosen = np.sort(np.argsort(labels, kind="stable")[::-1][spread(count, len(labels))])
        self._source, self._chosen = source, chosen
        self.classes, self.pixels, self.sequential = Classes(labels[chosen], classes), source.pixels, source.sequential
        self.names: list[str] = [source.names[int(i)] for i in chosen]
        self.notes = [*source.notes, f"{count:,} of {len(labels):,} images are used (--images.limit)"]

    def image(self, index: int) -> np.ndarray:
        """Return image `index` of the part as the source does."""
        return self._source.image(int(self._chosen[index]))
