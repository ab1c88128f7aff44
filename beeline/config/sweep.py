"""Settings of a sweep."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from beeline.config.serialization import resource
from beeline.settings import (
    MAX_PROCESSES,
    MAX_TRIALS,
    Amount,
    Count,
    Gpus,
    HalfLife,
    IndexList,
    ModelPath,
    Name,
    NameOrNone,
    Positive,
    Range,
    Restarts,
    Settings,
    Some,
    Steps,
    Threads,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(Settings):
    """A sweep over SOT step schedules, learning rates and weights. Every trial starts from one shared student and is one
    process; as many trials run in parallel as the cluster has room for."""

    name: Name = "sot"
    """Results go to sweeps/<this name>."""
    init: ModelPath = "students/lmm/reconstruction"
    """Folder of the model that every trial starts from."""
    trials: Annotated[int, Range(1, MAX_TRIALS)] = resource(8)
    """Number of trials. A finished sweep can be extended; its first trials stay unchanged."""
    schedules: Some[IndexList] = ("0", "0,1")
    """Step schedules, each as "0,8". Trials take them in turn, to train on their steps and to be measured at them."""
    learning_rates: tuple[Positive, Positive] = (1e-4, 1e-3)
    """Bounds of the student's learning rate, which is drawn log-uniformly."""
    critic_learning_rates: tuple[Positive, Positive] = (5e-4, 5e-3)
    """Bounds of the discriminator's learning rate, which is drawn log-uniformly."""
    adversarial_weights: Some[Amount] = (0.0,)
    """Weights of the adversarial loss; each trial draws one. 0 disables the discriminator."""
    ema_half_lives: Some[HalfLife] = (693.0,)
    """Half-lives of the average, in iterations; each trial draws one."""
    iterations: Count = 1000
    """Training steps of a trial."""
    rungs: Annotated[int, Range(1, 30)] = 2
    """ASHA's rungs. Each is at twice the steps of the previous one, the last is the end. At the others the worse half stops."""
    features: Literal["probe_losses", "probe", "inception", "dinov2_vitl14", "dinov2_vits14"] = "probe_losses"
    """Features in which the evaluation pool measures finished trials. Avoid those of reported metrics: a student that is
    selected by a metric looks better in it than it is."""
    promote: NameOrNone = resource("")
    """Publish the best trial with `promote_nfe` evaluations as students/<this name>."""
    promote_nfe: Steps = resource(1)
    """Evaluations per image of the trial to promote."""
    max_concurrent: Annotated[int, Range(0, MAX_PROCESSES)] = resource(0)
    """Trials that run in parallel; 0 for as many as the cluster has room for."""
    max_failures: Restarts = resource(3)
    """Restarts of a trial, from its last checkpoint, before it counts as failed."""
    threads: Threads = resource(1)
    """CPU threads, and Ray CPUs, of each trial."""
    gpus: Gpus = resource(0)
    """GPUs of each trial."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("learning_rates", "critic_learning_rates"):
            low, high = getattr(self, name)
            self.require(low <= high, name, "the lower bound, then the upper bound")
