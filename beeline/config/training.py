"""Settings of trainings: optimiser, processes, probes and the teacher."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from beeline.config.networks import NetworkConfig, ProbeNetworkConfig
from beeline.config.serialization import resource
from beeline.settings import (
    MAX_PROCESSES,
    Amount,
    Count,
    Gpus,
    Positive,
    Processes,
    Range,
    Restarts,
    Seed,
    Settings,
    Share,
    ShareBelow1,
    Size,
    Threads,
    Whole,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig(Settings):
    """The two probes: features for the losses, and other features for measuring."""

    losses: ProbeNetworkConfig
    measure: ProbeNetworkConfig
    iterations: Count = 600
    batch_size: Size = 128
    lr: Positive = 4e-3
    min_accuracy: Share = 0.9
    """Held-out accuracy below which the probe is refused: its features would say little."""
    gpus: Gpus = resource(0)
    """GPUs of each of the two trainings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """Adam or RAdam with linear warm-up, then a constant or cosine learning rate."""

    kind: Literal["adam", "radam"] = "adam"
    lr: Positive = 1e-3
    betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.999)
    warmup: Whole = 0
    """Steps of linear warm-up."""
    decay: Literal["constant", "cosine"] = "constant"
    """"cosine" falls to 5 % of `lr` at the last step."""
    clip: Amount = 1.0
    """Gradient norm above which gradients are scaled down; 0 leaves them as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkersConfig(Settings):
    """How training is spread: changing it leaves the artifact's identity, though not its last bits, alone."""

    count: Processes = 1
    """Training processes (DDP ranks); the batch is divided among them."""
    min_count: Annotated[int, Range(0, MAX_PROCESSES)] = resource(0)
    """The fewest to go on with when machines are lost and none takes their place; 0 waits until all are there."""
    gpus: Gpus = 0
    """GPUs of each."""
    threads: Threads = 1
    """CPU threads, and Ray CPUs, of each."""
    max_failures: Restarts = 3
    """Restarts from the last checkpoint before training gives up; -1 never does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.min_count <= self.count, "min_count", f"at most count, {self.count}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig(Settings):
    """EDM training of the teacher."""

    network: NetworkConfig
    iterations: Count
    batch_size: Size
    optimizer: OptimizerConfig
    ema_half_life: Amount
    """In iterations."""
    ema_ramp: Share = 0.05
    """Limit of the half-life as a share of the iterations so far (EDM's ramp-up); 0 for none."""
    flip: bool = False
    """Mirror images at random: the data set and its mirror image are one."""
    augment: Share = 0.0
    """Probability of each non-leaking augmentation; needs a network with augment_dim 9. 0 leaves the images as they are."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16" trains under autocast; weights, their average and the loss stay float32."""
    seed: Seed = 0
    accumulate: Size = resource(1)
    """Parts that each rank's share of the batch is worked off in, where it does not fit the memory."""
    log_every: Count = resource(50)
    checkpoint_every: Count = resource(500)
    keep: Count = resource(2)
    """Checkpoints that are kept; older ones are removed."""
    workers: WorkersConfig = resource(WorkersConfig())
