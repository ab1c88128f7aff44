"""The work items of an evaluation. Each runs on an actor's bench (bench.py).

    first     RealImages               features of a group of shards of real images
              HeldOut                  a few pairs that no student was trained on
              Samples                  a shard of a draw of a sampling: draws images, keeps only their features
              Sheet                    the images of a sampling for the sample sheet
    then      Judge                    all metrics of a draw of a sampling, from its shards
              Fidelity                 distance of samples to the teacher's images of the same noise
              Lines                    straightness of the flow

An item writes one file, whose name and bytes depend on the plan and the item alone. Only the sheet's images are kept.
Features, which are smaller, are kept until the sampling's metrics are published.
"""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import torch

from beeline.config import PairsConfig, from_dict
from beeline.errors import BeelineError, reason
from beeline.features.measuring import Looks
from beeline.files.arrays import pack, spread, unpack
from beeline.labels import pair_labels
from beeline.metrics.frechet import Statistics
from beeline.metrics.measures import PAIR_RMS, counted, measures
from beeline.metrics.straightness import straightness, trajectories
from beeline.noise import unit_noise
from beeline.pixels import quantised
from beeline.sampling import Sampling
from beeline.schedule import edm_sigmas
from evaluation.bench import HELD_OUT, HELD_OUT_PAIRS, LOOKING, SAMPLING, Bench, held_out_rows
from evaluation.reference import KEPT, arrays_in, groups, reference_folder
from evaluation.samplings import draw, noise_seed
from pipeline.gen_pairs import load_sampler, make_pairs
from pipeline.reader import decoded
from pipeline.storage import Folder


@dataclasses.dataclass(frozen=True)
class RealImages:
    """Features of real images in `network`, for group `group` of the shards: statistics of all images, features of some."""

    network: str
    group: int
    evaluations: int = 0
    samples: int = 0

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
            shard_features = bench.look(torch.tensor(shard.images), (self.network,))[self.network].features
            shard_statistics = Statistics.of(shard_features)
            statistics = shard_statistics if statistics is None else statistics + shard_statistics
            chosen = np.isin(shard.indices, kept)
            features.append(shard_features[chosen])
            rows.append(shard.indices[chosen])
        assert statistics is not None
        arrays = {"features": np.concatenate(features), "rows": np.concatenate(rows)}
        moments = {"n": np.int64(statistics.n), "mean": statistics.mean, "m2": statistics.m2}
        bench.place(reference_folder(self.network)).write(self.file, pack(arrays | moments))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """`count` pairs, made like those in pairs/ from the noise indices after theirs, with `each` evaluations per pair."""

    count: int
    each: int
    samples: int = 0

    @property
    def evaluations(self) -> int:
        return self.count * self.each

    def run(self, bench: Bench) -> None:
        """Write the pairs into evaluation/held-out."""
        plan = bench.setup.pairs
        assert plan is not None
        config = from_dict(PairsConfig, plan["pairs"])
        teacher = load_sampler(bench.setup.workspace, bench.setup.recipe, plan, config)
        rows = held_out_rows(plan, self.count)
        labels, noise = pair_labels(rows, teacher.label_dim), unit_noise(config.seed, rows, teacher.image_shape)
        x1 = make_pairs(teacher, noise, labels, config)
        arrays = {"x1": x1, "noise": noise, "label": labels, "index": np.array(rows)}
        bench.place(HELD_OUT).write(HELD_OUT_PAIRS, pack(arrays))


@dataclasses.dataclass(frozen=True)
class Samples:
    """Shard `shard` of draw `draw` of a sampling."""

    model: str
    sampling: Sampling
    draw: int
    shard: int
    indices: range

    @property
    def samples(self) -> int:
        return len(self.indices)

    @property
    def file(self) -> str:
        return f"part-{self.sampling.slug}-{self.draw}-{self.shard:05d}.npz"

    @property
    def evaluations(self) -> int:
        return self.sampling.nfe * len(self.indices)

    def run(self, bench: Bench) -> dict[str, float]:
        """Draw samples and write their features. Returns the seconds for both; loading networks does not count."""
        config, model = bench.setup.config, bench.model(self.model)
        labels = bench.labels[self.indices.start : self.indices.stop]
        seed = noise_seed(config, self.draw)
        for name in config.features:
            bench.eye(name)
        begun = time.monotonic()
        drawn = draw(model, self.sampling, self.indices, labels, seed=seed, batch_size=config.batch_size)
        if not bool(drawn.isfinite().all()):  # as uint8, NaN would become black pixels
            raise BeelineError(
                f"{self.model} makes NaN or infinite samples by {self.sampling.label!r} in precision {config.precision}; "
                "measure it in --precision fp32, or train it again"
            )
        images = quantised(drawn).cpu()  # the copy waits for the GPU, so that the time is complete
        sampled = time.monotonic()
        arrays = {}
        for name, looks in bench.look(images).items():
            arrays[f"{name}.features"] = looks.features
            if looks.logits is not None:
                arrays[f"{name}.logits"] = looks.logits
        looked = time.monotonic()
        bench.place("evaluation", self.model).write(self.file, pack(arrays))
        return {SAMPLING: sampled - begun, LOOKING: looked - sampled}


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Samples for the sample sheet, from the same noise and classes for every sampling and every model."""

    model: str
    sampling: Sampling
    count: int
    samples: int = 0

    @property
    def file(self) -> str:
        return f"sheet-{self.sampling.slug}.npz"

    @property
    def evaluations(self) -> int:
        return self.sampling.nfe * self.count

    def run(self, bench: Bench) -> None:
        """Draw samples and write them with their features in the first measuring network."""
        config, model = bench.setup.config, bench.model(self.model)
        classes = spread(self.count, max(model.label_dim, 1)).astype(np.int32)
        seed = noise_seed(config, 0)
        images = quantised(draw(model, self.sampling, range(self.count), classes, seed=seed, batch_size=config.batch_size))
        first = config.features[0]
        features = bench.look(images, (first,))[first].features
        arrays = {"images": images.cpu().numpy(), "features": features, "device": bench.kind}
        bench.place("evaluation", self.model).write(self.file, pack(arrays))


@dataclasses.dataclass(frozen=True)
class Judge:
    """All metrics of one draw of a sampling."""

    model: str
    sampling: Sampling
    draw: int
    parts: tuple[str, ...]
    evaluations: int = 0
    samples: int = 0

    @property
    def file(self) -> str:
        return f"draw-{self.sampling.slug}-{self.draw}.json"

    def run(self, bench: Bench) -> None:
        """Join the features of the draw's shards in their order, and write its metrics.

        Does nothing if parts are missing: either another command has published this sampling, or `publish` reports the error.
        """
        folder = bench.place("evaluation", self.model)
        try:
            parts = [arrays_in(folder, name) for name in self.parts]
        except FileNotFoundError:
            return
        figures: dict[str, float] = {}
        for name in bench.setup.config.features:
            looks = Looks.join([Looks(part[f"{name}.features"], part.get(f"{name}.logits")) for part in parts])
            figures |= measures(looks, bench.reference(name), name, neighbours=bench.setup.config.neighbours)
        folder.write_json(self.file, figures)


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Distance of samples to the teacher's images of the same held-out noise: root mean square over pixels in [-1, 1]."""

    model: str
    sampling: Sampling
    count: int
    samples: int = 0

    @property
    def file(self) -> str:
        return f"pairs-{self.sampling.slug}.json"

    @property
    def evaluations(self) -> int:
        return self.sampling.nfe * self.count

    def run(self, bench: Bench) -> None:
        """Sample the held-out noise and compare."""
        x1, _, labels = bench.held_out
        plan, config = bench.setup.pairs, bench.setup.config
        assert plan is not None
        images = draw(
            bench.model(self.model), self.sampling, bench.held_out_file["index"].tolist(), labels.cpu().numpy(),
            seed=plan["pairs"]["seed"], batch_size=config.batch_size,
        )  # fmt: skip
        rms = float((images - x1.clamp(-1, 1)).to(torch.float64).square().mean().sqrt())
        bench.place("evaluation", self.model).write_json(self.file, {counted(PAIR_RMS, self.count): rms})


@dataclasses.dataclass(frozen=True)
class Lines:
    """Straightness of a model's flow, along lines between held-out pairs and along its own trajectories.

    For a student, the lines are those that it was trained on; for a teacher they are EDM's, x1 + sigma noise.
    """

    model: str
    num_steps: int
    count: int
    file: str = "lines.json"
    samples: int = 0

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
        curves = {"line": line, "sigmas": sigmas.tolist(), "values": values, "own": own, "speed": speed, "pairs": self.count}
        means = {"mean": float(np.mean(values)), "own_mean": float(np.mean(own)), "speed_mean": float(np.mean(speed))}
        bench.place("evaluation", self.model).write_json(self.file, means | curves)


def sound(folder: Folder, name: str) -> bool:
    """Whether a file exists and can be read. Prints a line if it is damaged and will be made again."""
    try:
        data = folder.read(name)
    except FileNotFoundError:
        return False  # another command removed it
    try:
        json.loads(data) if name.endswith(".json") else unpack(data, "features")
    except Exception as error:  # the type depends on the damage
        print(f"{folder}/{name}: unreadable ({reason(error)}); it will be made again", flush=True)
        return False
    return True
