"""Settings that trainings share (phases, optimisers, processes), and settings of the probes."""

from __future__ import annotations

import abc
import dataclasses
import functools
import operator
from typing import Annotated, Any, Literal

from beeline.config.networks import ProbeNetworkConfig
from beeline.config.serialization import resource
from beeline.objectives import Needs, ObjectiveConfig
from beeline.objectives.optimizer import OptimizerConfig
from beeline.settings import (
    MAX_PROCESSES,
    Count,
    Gpus,
    Positive,
    Processes,
    Range,
    Restarts,
    Seed,
    Settings,
    Share,
    Size,
    Threads,
    Whole,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig(Settings):
    """The two probes: one gives features for the losses, the other features for measuring."""

    losses: ProbeNetworkConfig
    measure: ProbeNetworkConfig
    iterations: Count = 600
    batch_size: Size = 128
    lr: Positive = 4e-3
    min_accuracy: Share = 0.9
    """Lowest held-out accuracy that is accepted: below it, features would say little."""
    gpus: Gpus = resource(0)
    """GPUs of each of the two trainings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkersConfig(Settings):
    """Processes of a training. May change on resume; the last bits may then differ."""

    count: Processes = 1
    """Training processes (DDP ranks); the batch is divided among them."""
    min_count: Annotated[int, Range(0, MAX_PROCESSES)] = resource(0)
    """Fewest processes to continue with when machines are lost and not replaced; 0 waits for all of `count`."""
    gpus: Gpus = 0
    """GPUs of each process."""
    threads: Threads = 1
    """CPU threads, and Ray CPUs, of each process."""
    max_failures: Restarts = 3
    """Restarts from the last checkpoint before training gives up; -1 for no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.min_count <= self.count, "min_count", f"at most count, {self.count}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseConfig(Settings):
    """One phase of a training."""

    iterations: Whole
    """Training steps of the phase; 0 skips it."""
    optimizer: OptimizerConfig
    objective: ObjectiveConfig
    """Settings of the method that computes the gradients of a step (beeline/objectives)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings, abc.ABC):
    """Settings that teachers and students share."""

    batch_size: Size = 512
    """Images per step, over all ranks."""
    ema_ramp: Share = 0.0
    """Upper limit of a half-life, as a share of the iterations so far, so that an average forgets its start (EDM: 0.05). 0
    keeps the decay constant."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16" runs learning networks under autocast and frozen networks in bf16. Weights, averages and losses stay float32."""
    seed: Seed = 0
    accumulate: Size = resource(1)
    """Gradient-accumulation steps per rank, if a rank's share of the batch does not fit into memory. The adaptive weight and
    the discriminator's batch norms then see one micro-batch at a time."""
    log_every: Count = resource(50)
    """Steps between rows of the log."""
    checkpoint_every: Count = resource(500)
    """Steps between checkpoints."""
    keep: Count = resource(2)
    """Checkpoints that are kept; older ones are removed."""
    workers: WorkersConfig = resource(WorkersConfig())

    @property
    @abc.abstractmethod
    def running(self) -> dict[str, PhaseConfig]:
        """The phases with iterations above 0, by name and in order."""

    @property
    @abc.abstractmethod
    def half_lives(self) -> tuple[float, ...]:
        """Half-lives of the averages of the weights, in iterations. The first average is the result."""

    @abc.abstractmethod
    def record(self, phase: str) -> dict[str, Any]:
        """Facts about the training, for the config.json of the model after `phase`."""

    def needs(self) -> Needs:
        """The combined needs of all phases that run."""
        return functools.reduce(operator.or_, (phase.objective.needs() for phase in self.running.values()), Needs())
