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
    ModelPath,
    Name,
    NameOrNone,
    Positive,
    Range,
    Restarts,
    Settings,
    Some,
    StepList,
    Steps,
    Threads,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(Settings):
    """A sweep over SOT step schedules, learning rates and weights, every trial from one shared student. Each trial is one
    process; as many run side by side as the cluster has room for."""

    name: Name = "sot"
    init: ModelPath = "students/lmm/reconstruction"
    trials: Annotated[int, Range(1, MAX_TRIALS)] = resource(8)
    """More may be added to a finished sweep: the first ones stay as they are."""
    schedules: Some[StepList] = ("0", "0,1")
    """Step schedules, each as "0,8", in turn: a trial trains on and is measured at them."""
    learning_rates: tuple[Positive, Positive] = (1e-4, 1e-3)
    """Bounds of the generator's, drawn log-uniformly."""
    critic_learning_rates: tuple[Positive, Positive] = (5e-4, 5e-3)
    """Bounds of the discriminator's, drawn log-uniformly."""
    adversarial_weights: Some[Amount] = (0.0,)
    """Of which one is drawn; 0 leaves the discriminator out."""
    ema_half_lives: Some[HalfLife] = (693.0,)
    """In iterations; of which one is drawn."""
    iterations: Count = 1000
    rungs: Annotated[int, Range(1, 30)] = 2
    """Measurements of a trial, at equal steps; ASHA stops the worse half at the first, the second, the fourth and so on."""
    features: Literal["probe_losses", "probe", "inception", "dinov2_vitl14", "dinov2_vits14"] = "probe_losses"
    """Where finished trials are judged by the evaluation pool. Best not where students are reported: what is chosen by a
    measure looks better in it than it is."""
    promote: NameOrNone = resource("")
    """Publish the best trial of `promote_nfe` evaluations as students/<this name>."""
    promote_nfe: Steps = resource(1)
    max_concurrent: Annotated[int, Range(0, MAX_PROCESSES)] = resource(0)
    """Trials side by side; 0 for as many as the cluster has room for."""
    max_failures: Restarts = resource(3)
    """Restarts of a trial, from its last checkpoint, before it counts as failed."""
    threads: Threads = resource(1)
    gpus: Gpus = resource(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("learning_rates", "critic_learning_rates"):
            low, high = getattr(self, name)
            self.require(low <= high, name, "the lower bound, then the upper one")
