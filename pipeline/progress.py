"""Progress of long work: a bar in a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

ESTIMATE_FROM = 0.05  # fraction of the work; earlier, items of different size would make an estimate useless
ESTIMATE_AFTER = 8  # reports, if that comes first


class Progress:
    """Counts finished work, as a context: `with Progress("pairs", 5000, "pairs") as progress: progress.add(100)`.

    In a terminal it shows a bar. Otherwise it prints a line at most every `interval` seconds, and one at the end. It shows the
    time left once an estimate is possible.
    """

    def __init__(self, what: str, total: int, unit: str, interval: float = 5.0) -> None:
        self.what, self.total, self.unit, self.interval = what, total, unit, interval
        self.done, self._reports = 0, 0
        self._start = self._last = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            self._bar = Bar(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar.add_task(self.what, total=self.total, text=f"0 of {self.total:,} {self.unit}")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, count: int, note: str = "") -> None:
        """Add `count` finished units; `note` is appended to the line."""
        self.done += count
        self._reports += 1
        now = time.monotonic()
        text = self._text(now - self._start) + note
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, text=text)
        elif now - self._last >= self.interval or (count and self.done >= self.total):
            self._last = now
            print(f"{self.what}: {text}", flush=True)

    def _text(self, seconds: float) -> str:
        text = f"{self.done:,} of {self.total:,} {self.unit}"
        if self.done == 0:
            return text
        rate = self.done / max(seconds, 1e-9)
        text += f", {rate:,.1f}/s" if rate >= 0.1 else f", {60 * rate:,.1f}/min"
        if self.done >= self.total * ESTIMATE_FROM or self._reports >= ESTIMATE_AFTER:
            text += f", {duration((self.total - self.done) / rate)} left"
        return text


def duration(seconds: float) -> str:
    """Format a duration in at most two units: "45 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(hours + minutes / 60), 24)
    return f"{days} d {hours} h"
