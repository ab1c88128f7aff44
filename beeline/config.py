"""The settings of every stage, as frozen keyword-only dataclasses. A recipe (recipes.py) is a function returning all.

Fields made with `resource(...)` say how the work is spread over machines: they may change between a run and its
continuation. Every other field is part of the result's identity: changed against an existing artifact, it is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from beeline.objectives import Needs, ObjectiveConfig
from beeline.settings import (
    MAX_PROCESSES,
    MAX_SHARDS,
    MAX_SHOWN,
    MAX_SIZE,
    MAX_STEPS,
    MAX_TRIALS,
    Amount,
    Channels,
    Classes,
    Count,
    Cpus,
    Divisible,
    Gpus,
    HalfLife,
    ModelPath,
    Name,
    NameOrNone,
    OneOf,
    Positive,
    Processes,
    Range,
    RecipeName,
    Restarts,
    Seed,
    Settings,
    Share,
    ShareBelow1,
    Side,
    Size,
    Some,
    StepList,
    Steps,
    Text,
    Threads,
    Whole,
)

GROUPS = 4  # of a probe's normalisation
RESERVED = (
    *("best", "checkpoints", "samples", "tensorboard"),
    *("config.json", "model.safetensors", "plan.json", "train.jsonl", "_SUCCESS"),
)
"""Names that a student's folder already uses. No phase may have one of them."""
T = TypeVar("T")


def resource(default: Any) -> Any:
    """A dataclass field that changes how, not what: workers, threads, how often to log."""
    return dataclasses.field(default=default, metadata={"resource": True})


def to_dict(config: Any, *, resources: bool = True) -> dict[str, Any]:
    """A config as JSON-ready dict (tuples become lists); without `resources`, only what the result depends on. An objective's
    settings also name their class, as "method"."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if resources or not field.metadata.get("resource"):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                value = to_dict(value, resources=resources)
            elif isinstance(value, dict):
                value = {key: to_dict(item, resources=resources) for key, item in value.items()}
            values[field.name] = list(value) if isinstance(value, tuple) else value
    if isinstance(config, ObjectiveConfig):
        values = {"method": f"{type(config).__module__}:{type(config).__qualname__}", **values}
    return values


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """The inverse of `to_dict`, for configs without objectives. Raises TypeError for an unknown or missing key."""
    hints = typing.get_type_hints(cls)
    made = {}
    for name, value in values.items():
        hint = hints.get(name)
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            value = from_dict(typing.cast(type, hint), value)
        elif typing.get_origin(hint) is dict:
            value = {key: from_dict(typing.get_args(hint)[1], item) for key, item in value.items()}
        made[name] = tuple(value) if isinstance(value, list) else value
    return cls(**made)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig(Settings):
    """A denoiser's network, in the terms of EDM's configs."""

    kind: Literal["ddpmpp", "ncsnpp", "adm"]
    img_resolution: Side
    img_channels: Channels
    label_dim: Classes = 0
    augment_dim: Annotated[int, Range(0, 1000)] = 0
    model_channels: Annotated[Channels, Divisible(4)] = 128
    channel_mult: Some[Annotated[int, Range(1, 64)]] = (2, 2, 2)
    channel_mult_emb: Annotated[int, Range(1, 64)] = 4
    num_blocks: Annotated[int, Range(1, 100)] = 4
    attn_resolutions: tuple[Side, ...] = (16,)
    dropout: ShareBelow1 = 0.0
    second_level: bool = False
    """An input for a second noise level, where a jump ends: for flow maps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        levels, halved = len(self.channel_mult), 2 ** (len(self.channel_mult) - 1)
        self.require(
            self.img_resolution % halved == 0,
            "img_resolution",
            f"a multiple of {halved}, since channel_mult {self.channel_mult} makes {levels} levels, each half as large",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeNetworkConfig(Settings):
    """A probe: one convolution per entry of `widths`."""

    widths: Some[Channels]
    strides: Some[Annotated[int, Range(1, 16)]]
    kernel: Annotated[int, Range(1, 31)] = 3
    activation: Literal["relu", "silu", "gelu"] = "relu"
    norm: bool = True
    """Group normalisation after each convolution. Without it features grow with what is wrong in an image: a distance
    in them does not saturate."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(len(self.strides) == len(self.widths), "strides", f"one for each of the widths {self.widths}")
        for width in self.widths:
            self.require(width % GROUPS == 0 or not self.norm, "widths", f"multiples of {GROUPS}, since norm is on")


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
    """What an hour of one actor costs, in any currency; 0 leaves money out of the progress."""

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
    """How other images are fitted: centre square and Lanczos, the whole image stretched, or as ADM prepared ImageNet."""
    shard_size: Size = 1024
    """Images per Parquet file."""
    limit: Whole = 0
    """Take only so many images, evenly spread over the classes; 0 takes all."""


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
    """Of the network inside; the solver's state is float64 always."""
    compiled: bool = False
    """Compile the network: pays on large networks and many pairs, costs minutes at the start of each actor."""
    dtype: Literal["float32", "float16", "uint8"] = "float32"
    """Of x1 in the store. float16 is off by at most 2.4e-4 within [-1, 1], a fiftieth of the solver's own error; uint8 by
    4e-3, and clipped."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shards(self, self.count, self.shard_size)


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
    """Remove what is damaged, so that gen_pairs.py makes it again."""
    seed: Seed = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseConfig(Settings):
    """One phase of student training."""

    iterations: Whole
    """0 leaves the phase out."""
    optimizer: OptimizerConfig
    objective: ObjectiveConfig
    """The settings of a method (beeline/objectives), which compute the gradients of a step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig(Settings):
    """A student: phases of training, one after the other, from the weights of another model."""

    name: Name
    init: ModelPath = "teacher"
    """Folder of the model whose weights the student starts from: "teacher" or "students/<name>"."""
    phases: dict[Name, PhaseConfig]
    """By name, in order. The student as each but the last leaves it is published as students/<name>/<phase>."""
    batch_size: Size = 512
    ema_half_lives: Some[HalfLife] = (693.0,)
    """Half-lives of the averages of the weights, in iterations; 693 is the paper's decay of 0.999. The first average is the
    student, the others are published as <name>/ema-<half-life>. Averages go on through the phases."""
    ema_ramp: Share = 0.0
    """Limit of a half-life as a share of the iterations so far, so that an average forgets its start (EDM: 0.05). 0 keeps the
    decay constant, as the paper does."""
    phase_switch: Literal["continue", "restart"] = "continue"
    """Start of a later phase. "continue": the weights and the optimiser's moments as they are, as in CTM's code,
    where the adversarial term joins a running training. "restart": the averaged weights, with a new optimiser."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16": student and critic train under autocast, frozen networks are bf16. Weights, averages, losses: float32."""
    compiled: bool = False
    """Compile student and frozen networks: pays on GPUs and long runs, costs minutes at the start."""
    seed: Seed = 0
    accumulate: Size = resource(1)
    """Gradient-accumulation steps per rank, where a rank's share of the batch does not fit the memory. The adaptive weight and
    the discriminator's batch norms then see one part at a time."""
    log_every: Count = resource(50)
    checkpoint_every: Count = resource(500)
    keep: Count = resource(2)
    """Checkpoints that are kept; older ones are removed."""
    validate_every: Whole = resource(0)
    """Iterations between validations: a sheet of samples and a distance in the losses' probe, by which students/<name>/best
    is chosen. 0 leaves them out."""
    validate_count: Annotated[int, Range(1, MAX_SIZE)] = resource(1024)
    """Samples of a validation."""
    trackers: tuple[Literal["mlflow", "wandb"], ...] = resource(())
    """Where the log goes in addition to train.jsonl and TensorBoard."""
    workers: WorkersConfig = resource(WorkersConfig())

    def __post_init__(self) -> None:
        super().__post_init__()
        taken = [name for name in self.phases if name in RESERVED or name.startswith("ema-")]
        self.require(not taken, "phases", f"other names than {', '.join(RESERVED)} and ema-..., which the student's folder has")
        folders = {f"{half_life:g}" for half_life in self.ema_half_lives}
        distinct = len(folders) == len(self.ema_half_lives)
        self.require(
            distinct, "ema_half_lives", "values that differ in their first six digits, since folders are named by them"
        )

    @property
    def running(self) -> dict[str, PhaseConfig]:
        """The phases that are not left out."""
        return {name: phase for name, phase in self.phases.items() if phase.iterations}

    @property
    def iterations(self) -> int:
        """Total steps of all phases."""
        return sum(phase.iterations for phase in self.phases.values())

    def needs(self) -> Needs:
        """The combined needs of all phases that run."""
        return functools.reduce(operator.or_, (phase.objective.needs() for phase in self.running.values()), Needs())

    def record(self, phase: str) -> dict[str, Any]:
        """What the config.json of the student after `phase` says of its training."""
        trained = to_dict(self, resources=False)
        return {"method": self.phases[phase].objective.about(), "phase": phase, "trained": trained}

    def models(self) -> dict[str, PhaseConfig]:
        """The published models by folder, each with the phase that made it. The last is the student itself; other averages and
        the best validation are left out."""
        folder, running = f"students/{self.name}", list(self.running.items())
        last = {folder: running[-1][1]} if running else {}
        return {f"{folder}/{name}": phase for name, phase in running[:-1]} | last


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(PoolConfig):
    """Figures of models against the real images. Rows (`nfe`, `steps`, `solver`, `rule`) may differ from call to call: what is
    measured already stays, and is not measured again."""

    features: Some[Literal["probe", "inception", "dinov2_vitl14", "dinov2_vits14", "probe_losses"]] = ("probe",)
    """Networks to measure in: the measuring probe, pretrained ones, whose weights it takes to fetch first (python -m
    beeline.weights fetch), or the losses' probe, in which students that were trained in it look better than they are."""
    draws: Annotated[int, Range(1, 1000)] = 3
    """Independent noise seeds; results are mean, standard deviation and minimum over them."""
    count: Whole = 0
    """Samples per draw; 0 takes one for each real image, with its label."""
    shard_size: Size = 1024
    """Samples per work item."""
    batch_size: Size = 256
    seed: Seed = 1000
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the models that are measured; measuring networks always run in fp32."""
    compiled: bool = False
    """Compile the models: pays on large networks and many samples."""
    neighbours: Count = 10_000
    """Samples, and real images, that precision, recall and their kin look at: their cost grows with its square."""
    samples: Annotated[int, Range(1, MAX_SHOWN)] = 40
    """Images of the sample sheet."""
    held_out: Size = 256
    """Pairs that no student has seen, sampled for straightness and nearness to the teacher's images."""
    few: bool = resource(False)
    """Measure on fewer samples than features, too. Such figures mean nothing: for rehearsals (cluster/rehearse.py)."""
    reference: str = resource("")
    """Statistics of the real images in Inception's features as EDM publishes them (an .npz file with mu and sigma; local path
    or s3://...), instead of those of images/. Its SHA-256 is part of the result."""
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
        _check_shards(self, self.count, self.shard_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Everything that one data set needs, stage by stage. `students` are the main one and its ablations."""

    name: RecipeName
    images: ImagesConfig
    probe: ProbeConfig
    teacher: TeacherConfig
    pairs: PairsConfig
    students: dict[Name, StudentConfig]
    """The first is the main one, which sweeps vary."""
    few_steps: Some[StepList]
    """Step schedules at which students that take any level are measured."""
    sweep: SweepConfig
    evaluate: EvaluateConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.students), "students", "one student or more")
        for key, student in self.students.items():
            student.require(student.name == key, "name", f"{key!r}, as the recipe calls this student")

    @property
    def main(self) -> StudentConfig:
        """The first student."""
        return next(iter(self.students.values()))


def _check_shards(config: PairsConfig | EvaluateConfig, count: int, shard_size: int) -> None:
    limit = MAX_SHARDS * shard_size
    config.require(count <= limit, "count", f"at most {limit:,}, which is {MAX_SHARDS:,} shards of {shard_size:,}")
