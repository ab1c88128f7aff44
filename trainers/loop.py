"""The training loop: steps, logs, checkpoints. It knows no Ray; `Session` is what it sees of the outside world.

A task says what one step does; the loop does the rest. Everything random in a step is a function of (seed, rank, step), so
a checkpoint holds weights, optimisers and counters, and a resumed run ends with the weights of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import resource
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from beeline.config import OptimizerConfig
from beeline.errors import BeelineError
from beeline.noise import stream_seed
from pipeline.reader import ShardReader
from pipeline.storage import Folder

MAX_SKIPPED = 100  # steps in a row
LOG = "train.jsonl"
State = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """One rank's view of a run. `save` is called by all ranks alike, with the state on rank 0 and None elsewhere."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    folder: Folder
    restored: State | None = None
    save: Callable[[int, dict[str, float], State | None], None]
    readers: list[ShardReader] = dataclasses.field(default_factory=list, init=False)

    def read(self, folder: Folder, config: dict[str, Any], seed: int) -> ShardReader:
        """A reader of shards; the log tells how long steps wait for it."""
        self.readers.append(ShardReader(folder, config, seed))
        return self.readers[-1]

    def share(self, batch_size: int, step: int) -> tuple[int, int]:
        """(start, size) of this rank's part of global batch `step` in the endless stream of rows."""
        size = batch_size // self.world_size
        return step * batch_size + self.rank * size, size

    def generator(self, seed: int, step: int) -> torch.Generator:
        """The source of this step's randomness on this rank; torch's global one (dropout) is seeded alike."""
        number = stream_seed(seed, "step", self.rank, step)
        torch.manual_seed(number)
        return torch.Generator(self.device).manual_seed(number)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, wrapped so that gradients are averaged over ranks."""
        if self.world_size == 1:
            return model
        # Buffers follow the weights by themselves (spectral norm, resampling filters): nothing to broadcast.
        return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def accumulating(self, model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """For gradients that are summed over several backward passes: ranks exchange them in the last one alone."""
        return contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


class Task(Protocol):
    """What is trained. `name` heads the log lines; `images_per_step` counts over all ranks."""

    name: str
    iterations: int
    images_per_step: int

    def step(self, step: int) -> dict[str, float]:
        """One step; returns figures for the log, among them "skipped" (1 for a step with non-finite gradients)."""
        ...

    def state_dict(self, step: int) -> State:
        """Everything that steps change, as tensors and plain Python, after `step` steps."""
        ...

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        ...

    def publish(self) -> None:
        """Write the finished model. Called on rank 0."""
        ...


def run(task: Task, session: Session, *, log_every: int, checkpoint_every: int) -> None:
    """Train `task` to its end, from `session.restored` where there is one, and publish the model.

    Raises BeelineError if MAX_SKIPPED steps in a row had gradients that are not finite.
    """
    start, skipped, in_a_row, rows = 0, 0, 0, []
    if session.restored is not None:
        start, skipped = session.restored["step"], session.restored["skipped"]
        task.load_state_dict(session.restored["task"])
        rows = [row for row in read_log(session.folder) if row["step"] <= start]
        if session.rank == 0:
            print(f"{task.name}: resumed at step {start} of {task.iterations}", flush=True)
    sums: dict[str, float] = {}
    began = last = time.monotonic()
    since, waited_before = start, 0.0
    for step in range(start, task.iterations):
        figures = task.step(step)
        bad = int(figures.pop("skipped"))
        skipped, in_a_row = skipped + bad, in_a_row + 1 if bad else 0
        if in_a_row == MAX_SKIPPED:
            raise BeelineError(
                f"{task.name}: the gradients of {MAX_SKIPPED} steps in a row, up to step {step + 1}, are not finite, and were "
                "skipped; lower the learning rate, or train in fp32. The last checkpoint is kept"
            )
        for key, value in figures.items():
            sums[key] = sums.get(key, 0.0) + value
        done = step + 1
        if done % log_every == 0 or done == task.iterations:
            now = time.monotonic()
            row = {"step": done, **{key: value / (done - since) for key, value in sums.items()}, "skipped": skipped}
            row["images_per_s"] = task.images_per_step * (done - since) / (now - last)
            waited = sum(reader.waited for reader in session.readers)
            row["data_wait"] = (waited - waited_before) / (now - last)
            row["peak_mb"] = peak_memory(session.device)
            waited_before = waited
            row["seconds"] = now - began
            rows.append(row)
            if session.rank == 0:
                left = (task.iterations - done) * (now - began) / (done - start)
                shown = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if key not in ("step", "seconds"))
                print(f"{task.name}: step {done} of {task.iterations}, {shown}, {left:.0f} s left", flush=True)
            sums, since, last = {}, done, now
        if done % checkpoint_every == 0 and done < task.iterations:
            state = None
            if session.rank == 0:
                write_log(session.folder, rows)
                state = {"step": done, "skipped": skipped, "task": task.state_dict(done)}
            session.save(done, rows[-1] if rows else {}, state)
    if session.rank == 0:
        write_log(session.folder, rows)
        task.publish()


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, in MB: the GPU's, or its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read_log(folder: Folder) -> list[dict[str, Any]]:
    """The rows of train.jsonl, [] where there is none."""
    try:
        return [json.loads(line) for line in folder.read(LOG).splitlines()]
    except FileNotFoundError:
        return []


def write_log(folder: Folder, rows: Iterable[dict[str, Any]]) -> None:
    """Publish train.jsonl whole: object storage cannot append."""
    folder.write(LOG, "".join(json.dumps(row) + "\n" for row in rows).encode())


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser that `config` names."""
    cls = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam}[config.kind]
    extra = {"fused": True} if config.kind == "adam" else {"foreach": True}
    return cls(list(parameters), lr=config.lr, betas=config.betas, **extra)


def update(optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, total: int) -> dict[str, float]:
    """Apply the gradients at the schedule's learning rate for `step` of `total`; skip the step if they are not finite.

    Gradients are the same on all ranks, so all ranks skip together.
    """
    rate = config.lr * min(1.0, (step + 1) / max(config.warmup, 1))
    if config.decay == "cosine":
        rate *= 0.05 + 0.95 * (1 + math.cos(math.pi * step / total)) / 2
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, config.clip or math.inf))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm if math.isfinite(norm) else 0.0, "skipped": float(not math.isfinite(norm))}
