"""Settings of evaluation."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from beeline.config.data import PoolConfig, check_shards
from beeline.config.serialization import resource
from beeline.sampling.few_step import RuleName
from beeline.settings import MAX_SHOWN, MAX_STEPS, Count, Range, Seed, Size, Some, StepList, Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(PoolConfig):
    """Metrics of models against the real images. The rows (`nfe`, `steps`, `solver`, `rule`) may differ from call to call:
    earlier rows are kept and not measured again."""

    features: Some[Literal["probe", "inception", "dinov2_vitl14", "dinov2_vits14", "probe_losses"]] = ("probe",)
    """Feature networks: the measuring probe; pretrained networks, whose weights must be fetched first (python -m
    beeline.weights fetch); or the losses' probe, which overrates students that were trained with it."""
    draws: Annotated[int, Range(1, 1000)] = 3
    """Independent noise seeds; results are the mean, standard deviation and minimum over them."""
    count: Whole = 0
    """Samples per draw; 0 means one for each real image, with its label."""
    shard_size: Size = 1024
    """Samples per work item."""
    batch_size: Size = 256
    seed: Seed = 1000
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the measured models; feature networks always run in fp32."""
    compiled: bool = False
    """Compile the models. Pays for large networks and many samples."""
    neighbours: Count = 10_000
    """Samples, and real images, used for precision, recall, density, coverage and authenticity; their cost is quadratic."""
    samples: Annotated[int, Range(1, MAX_SHOWN)] = 40
    """Images of the sample sheet."""
    held_out: Size = 256
    """Pairs that no student has seen, used for straightness and the distance to the teacher's images."""
    few: bool = resource(False)
    """Allow fewer samples than feature dimensions. Such results are meaningless; for rehearsals (cluster/rehearse.py)."""
    reference: str = resource("")
    """EDM's published Inception statistics of the real images (an .npz file with mu and sigma; local path or s3://...), used
    instead of images/. Its SHA-256 is part of the result."""
    nfe: Some[Annotated[int, Range(1, 2 * MAX_STEPS)]] = resource((35, 9, 3, 1))
    """Teacher: numbers of evaluations per image."""
    solver: Literal["auto", "heun", "euler", "calibrated"] = resource("auto")
    """Teacher: "auto" is Heun for odd counts from 15 up and Euler below, because few-step Heun diverges. "calibrated" uses the
    levels found by beeline.calibrate and ignores `nfe`."""
    steps: Some[StepList] = resource(("0",))
    """Students: step schedules, each as "0,8"; a number with a decimal point is a noise level: "0,0.821"."""
    rule: Literal["trained"] | RuleName = resource("trained")
    """Students: the sampling rule, if it differs from the one they were trained for: same_noise, line, fresh_noise or, for
    example, "gamma 0.5"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shards(self, self.count, self.shard_size)
