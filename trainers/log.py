"""Write the log of a training, train.jsonl: a row every few steps, with the means of the figures since the previous row.

pipeline/training_log.py names the columns. In a row "skipped" counts the steps so far whose gradients were not finite.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from typing import Any

import torch

from beeline.files.names import LOG, TENSORBOARD
from beeline.objectives.learner import SKIPPED
from pipeline.reader import ShardReader
from pipeline.storage import Folder
from pipeline.training_log import DATA_WAIT, IMAGES_PER_S, PEAK_MB, SECONDS, STEP, read_log
from trainers.checkpoints import State
from trainers.tracking import tensorboard_events

EVENTS = f"{TENSORBOARD}/events.out.tfevents.0000000000.beeline"
Figures = dict[str, Any]


class Log:
    """The rows so far, and the figures since the last row. The mean of a figure is over the steps that reported it."""

    def __init__(self, readers: Sequence[ShardReader], device: torch.device, images_per_step: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.done = self.skipped = self.skipped_in_a_row = 0
        self._readers, self._device, self._images_per_step = readers, device, images_per_step
        self._sums, self._counts = dict[str, Any](), dict[str, int]()
        self._began = time.monotonic()
        self.start_row()

    def add(self, figures: Figures) -> None:
        """Add the figures of a step. SKIPPED is 1 if its gradients were not finite."""
        bad = int(figures.pop(SKIPPED))
        self.done += 1
        self.skipped, self.skipped_in_a_row = self.skipped + bad, self.skipped_in_a_row + 1 if bad else 0
        for key, value in figures.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
            self._counts[key] = self._counts.get(key, 0) + 1

    def end_row(self) -> None:
        """Append a row for the steps since the last row."""
        now = time.monotonic()
        means = {key: float(value) / self._counts[key] for key, value in self._sums.items()}
        row = {STEP: self.done, **means, SKIPPED: self.skipped}
        row[IMAGES_PER_S] = self._images_per_step * (self.done - self._timed_from) / (now - self._row_began)
        row[DATA_WAIT] = (self._waited() - self._waited_before) / (now - self._row_began)
        row[PEAK_MB] = peak_memory(self._device)
        row[SECONDS] = now - self._began
        self.rows.append(row)
        self._sums, self._counts = {}, {}

    def start_row(self) -> None:
        """Start the clock of the next row."""
        self._row_began, self._timed_from, self._waited_before = time.monotonic(), self.done, self._waited()

    def state_dict(self) -> State:
        """Counters and sums of the unfinished row, as plain Python. The rows themselves are in train.jsonl."""
        return {
            "done": self.done,
            "sums": {key: float(value) for key, value in self._sums.items()},
            "counts": dict(self._counts),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def restore(self, state: State, folder: Folder) -> None:
        """Continue from a `state_dict`, with the rows of <folder>/train.jsonl up to its step."""
        self.done = state["done"]
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.rows = [row for row in read_log(folder) if row[STEP] <= self.done]
        self.start_row()

    def _waited(self) -> float:
        return sum(reader.waited for reader in self._readers)


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process so far, in MB: GPU memory on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_log(folder: Folder, rows: Sequence[dict[str, Any]]) -> None:
    """Write train.jsonl and TensorBoard's file as a whole: object storage cannot append."""
    folder.write(LOG, "".join(json.dumps(row) + "\n" for row in rows).encode())
    folder.write(EVENTS, tensorboard_events(rows))
