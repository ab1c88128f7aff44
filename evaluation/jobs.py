"""The work items of a measurement, and the bench that each actor of the pool does them on.

    first     RealImages, HeldOut      the real images' features, a shard each; a few pairs that no student has seen
              Samples                  one shard of one draw of one row: sampled, looked at, forgotten
              Sheet                    the images of the row that are shown
    then      Judge                    the figures of one draw of one row, from all of its shards
              Fidelity, Lines          how near samples are to the teacher's; how straight the flow is

An item writes one file whose name and bytes depend on the plan and the item alone. No image but those of the sheet is kept:
features, which are less, are, until the row is done.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from typing import Any, ClassVar

import numpy as np
import torch

from beeline.config import EvaluateConfig, PairsConfig, from_dict
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError, reason
from beeline.features.measuring import PROBES, Eye, Looks, MeasuringProbe
from beeline.files.arrays import pack, spread, unpack
from beeline.labels import pair_labels
from beeline.metrics.frechet import Gaussian, Statistics
from beeline.metrics.measures import PAIR_RMS, counted, measures
from beeline.metrics.straightness import straightness, trajectories
from beeline.noise import x0
from beeline.pixels import quantised
from beeline.sampling.inference import prepare
from beeline.schedule import edm_sigmas
from evaluation.reference import KEPT, arrays_in, groups, reference, reference_folder
from evaluation.rows import Row, draw, noise_seed
from pipeline.gen_pairs import calibrated_levels, load_sampler, make_pairs
from pipeline.reader import decoded, real_labels
from pipeline.stage import require_measuring, require_model, require_probe
from pipeline.storage import Folder

HELD_OUT = "evaluation/held-out"
HELD_OUT_PAIRS = "pairs.npz"
SAMPLING, LOOKING = "sampling_seconds", "looking_seconds"


def held_out_rows(pairs: dict[str, Any], count: int) -> list[int]:
    """Indices of `count` held-out pairs: those after the store's, whose classes, index mod classes, are evenly spread."""
    return [pairs["pairs"]["count"] + int(i) for i in spread(count, max(count, pairs["num_classes"]))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What all work items share: `images` and `pairs` are the plans of those stages, `count` the samples of a draw."""

    workspace: Folder
    recipe: str
    config: EvaluateConfig
    images: dict[str, Any]
    pairs: dict[str, Any] | None
    count: int
    moments: Gaussian | None = None
    """Of the real images in Inception's features, where a file gives them."""


def sampled_model(workspace: Folder, name: str, recipe: str, config: EvaluateConfig) -> tuple[Denoiser, str]:
    """As `require_model`; a teacher that is to be sampled by the calibrated solver knows its levels."""
    model, digest = require_model(workspace, name, recipe)
    if config.solver == "calibrated" and model.few_step is None:
        model.levels = calibrated_levels(workspace / name)
    return model, digest


class Bench:
    """The worker: does work items on its device, and keeps what they share in memory."""

    def __init__(self, setup: Setup, jobs: list[Any]) -> None:
        self.setup, self.jobs = setup, jobs
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.kind = torch.cuda.get_device_name() if self.device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        self.model = functools.lru_cache(maxsize=1)(self._model)  # items of a model follow each other
        self.eye = functools.cache(self._eye)
        self.reference = functools.cache(lambda name: reference(setup.workspace, name, setup.moments))

    def work(self, number: int) -> dict[str, Any]:
        """Do item `number`; the row says how many network evaluations it took, how many samples it measured, and of samples
        the seconds that drawing them took, and looking at them."""
        job = self.jobs[number]
        seconds = job.run(self) or {}
        samples = len(job.indices) if isinstance(job, Samples) else 0
        return {"item": number, "evaluations": job.evaluations, "samples": samples, SAMPLING: 0.0, LOOKING: 0.0} | seconds

    def place(self, *folders: str) -> Folder:
        """A folder of the workspace."""
        return self.setup.workspace / "/".join(folders)

    def look(self, images: torch.Tensor, names: tuple[str, ...] | None = None) -> dict[str, Looks]:
        """What the measuring networks see in uint8 images (n, C, H, W)."""
        return {name: self.eye(name).look(images) for name in names or self.setup.config.features}

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The class of each sample, int32 (count,): those of the real images, evenly spread."""
        there = real_labels(self.place("images"), self.setup.images["images"])
        return there[spread(self.setup.count, len(there))]

    @functools.cached_property
    def held_out(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x1 and noise (n, C, H, W) and labels (n,) of pairs that no student has seen, on the device."""
        x1, noise, labels = (torch.from_numpy(self.held_out_file[key]).to(self.device) for key in ("x1", "noise", "label"))
        return x1, noise, labels

    @functools.cached_property
    def held_out_file(self) -> dict[str, np.ndarray]:
        """The arrays of the held-out pairs; "index" are those that their noise is made of."""
        found = arrays_in(self.place(HELD_OUT), HELD_OUT_PAIRS, "x1", "noise", "label")
        assert self.setup.pairs is not None
        first = self.setup.pairs["pairs"]["count"]
        return {"index": np.arange(first, first + len(found["noise"]))} | found  # files of earlier versions do not say

    def _eye(self, name: str) -> Eye:
        setup = self.setup
        if name in PROBES:
            network = MeasuringProbe(require_probe(setup.workspace, PROBES[name], setup.recipe)[0])
        else:
            network = require_measuring(setup.workspace, name)[0]
        return Eye(network, self.device)

    def _model(self, name: str) -> Denoiser:
        config = self.setup.config
        model = sampled_model(self.setup.workspace, name, self.setup.recipe, config)[0].to(self.device)
        size = config.batch_size if config.compiled else None
        return prepare(model, precision=config.precision, compiled=config.compiled, batch_size=size)


@dataclasses.dataclass(frozen=True)
class RealImages:
    """Group `group` of the shards of images/ as `network` sees them: statistics of all, features of those that are kept."""

    network: str
    group: int
    evaluations: int = 0

    @property
    def file(self) -> str:
        return f"part-{self.group:05d}.npz"

    def run(self, bench: Bench) -> None:
        """Write the group's file into evaluation/reference/<network>."""
        config = bench.setup.images["images"]
        kept = spread(min(KEPT, config["count"]), config["count"])
        statistics, features, rows = None, [], []
        for k in groups(config)[self.group]:
            shard = decoded(bench.place("images"), k)
            seen = bench.look(torch.tensor(shard.images), (self.network,))[self.network].features
            made = Statistics.of(seen)
            statistics = made if statistics is None else statistics + made
            chosen = np.isin(shard.indices, kept)
            features.append(seen[chosen])
            rows.append(shard.indices[chosen])
        assert statistics is not None
        arrays = {"features": np.concatenate(features), "rows": np.concatenate(rows)}
        moments = {"n": np.int64(statistics.n), "mean": statistics.mean, "m2": statistics.m2}
        bench.place(reference_folder(self.network)).write(self.file, pack(arrays | moments))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """`count` pairs made as those of pairs/ are, of the noise that comes after theirs, `each` evaluations a pair."""

    count: int
    each: int

    @property
    def evaluations(self) -> int:
        return self.count * self.each

    def run(self, bench: Bench) -> None:
        """Write them into evaluation/held-out."""
        plan = bench.setup.pairs
        assert plan is not None
        config = from_dict(PairsConfig, plan["pairs"])
        teacher = load_sampler(bench.setup.workspace, bench.setup.recipe, plan, config)
        rows = held_out_rows(plan, self.count)
        labels, noise = pair_labels(rows, teacher.label_dim), x0(config.seed, rows, teacher.image_shape)
        x1 = make_pairs(teacher, noise, labels, config)
        arrays = {"x1": x1, "noise": noise, "label": labels, "index": np.array(rows)}
        bench.place(HELD_OUT).write(HELD_OUT_PAIRS, pack(arrays))


@dataclasses.dataclass(frozen=True)
class Samples:
    """Shard `shard` of draw `draw` of a row."""

    model: str
    row: Row
    draw: int
    shard: int
    indices: range

    @property
    def file(self) -> str:
        return f"part-{self.row.slug}-{self.draw}-{self.shard:05d}.npz"

    @property
    def evaluations(self) -> int:
        return self.row.nfe * len(self.indices)

    def run(self, bench: Bench) -> dict[str, float]:
        """Sample, look, and write what was seen. Returns the seconds of both, without those of loading networks."""
        config, model = bench.setup.config, bench.model(self.model)
        labels = bench.labels[self.indices.start : self.indices.stop]
        seed = noise_seed(config, self.draw)
        for name in config.features:
            bench.eye(name)
        begun = time.monotonic()
        drawn = draw(model, self.row, self.indices, labels, seed=seed, batch_size=config.batch_size)
        if not bool(drawn.isfinite().all()):  # 8 bits would make black pixels of NaN
            raise BeelineError(
                f"{self.model} makes NaN or infinite samples by {self.row.label!r} in precision {config.precision}; measure it "
                "in --precision fp32, or train it again"
            )
        images = quantised(drawn).cpu()  # a GPU has finished when its images are here
        sampled = time.monotonic()
        arrays = {}
        for name, seen in bench.look(images).items():
            arrays[f"{name}.features"] = seen.features
            if seen.logits is not None:
                arrays[f"{name}.logits"] = seen.logits
        looked = time.monotonic()
        bench.place("evaluation", self.model).write(self.file, pack(arrays))
        return {SAMPLING: sampled - begun, LOOKING: looked - sampled}


@dataclasses.dataclass(frozen=True)
class Sheet:
    """The samples of a row that are shown: the same noise and classes for every row and every model."""

    model: str
    row: Row
    count: int

    @property
    def file(self) -> str:
        return f"sheet-{self.row.slug}.npz"

    @property
    def evaluations(self) -> int:
        return self.row.nfe * self.count

    def run(self, bench: Bench) -> None:
        """Sample, look through the first measuring network, and write images and features."""
        config, model = bench.setup.config, bench.model(self.model)
        classes = spread(self.count, max(model.label_dim, 1)).astype(np.int32)
        seed = noise_seed(config, 0)
        images = quantised(draw(model, self.row, range(self.count), classes, seed=seed, batch_size=config.batch_size))
        first = config.features[0]
        seen = bench.look(images, (first,))[first].features
        arrays = {"images": images.cpu().numpy(), "features": seen, "device": bench.kind}
        bench.place("evaluation", self.model).write(self.file, pack(arrays))


@dataclasses.dataclass(frozen=True)
class Judge:
    """All figures of one draw of a row."""

    model: str
    row: Row
    draw: int
    parts: tuple[str, ...]
    evaluations: int = 0

    @property
    def file(self) -> str:
        return f"draw-{self.row.slug}-{self.draw}.json"

    def run(self, bench: Bench) -> None:
        """Join what was seen of the draw's shards in their order, and measure. Parts that are gone belong to a row that another
        command has published: there is nothing to do, or publishing says so."""
        folder = bench.place("evaluation", self.model)
        try:
            parts = [arrays_in(folder, name) for name in self.parts]
        except FileNotFoundError:
            return
        found: dict[str, float] = {}
        for name in bench.setup.config.features:
            seen = Looks.join([Looks(part[f"{name}.features"], part.get(f"{name}.logits")) for part in parts])
            found |= measures(seen, bench.reference(name), name, neighbours=bench.setup.config.neighbours)
        folder.write_json(self.file, found)


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How near samples are to the teacher's of the same noise: root mean square over pixels in [-1, 1], held-out pairs."""

    model: str
    row: Row
    count: int

    @property
    def file(self) -> str:
        return f"pairs-{self.row.slug}.json"

    @property
    def evaluations(self) -> int:
        return self.row.nfe * self.count

    def run(self, bench: Bench) -> None:
        """Sample the held-out noise and compare."""
        x1, _, labels = bench.held_out
        plan, config = bench.setup.pairs, bench.setup.config
        assert plan is not None
        images = draw(
            bench.model(self.model), self.row, bench.held_out_file["index"].tolist(), labels.cpu().numpy(),
            seed=plan["pairs"]["seed"], batch_size=config.batch_size,
        )  # fmt: skip
        rms = float((images - x1.clamp(-1, 1)).to(torch.float64).square().mean().sqrt())
        bench.place("evaluation", self.model).write_json(self.file, {counted(PAIR_RMS, self.count): rms})


@dataclasses.dataclass(frozen=True)
class Lines:
    """How straight a model's flow is along its lines between held-out pairs and along its own trajectories. Its lines are those
    that a student was trained on; a teacher's are EDM's, x1 + sigma noise."""

    model: str
    num_steps: int
    count: int
    file: ClassVar[str] = "lines.json"

    @property
    def evaluations(self) -> int:
        return 3 * self.num_steps * self.count

    def run(self, bench: Bench) -> None:
        """Measure at every level of EDM's schedule."""
        x1, noise, labels = bench.held_out
        model, sigmas = bench.model(self.model), edm_sigmas(self.num_steps)
        given = labels if model.label_dim else None
        line = model.few_step.line if model.few_step is not None else "ve"
        values = straightness(model, x1, noise, given, sigmas, line=line)
        own, speed = trajectories(model, noise, given, num_steps=self.num_steps)
        found = {"line": line, "sigmas": sigmas.tolist(), "values": values, "own": own, "speed": speed, "pairs": self.count}
        means = {"mean": float(np.mean(values)), "own_mean": float(np.mean(own)), "speed_mean": float(np.mean(speed))}
        bench.place("evaluation", self.model).write_json(self.file, means | found)


def sound(folder: Folder, name: str) -> bool:
    """Whether a file that is there can be read; if not, a line says that it will be made again."""
    try:
        data = folder.read(name)
    except FileNotFoundError:
        return False  # removed meanwhile
    try:
        json.loads(data) if name.endswith(".json") else unpack(data, "features")
    except Exception as error:  # whatever the damage leads to
        print(f"{folder}/{name}: unreadable ({reason(error)}); it will be made again", flush=True)
        return False
    return True
