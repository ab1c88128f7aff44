"""Settings of an evaluation."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from beeline.config.data import PoolConfig, check_shards
from beeline.config.serialization import resource
from beeline.settings import MAX_SHOWN, MAX_STEPS, Count, Range, Seed, Size, Some, StepList, Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(PoolConfig):
    """Measurement of models against the real images. `nfe`, `steps`, `solver` and `rule` may differ from call to call: earlier
    results stay and are not measured again."""

    features: Some[Literal["probe", "inception", "dinov2_vitl14", "dinov2_vits14", "probe_losses"]] = ("probe",)
    """Networks to measure in: the measuring probe, pretrained networks (fetch their weights first: python -m beeline.weights
    fetch), or the losses' probe, in which students that were trained with it look better than they are."""
    draws: Annotated[int, Range(1, 1000)] = 3
    """Independent noise seeds; results are mean, standard deviation and minimum over them."""
    count: Whole = 0
    """Samples per draw; 0 takes one for each real image, with its label."""
    shard_size: Size = 1024
    """Samples per work item."""
    batch_size: Size = 256
    seed: Seed = 1000
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the measured models; measuring networks always run in fp32."""
    compiled: bool = False
    """Compile the models: worth it for large networks and many samples."""
    neighbours: Count = 10_000
    """Samples, and real images, for precision, recall and related metrics, whose cost grows with the square of this number."""
    samples: Annotated[int, Range(1, MAX_SHOWN)] = 40
    """Images of the sample sheet."""
    held_out: Size = 256
    """Pairs that no student was trained on, for straightness and for the distance to the teacher's images."""
    few: bool = resource(False)
    """Allow fewer samples than features, for rehearsals (cluster/rehearse.py). Such figures mean nothing."""
    reference: str = resource("")
    """Statistics of the real images in Inception's features, instead of those of images/: an .npz file with mu and sigma as
    EDM publishes it (local path or s3://...). Its SHA-256 is part of the result."""
    nfe: Some[Annotated[int, Range(1, 2 * MAX_STEPS)]] = resource((35, 9, 3, 1))
    """Teacher: evaluations per image."""
    solver: Literal["auto", "heun", "euler", "calibrated"] = resource("auto")
    """Teacher: "auto" is Heun for odd counts from 15 on, Euler below (few-step Heun explodes). "calibrated" takes the levels
    found by beeline.calibrate, whatever `nfe` says."""
    steps: Some[StepList] = resource(("0",))
    """Students: step schedules, each as "0,8"."""
    rule: Literal["trained", "same_noise", "line", "fresh_noise"] = resource("trained")
    """Students: the sampling rule, if not the one they were trained for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shards(self, self.count, self.shard_size)
