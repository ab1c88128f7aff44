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
    """A sweep over SOT step schedules, learning rates and weights; all trials start from one shared student. Each trial is one
    process; as many run at once as fit into the cluster."""

    name: Name = "sot"
    init: ModelPath = "students/lmm/reconstruction"
    trials: Annotated[int, Range(1, MAX_TRIALS)] = resource(8)
    """Trials. A finished sweep can be extended with more; the first ones stay as they are."""
    schedules: Some[StepList] = ("0", "0,1")
    """Step schedules, each as "0,8", used in turn: a trial trains on its schedule and is measured at it."""
    learning_rates: tuple[Positive, Positive] = (1e-4, 1e-3)
    """Bounds of the generator's learning rate, drawn log-uniformly."""
    critic_learning_rates: tuple[Positive, Positive] = (5e-4, 5e-3)
    """Bounds of the discriminator's learning rate, drawn log-uniformly."""
    adversarial_weights: Some[Amount] = (0.0,)
    """Weights of the adversarial term to draw from; 0 means no discriminator."""
    ema_half_lives: Some[HalfLife] = (693.0,)
    """Half-lives of the averaged weights to draw from, in iterations."""
    iterations: Count = 1000
    rungs: Annotated[int, Range(1, 30)] = 2
    """Measurements of a trial, at equal intervals; ASHA stops the worse half at the first, second, fourth and so on."""
    features: Literal["probe_losses", "probe", "inception", "dinov2_vitl14", "dinov2_vits14"] = "probe_losses"
    """Feature network in which the evaluation pool compares finished trials. Choose another one than in the report: a metric
    used for selection looks too good afterwards."""
    promote: NameOrNone = resource("")
    """Publish the best trial with `promote_nfe` evaluations as students/<this name>."""
    promote_nfe: Steps = resource(1)
    max_concurrent: Annotated[int, Range(0, MAX_PROCESSES)] = resource(0)
    """Trials at once; 0 means as many as fit into the cluster."""
    max_failures: Restarts = resource(3)
    """Restarts of a trial, from its last checkpoint, before it counts as failed."""
    threads: Threads = resource(1)
    gpus: Gpus = resource(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("learning_rates", "critic_learning_rates"):
            low, high = getattr(self, name)
            self.require(low <= high, name, "the lower bound, then the upper bound")
