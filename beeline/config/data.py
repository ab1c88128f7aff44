"""Settings of the stages that read, make and check data with a pool of actors."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from beeline.config.serialization import resource
from beeline.settings import (
    MAX_SHARDS,
    MAX_SHOWN,
    Amount,
    Count,
    Cpus,
    Gpus,
    OneOf,
    Processes,
    Range,
    Seed,
    Settings,
    Side,
    Size,
    Steps,
    Text,
    Threads,
    Whole,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolConfig(Settings):
    """The actor pool of a stage that reads images, samples or measures."""

    min_actors: Processes = resource(1)
    max_actors: Processes = resource(2)
    """The pool grows up to here as long as there is work and the cluster, or its autoscaler, has room."""
    gpus: Gpus = resource(0)
    """GPUs of each actor; fractions share one."""
    cpus: Cpus = resource(0.5)
    """Ray CPUs that each actor reserves. Below 1 where actors would otherwise take every CPU and starve Ray Data."""
    threads: Threads = resource(1)
    """CPU threads of each actor."""
    price: Amount = resource(0.0)
    """Price of one actor for an hour, in any currency; 0 shows no costs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.max_actors >= self.min_actors, "max_actors", f"at least min_actors, {self.min_actors}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesConfig(PoolConfig):
    """Real images into images/."""

    source: Text = "digits"
    """"digits" (scikit-learn's, built in), a folder or zip of images (sub-folders are classes, or dataset.json lists them),
    CIFAR's python archive, or Parquet with an image column (a file or a folder of files)."""
    resolution: Side = 8
    """Side in pixels."""
    channels: Annotated[int, OneOf((1, 3))] = 1
    fit: Literal["crop", "stretch", "adm"] = "crop"
    """Fit of other images: centre square and Lanczos, the whole image stretched, or as ADM prepared ImageNet."""
    shard_size: Size = 1024
    """Images per Parquet file."""
    limit: Whole = 0
    """Take only so many images, evenly spread over the classes; 0 takes all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig(PoolConfig):
    """Noise-image pairs from the teacher into pairs/."""

    count: Count
    shard_size: Size
    """Pairs per Parquet file: what one actor makes in one to three minutes, at most 128 MB."""
    batch_size: Size = 256
    """Pairs sampled at once; part of the identity, since kernels are not exactly batch-invariant."""
    solver: Literal["heun", "calibrated"] = "heun"
    """"heun" is the paper's; "calibrated" takes the levels in the teacher's solver.json (python -m beeline.calibrate)."""
    num_steps: Steps = 18
    """Heun steps; 2 num_steps - 1 evaluations."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the network; the solver's state is always float64."""
    compiled: bool = False
    """Compile the network: worth it for large networks and many pairs, costs minutes at the start of each actor."""
    dtype: Literal["float32", "float16", "uint8"] = "float32"
    """Type of x1 in the store. float16 is off by at most 2.4e-4 within [-1, 1], a fiftieth of the solver's own error; uint8 is
    off by up to 4e-3, and clips values."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shards(self, self.count, self.shard_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyConfig(PoolConfig):
    """A check of a store of pairs."""

    remake: Whole = 8
    """Shards, drawn at random, whose noise is made again and compared by its CRC-32."""
    resample: Whole = 0
    """Batches, drawn at random, that the teacher samples again."""
    shown: Annotated[int, Range(0, MAX_SHOWN)] = 100
    """Pairs on the contact sheet, drawn at random."""
    remove: bool = False
    """Remove damaged shards, so that gen_pairs.py makes them again."""
    seed: Seed = 0


def check_shards(config: Settings, count: int, shard_size: int) -> None:
    limit = MAX_SHARDS * shard_size
    config.require(count <= limit, "count", f"at most {limit:,}, which is {MAX_SHARDS:,} shards of {shard_size:,}")
