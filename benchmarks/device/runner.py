"""Run sections of checks in separate processes: a crash or a hang costs one check, never the rest.

Sections are distributed over lanes. A lane is one process that runs its sections in order. Lanes run at the same time, because
most of the time goes into compilation and into the CPU's side of comparisons. The last sections measure speed and have the
machine to themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.device.checks import COMPILING, Check, Setting, Skip

BROKEN = 3  # exit status of a process whose GPU context is lost
LEAST = 30.0  # seconds that must be left to start a check that compiles
GRACE = 15.0  # seconds past the deadline before a process is ended
PATIENCE = {"cuda": 1.0, "cpu": 20.0}  # factors on the checks' time limits: a CPU may be slow and busy


@dataclasses.dataclass
class Row:
    """A finished check, as it is printed and saved."""

    section: str
    name: str
    status: str
    figure: str
    expected: str
    seconds: float
    traceback: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def line(self) -> str:
        """Format the check as a line."""
        expected = f" ({self.expected})" if self.expected else ""
        return f"{self.status}  {self.section}: {self.name}: {self.figure}{expected}  [{self.seconds:.1f} s]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Task of a process: checks of `sections` that match `only` and are not in `done`, until `deadline`."""

    setting: Setting
    sections: tuple[str, ...]
    only: tuple[str, ...]
    done: frozenset[tuple[str, str]]
    deadline: float
    threads: int
    log: str


def wanted(section: str, check: str, only: Sequence[str]) -> bool:
    """Return whether `only` selects this check; an empty `only` selects all."""
    return not only or any(word == section or word in check for word in only)


def work(connection: Connection, task: Work) -> None:
    """Run the process of a lane; it sends ("start", section, check), ("row", Row) and ("memory", section, MiB)."""
    os.setsid()  # so that the compilers it starts end with it
    log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from beeline.numerics import set_numerics

    torch.set_num_threads(task.threads)
    set_numerics()
    for section in task.sections:
        if not task.setting.gpu:
            memory = None
        else:
            torch.cuda.reset_peak_memory_stats()
            memory = torch.cuda.max_memory_allocated
        connection.send(("start", section, ""))
        checks = importlib.import_module(f"benchmarks.device.{section}").checks(task.setting)
        for check in checks:
            if wanted(section, check.name, task.only) and (section, check.name) not in task.done:
                connection.send(("start", section, check.name, check.limit))
                row = run(section, check, task.deadline, compiling=task.setting.compiling)
                connection.send(("row", row))
                if "speed" in section:
                    free()
                if "CUDA error" in row.traceback or "device-side assert" in row.traceback:
                    os._exit(BROKEN)  # this process can do nothing more
        if memory is not None:
            connection.send(("memory", section, memory() / 2**20))
        del checks
        free()
    connection.send(("end",))


def free() -> None:
    """Free what a section left behind: compiled code, CUDA graphs, cached memory."""
    import torch

    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(section: str, check: Check, deadline: float, *, compiling: bool = True) -> Row:
    """Run one check and return its row; all exceptions are caught."""
    start = time.monotonic()
    if time.time() > deadline - (LEAST if check.limit == COMPILING else 0):
        return Row(section, check.name, "SKIP", "no time left", "", 0.0)
    if "compiled" in check.name and not compiling:
        return Row(section, check.name, "SKIP", "left out by --no-compile", "", 0.0)
    try:
        outcome = check.call()
    except Skip as reason:
        return Row(section, check.name, "SKIP", str(reason), "", time.monotonic() - start)
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
        return Row(section, check.name, "FAIL", reason, "", time.monotonic() - start, traceback.format_exc())
    status = "PASS" if outcome.passed else "FAIL"
    seconds = time.monotonic() - start
    return Row(section, check.name, status, outcome.figure, outcome.expected, seconds, "", dict(outcome.details))


class Lane:
    """A process, its current check, and its replacement after a crash or a hang."""

    def __init__(self, task: Work) -> None:
        self.task, self.finished = task, False
        self.done: set[tuple[str, str]] = set(task.done)
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe(duplex=False)
        task = dataclasses.replace(self.task, done=frozenset(self.done))
        self.process = context.Process(target=work, args=(theirs, task))
        self.process.start()
        theirs.close()
        self.at: tuple[str, str] = (self.task.sections[0], "")
        self.since, self.limit = time.time(), 180.0 * PATIENCE[self.task.setting.device.type]

    def overdue(self) -> tuple[str, str] | None:
        """Return the status and the reason if the current check must end now, otherwise None."""
        if time.time() - self.since > self.limit:
            return "FAIL", f"still running after {self.limit:.0f} s, ended"
        if time.time() > self.task.deadline + GRACE:
            return "SKIP", f"no time left, ended after {time.time() - self.since:.0f} s"
        return None

    def read(self) -> list[Row] | tuple[str, float]:
        """Read the next report: rows, or a section's peak memory in MiB."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            return self.lost("FAIL", f"the process ended with status {self.process.exitcode}")
        kind, *rest = message
        if kind == "start":
            self.at, self.since = (rest[0], rest[1]), time.time()
            self.limit = (rest[2] if len(rest) > 2 else 180.0) * PATIENCE[self.task.setting.device.type]
        elif kind == "row":
            self.done.add((rest[0].section, rest[0].name))
            return [rest[0]]
        elif kind == "memory":
            return rest[0], rest[1]
        elif kind == "end":
            self.finished = True
            self.process.join(10)
            self.end()
        return []

    def end(self) -> None:
        """End the process and all processes that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            assert self.process.pid is not None
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # it may not lead a process group yet
        self.process.join(10)
        self.connection.close()

    def lost(self, status: str, reason: str) -> list[Row]:
        """End the process and start another for the remaining checks; return the row of the check it was running."""
        self.end()
        section, name = self.at
        rows, seconds, sections = [], time.time() - self.since, self.task.sections
        if (
            self.at in self.done
        ):  # it ended between two checks: continue after a broken GPU context, otherwise blame the section
            name = name if self.process.exitcode == BROKEN else ""
        if (section, name) not in self.done:
            log = Path(self.task.log)
            tail = log.read_text(errors="replace")[-4000:] if log.exists() else ""
            rows.append(Row(section, name or "the section itself", status, reason, "", seconds, tail))
            self.done.add((section, name))
        left = sections[sections.index(section) + (not name) :]
        late = time.time() > self.task.deadline
        self.finished = late or not left
        if late:
            rows += [Row(other, "all checks", "SKIP", "no time left", "", 0.0) for other in left if other != section]
        elif left:
            self.task = dataclasses.replace(self.task, sections=left)
            self._start()
        return rows


def run_lanes(tasks: Sequence[Work], report: Callable[[Row], None], memory: dict[str, float]) -> None:
    """Run all lanes to the end. Rows go to `report`, each section's peak memory to `memory`."""
    lanes = [Lane(task) for task in tasks]
    try:
        while any(not lane.finished for lane in lanes):
            active = [lane for lane in lanes if not lane.finished]
            ready = wait([lane.connection for lane in active], timeout=1.0)
            for lane in active:
                if lane.connection in ready:
                    reply = lane.read()
                    if isinstance(reply, tuple):
                        memory[reply[0]] = max(reply[1], memory.get(reply[0], 0.0))
                        continue
                    for row in reply:
                        report(row)
                elif reason := lane.overdue():
                    for row in lane.lost(*reason):
                        report(row)
    finally:
        for lane in lanes:
            if not lane.finished:
                lane.end()
