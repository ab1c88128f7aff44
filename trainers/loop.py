"""The training loop: steps, logs, validations, checkpoints. It does not use Ray; a `Session` describes its surroundings.

A task defines one step; the loop does the rest. All randomness in a step is a function of (seed, rank, step). A checkpoint
therefore holds only weights, optimisers and counters, and a resumed run ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from beeline.errors import BeelineError
from beeline.files.layout import check_layout
from beeline.noise import stream_seed
from pipeline.reader import ShardReader
from pipeline.storage import Folder
from pipeline.training_log import SECONDS, STEP
from trainers import checkpoints
from trainers.log import Figures, Log, write_log
from trainers.tracking import Tracker

MAX_SKIPPED = 100  # consecutive steps
NOTICE_EVERY = 10  # steps between checks for a leaving machine: each check synchronises all ranks, about 5 ms
LOOP = "loop"  # the loop's own entry in a checkpoint
State = checkpoints.State


class MisfitError(BeelineError):
    """An intact checkpoint that does not fit this task."""


@dataclasses.dataclass(kw_only=True)
class Session:
    """One rank's view of a run.

    `restored` is the state to continue from; `run` removes it, to free its memory. `leaving` returns whether a machine is
    about to be taken away; all ranks call it at the same steps and get the same answer.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    folder: Folder
    restored: State | None = None
    leaving: Callable[[], bool] = lambda: False
    trackers: Sequence[Tracker] = ()
    readers: list[ShardReader] = dataclasses.field(default_factory=list, init=False)

    def read(self, folder: Folder, config: dict[str, Any], seed: int, classes: range | None = None) -> ShardReader:
        """A reader of shards. The log shows how long steps wait for it."""
        self.readers.append(ShardReader(folder, config, seed, classes))
        return self.readers[-1]

    def share(self, batch_size: int, step: int) -> tuple[int, int]:
        """(start, size) of this rank's part of global batch `step` in the endless stream of rows."""
        first, last = (batch_size * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return step * batch_size + first, last - first

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average gradients over all ranks, for parameters that `parallel` has not wrapped."""
        if self.world_size > 1:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.world_size

    def generator(self, seed: int, step: int) -> torch.Generator:
        """The random generator of this step on this rank.

        Also seeds torch's global generator (dropout), with another seed: otherwise both would draw the same numbers.
        """
        torch.manual_seed(stream_seed(seed, "global", self.rank, step))
        return torch.Generator(self.device).manual_seed(stream_seed(seed, "step", self.rank, step))

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, wrapped so that gradients are averaged over ranks."""
        if self.world_size == 1:
            return model
        # Nothing to broadcast: buffers change equally on all ranks (spectral norm) or are constant (resampling filters).
        return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


class Task(Protocol):
    """A training, as the loop sees it. `name` starts the log lines; `images_per_step` counts images of all ranks."""

    name: str
    iterations: int
    images_per_step: int

    @property
    def phase_ends(self) -> Sequence[int]:
        """Steps after which a phase ends. The log ends a row there as well."""
        ...

    def step(self, step: int) -> Figures:
        """Do one step. Returns figures for the log, numbers or tensors; "skipped" is 1 if gradients were not finite."""
        ...

    def validate(self, step: int) -> dict[str, float]:
        """Evaluate the model after `step` steps. Returns figures for the log. Called on rank 0, each `validate_every` steps."""
        ...

    def state_dict(self) -> State:
        """Everything that steps change, as tensors and plain Python, in a few entries."""
        ...

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        ...

    def publish(self) -> None:
        """Write the finished model. Called on rank 0."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cadence:
    """Intervals in steps. `validate_every` 0 disables validation. `keep` is the number of checkpoints that are kept."""

    log_every: int
    checkpoint_every: int
    validate_every: int = 0
    keep: int = 2


def train(
    build: Callable[[Session], Task],
    session: Session,
    cadence: Cadence,
    newest: Callable[[Collection[int]], tuple[int, State] | None],
) -> bool:
    """Build a task and `run` it from the newest checkpoint that fits it, or from the start.

    `newest(refused)` returns the newest intact checkpoint whose step is not in `refused`, the same on all ranks.
    """
    refused: set[int] = set()
    while True:
        session.readers.clear()
        step, session.restored = newest(refused) or (0, None)
        try:
            return run(build(session), session, cadence)
        except MisfitError as error:  # the task may have loaded half of the state: build a new one
            if session.rank == 0:
                print(f"{session.folder}/{checkpoints.CHECKPOINTS}/{checkpoints.name_of(step)}: {error}", flush=True)
            refused.add(step)


def run(task: Task, session: Session, cadence: Cadence) -> bool:
    """Train `task` to its end, from `session.restored` if it is set, and publish the model.

    Returns True when the model is published. Returns False if a machine is about to leave: a checkpoint of the current step
    is saved, and the caller must restart the ranks. Raises BeelineError if the gradients of MAX_SKIPPED steps in a row are
    not finite, and MisfitError if `restored` does not fit this task.
    """
    log = Log(session.readers, session.device, task.images_per_step)
    if session.restored is not None:
        log.restore(_restore(task, session), session.folder)
        if session.rank == 0:
            print(f"{task.name}: resumed at step {log.done} of {task.iterations}", flush=True)
            for tracker in session.trackers:
                for row in log.rows:
                    tracker.log(row)
    began, start = time.monotonic(), log.done
    for done in range(start + 1, task.iterations + 1):
        log.add(task.step(done - 1))
        if log.skipped_in_a_row == MAX_SKIPPED:
            raise BeelineError(
                f"{task.name}: the gradients of {MAX_SKIPPED} steps in a row, up to step {done}, are not finite; "
                "lower the learning rate, or train in fp32. The last checkpoint is kept"
            )
        final = done == task.iterations
        validate = bool(cadence.validate_every) and (done % cadence.validate_every == 0 or final)
        if done % cadence.log_every == 0 or validate or final or done in task.phase_ends:
            log.end_row()
            if session.rank == 0:
                seconds_left = (task.iterations - done) * (time.monotonic() - began) / (done - start)
                _show(task, session, log.rows[-1], validate, seconds_left)
            log.start_row()
        leaving = done % NOTICE_EVERY == 0 and session.leaving()
        if (done % cadence.checkpoint_every == 0 or leaving) and not final:
            if session.rank == 0:
                if leaving:
                    print(f"{task.name}: a machine is about to leave; checkpoint at step {done}", flush=True)
                write_log(session.folder, log.rows)
                state = {LOOP: log.state_dict(), **task.state_dict()}
                checkpoints.save(session.folder, done, state, keep=cadence.keep)
            if leaving:
                return False
    if session.rank == 0:
        write_log(session.folder, log.rows)
        task.publish()
        for tracker in session.trackers:
            tracker.close()
    return True


def _show(task: Task, session: Session, row: dict[str, Any], validate: bool, seconds_left: float) -> None:
    """Print a row of the log and send it to the trackers. With `validate`, first add the figures of a validation."""
    if validate:
        row |= task.validate(row[STEP])
    shown = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if key not in (STEP, SECONDS))
    print(f"{task.name}: step {row[STEP]} of {task.iterations}, {shown}, {seconds_left:.0f} s left", flush=True)
    for tracker in session.trackers:
        tracker.log(row)


def _restore(task: Task, session: Session) -> State:
    """Load the task's state and free it. Returns the loop's own part."""
    state, session.restored = dict(session.restored or {}), None
    try:
        own = state.pop(LOOP)
        check_layout(own, {"done": 0, "sums": {}, "counts": {}, "skipped": 0, "skipped_in_a_row": 0})
        task.load_state_dict(state)
    except (BeelineError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # not a fault of the checkpoint
    except Exception as error:  # torch, optimisers and tasks raise different types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise MisfitError(f"the checkpoint is of another task ({reason}); the one before it is used") from error
    return own
