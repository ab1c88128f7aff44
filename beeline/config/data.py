"""Settings of the stages that read, make and check data with an actor pool."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from beeline.config.serialization import resource
from beeline.files.names import TEACHER
from beeline.settings import (
    MAX_SHARDS,
    MAX_SHOWN,
    Amount,
    Count,
    Cpus,
    Gpus,
    ModelPath,
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
    added,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolConfig(Settings):
    """The actor pool of a stage that reads images, samples or measures."""

    min_actors: Processes = resource(1)
    max_actors: Processes = resource(2)
    """Maximum size of the pool. It grows up to this while there is work and the cluster, or its autoscaler, has room."""
    gpus: Gpus = resource(0)
    """GPUs of each actor; fractions share one."""
    cpus: Cpus = resource(0.5)
    """Ray CPUs that each actor reserves. Less than 1 if the actors would otherwise take every CPU and starve Ray Data."""
    threads: Threads = resource(1)
    """CPU threads of each actor."""
    price: Amount = resource(0.0)
    """Cost of one actor-hour, in any currency; 0 hides costs in the progress line."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.max_actors >= self.min_actors, "max_actors", f"at least min_actors, {self.min_actors}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesConfig(PoolConfig):
    """Real images for images/."""

    source: Text = "digits"
    """"digits" (scikit-learn's, built in), a folder or zip of images (sub-folders are classes, or dataset.json lists them),
    CIFAR's python archive, or Parquet with an image column (a file or a folder of files)."""
    resolution: Side = 8
    """Side in pixels."""
    channels: Annotated[int, OneOf((1, 3))] = 1
    fit: Literal["crop", "stretch", "adm"] = "crop"
    """How images of other sizes are fitted: centre square or whole image, resized with a Lanczos filter, or like ADM's
    ImageNet."""
    shard_size: Size = 1024
    """Images per Parquet file."""
    limit: Whole = 0
    """Use only this many images, evenly spread over the classes; 0 uses all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig(PoolConfig):
    """Noise-image pairs, sampled from a model: the teacher's are in pairs/, those of another model in <its folder>/pairs."""

    model: ModelPath = added("teacher")
    """Folder of the model: "teacher", or a student that follows an ODE, such as a rectified flow (reflow)."""
    count: Count
    shard_size: Size
    """Pairs per Parquet file: one to three minutes of work for an actor, at most 128 MB."""
    batch_size: Size = 256
    """Pairs sampled at once; part of the identity, because kernels are not exactly batch-invariant."""
    solver: Literal["heun", "calibrated"] = "heun"
    """"heun" is the paper's; "calibrated" uses the levels in the teacher's solver.json (python -m beeline.calibrate)."""
    num_steps: Steps = 18
    """Heun steps; they take 2 num_steps - 1 evaluations."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the network; the solver's state is always float64."""
    compiled: bool = False
    """Compile the network. Pays for large networks and many pairs; costs minutes at the start of each actor."""
    dtype: Literal["float32", "float16", "uint8"] = "float32"
    """Data type of x1 in the store. float16 has an error of at most 2.4e-4 within [-1, 1], a fiftieth of the solver's own;
    uint8 has an error of at most 4e-3 and is clipped."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shards(self, self.count, self.shard_size)
        calibrated = self.solver == "calibrated" and self.model != TEACHER
        self.require(not calibrated, "solver", f"'heun' for {self.model}, because only teachers are calibrated")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyConfig(PoolConfig):
    """Check of a store of pairs."""

    model: ModelPath = "teacher"
    """Folder of the model whose pairs are checked."""
    remake: Whole = 8
    """Shards, chosen at random, whose noise is drawn again and compared by CRC-32."""
    resample: Whole = 0
    """Batches, chosen at random, that the model samples again."""
    shown: Annotated[int, Range(0, MAX_SHOWN)] = 100
    """Pairs on the contact sheet, chosen at random."""
    remove: bool = False
    """Remove damaged shards, so that gen_pairs.py makes them again."""
    seed: Seed = 0


def check_shards(config: Settings, count: int, shard_size: int) -> None:
    limit = MAX_SHARDS * shard_size
    config.require(count <= limit, "count", f"at most {limit:,}, which is {MAX_SHARDS:,} shards of {shard_size:,}")
