"""Figures of models against the real images into evaluation/<model>/, by a pool of actors.

    python evaluation/evaluate.py digits --model teacher --nfe 35 9 3 1
    python evaluation/evaluate.py digits --model students/lmm students/l2 --steps 0
    python evaluation/evaluate.py cifar10 --model students/lmm/reconstruction --steps 0 0,1 0,1,2 0,3,5 0,1,3,5

What figures there are, and their names, is in beeline/measures.py. Averages of a student's weights are models of their own
(students/lmm/ema-200). Class labels match those of the real images. Rows add up from call to call. The same numbers come
out, to the last bit, for any number of actors, after any number of kills.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import tyro

from beeline.config import EvaluateConfig, to_dict
from beeline.errors import BeelineError
from beeline.frechet import Moments
from beeline.measuring import PROBES
from evaluation import results
from evaluation.jobs import (
    HELD_OUT,
    LOOKING,
    SAMPLING,
    Bench,
    Fidelity,
    HeldOut,
    Judge,
    Lines,
    RealImages,
    Samples,
    Setup,
    Sheet,
    sound,
)
from evaluation.reference import KEPT, groups, merge_reference, reference, reference_folder
from evaluation.rows import Row, rows_for
from pipeline import metrics
from pipeline.command import Progress, run_command
from pipeline.pool import run_pool
from pipeline.stage import Stage, check_fits, fingerprint, require, require_measuring, require_model, require_probe
from pipeline.storage import Folder

PER_EVALUATION, PER_LOOK = "seconds_per_evaluation", "seconds_per_look"  # of _SUCCESS


def evaluate(
    workspace: str,
    recipe: tyro.conf.Suppress[str],
    evaluate: Annotated[EvaluateConfig, tyro.conf.arg(name="")],
    model: tuple[str, ...] = ("teacher",),
) -> None:
    """Measure models against <workspace>/images.

    Args:
        workspace: Local folder or s3://bucket/prefix.
        model: Folders of the models: teacher, students/<name>, students/<name>/ema-<half-life>.
    """
    measure(workspace, recipe, evaluate, {name: evaluate.steps for name in model})


def measure(workspace: str, recipe: str, config: EvaluateConfig, models: Mapping[str, tuple[str, ...]]) -> None:
    """Measure several models with one pool; `models` gives each student the step schedules to sample it at."""
    place = Folder(workspace)
    images = require(place, "images", recipe)
    moments, given = _given_reference(config)
    networks = _networks(place, config, recipe)
    count = config.count or images["images"]["count"]
    for name, (_, dimensions) in networks.items():
        if count <= dimensions and not config.few:
            raise BeelineError(
                f"{count} samples are too few for a distance in the {dimensions} features of {name}; take more than "
                f"{dimensions} (--count), or measure in other features (--features)"
            )
    setup = Setup(
        workspace=place, recipe=recipe, config=config, images=images, pairs=_pairs(place, recipe), count=count, moments=moments
    )
    digests = {name: digest for name, (digest, _) in networks.items()}
    work = [
        found
        for name, steps in models.items()
        if (found := _measurement(setup, name, replace(config, steps=steps), digests, given)) is not None
    ]
    if not work:
        return
    seconds = _prepare_and_sample(setup, work, digests)
    _judge(setup, work)
    for measurement in work:
        measurement.publish(setup, seconds.get(measurement.name, {}))


@dataclasses.dataclass
class Measurement:
    """What is left to measure of one model: `rows`, of which nothing is published yet."""

    name: str
    stage: Stage
    rows: list[Row]
    straight: bool

    def samples(self, setup: Setup) -> list[Samples]:
        """One item for every shard of every draw of every row, in that order."""
        size = setup.config.shard_size
        return [
            Samples(self.name, row, number, shard, range(start, min(start + size, setup.count)))
            for row in self.rows
            for number in range(setup.config.draws)
            for shard, start in enumerate(range(0, setup.count, size))
        ]

    def sheets(self, setup: Setup) -> list[Sheet]:
        """An item for every row."""
        return [Sheet(self.name, row, setup.config.samples) for row in self.rows]

    def judgements(self, setup: Setup) -> list[Judge]:
        """An item for every draw of every row."""
        parts: dict[tuple[Row, int], list[str]] = {}
        for item in self.samples(setup):
            parts.setdefault((item.row, item.draw), []).append(item.file)
        return [Judge(self.name, row, number, tuple(files)) for (row, number), files in parts.items()]

    def comparisons(self, setup: Setup) -> list[Fidelity | Lines]:
        """What needs held-out pairs."""
        if setup.pairs is None:
            return []
        count = setup.config.held_out
        lines = [Lines(self.name, setup.pairs["pairs"]["num_steps"], count)] if self.straight else []
        return [*(Fidelity(self.name, row, count) for row in self.rows), *lines]

    def publish(self, setup: Setup, seconds: Mapping[str, float]) -> None:
        """Metrics and sheets, and the `seconds` of sampling and looking; then what was only needed for them goes."""
        folder = self.stage.folder
        if self.rows:
            results.publish(setup, self.name, self.rows, self.stage.plan, self.straight)
        for name in folder.sizes():
            if name.startswith(("part-", "draw-", "pairs-")):
                folder.remove(name)
        folder.clean()
        published = folder.read_json(results.METRICS)["rows"]
        for row in published:
            metrics.gauge("evaluation_figure", row["mean"], model=self.name, sampler=row["sampler"], metric=row["metric"])
        measured = {row["sampler"]: row["nfe"] for row in published}
        samples = setup.config.draws * setup.count
        self.stage.finish(samples=samples * len(measured), evaluations=samples * sum(measured.values()), **seconds)


def _networks(place: Folder, config: EvaluateConfig, recipe: str) -> dict[str, tuple[str, int]]:
    """Of each measuring network: the SHA-256 of its weights, and its features."""
    made = {}
    for name in config.features:
        if name in PROBES:
            probe, digest = require_probe(place, PROBES[name], recipe)
            made[name] = digest, probe.tap_channels[-1]
        else:
            network, digest = require_measuring(place, name)
            made[name] = digest, network.dimensions
    return made


def _given_reference(config: EvaluateConfig) -> tuple[Moments | None, str]:
    """The statistics of a file, and its SHA-256."""
    if not config.reference:
        return None, ""
    if "inception" not in config.features:
        raise BeelineError("--reference gives statistics in Inception's features; add inception to --features")
    folder, _, name = config.reference.rpartition("/")
    try:
        data = Folder(folder or ".").read(name)
    except FileNotFoundError as error:
        raise BeelineError(f"{config.reference} is not there; expected an .npz file with mu and sigma") from error
    try:
        return Moments.from_npz(data), hashlib.sha256(data).hexdigest()
    except ValueError as error:
        raise BeelineError(f"{config.reference}: {error}") from error


def _pairs(place: Folder, recipe: str) -> dict[str, Any] | None:
    """The plan of pairs/; None, with a line said, before there are any."""
    try:
        return require(place, "pairs", recipe)
    except BeelineError:
        print(f"evaluation: no pairs in {place}; straightness and nearness to the teacher's images are left out", flush=True)
        return None


def _measurement(
    setup: Setup, name: str, config: EvaluateConfig, networks: Mapping[str, str], given: str
) -> Measurement | None:
    """What is left of this model; None, with a line said, if everything asked for is there."""
    model, digest = require_model(setup.workspace, name, setup.recipe)
    check_fits(setup.workspace, setup.images, model.network_config, name)
    rows = rows_for(model, config)
    plan = {
        "evaluate": to_dict(config, resources=False),
        "count": setup.count,
        "model_sha256": digest,
        "networks_sha256": networks,
        "reference_sha256": given,
        "images": fingerprint(setup.images),
    }
    stage = Stage(setup.workspace, f"evaluation/{name}", plan)
    measured = results.measured(stage.folder)
    left = [row for row in rows if row.label not in measured]
    if not stage.begin(more=bool(left)):
        return None
    # Students of single levels mean nothing at other levels.
    straight = model.few_step is None or model.few_step.trained_steps is None
    return Measurement(name, stage, left, straight)


def _prepare_and_sample(setup: Setup, work: Sequence[Measurement], networks: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The first pass: what real images look like, held-out pairs, all samples. Returns by model the seconds that its samples
    took."""
    place, images = setup.workspace, setup.images
    references = {}
    for name, digest in networks.items():
        plan = {"images": fingerprint(images), "network_sha256": digest, "kept": KEPT}
        stage = Stage(place, reference_folder(name), plan)
        if stage.begin(quiet=True):
            references[name] = stage, [RealImages(name, group) for group in range(len(groups(images["images"])))]
    held_out = Stage(place, HELD_OUT, {"pairs": fingerprint(setup.pairs), "count": setup.config.held_out})
    pairs = (
        [HeldOut(setup.config.held_out, setup.pairs["evaluations"])]
        if setup.pairs is not None and held_out.begin(quiet=True)
        else []
    )
    jobs: list[Any] = [*pairs, *(job for stage, parts in references.values() for job in _left(stage.folder, parts))]
    for measurement in work:
        jobs += _left(measurement.stage.folder, [*measurement.samples(setup), *measurement.sheets(setup)])
    rows = _run(setup, "evaluation", jobs)
    if pairs:
        held_out.finish(pairs=setup.config.held_out)
    for stage, parts in references.values():
        merge_reference(stage.folder, [part.file for part in parts])
        for part in parts:
            stage.folder.remove(part.file)
        stage.folder.clean()
        stage.finish(images=images["images"]["count"])
    for name in networks:
        reference(place, name, setup.moments)  # a reference of another network is refused before samples are judged
    return _seconds(jobs, rows)


def _judge(setup: Setup, work: Sequence[Measurement]) -> None:
    """The second pass: figures from what was seen."""
    jobs = [
        job
        for measurement in work
        for job in _left(measurement.stage.folder, [*measurement.judgements(setup), *measurement.comparisons(setup)])
    ]
    _run(setup, "evaluation, figures", jobs)


def _left(folder: Folder, jobs: Sequence[Any]) -> list[Any]:
    """The items whose file is not there, or damaged."""
    there = folder.sizes()
    return [job for job in jobs if job.file not in there or not sound(folder, job.file)]


def _seconds(jobs: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By model, of the samples of this run: seconds of an actor for an evaluation and for looking at an image, medians over
    work items, so that an actor's first one, which may compile, does not count."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        job = jobs[row["item"]]
        if isinstance(job, Samples):
            each = row[SAMPLING] / job.evaluations, row[LOOKING] / len(job.indices)
            found.setdefault(job.model, []).append(each)
    return {
        name: dict(zip((PER_EVALUATION, PER_LOOK), map(statistics.median, zip(*times, strict=True)), strict=True))
        for name, times in found.items()
    }


def _run(setup: Setup, what: str, jobs: list[Any]) -> list[dict[str, Any]]:
    """The rows of all work items."""
    rows = []
    progress = Progress(what, sum(job.evaluations + 1 for job in jobs), "network evaluations")
    arguments = {"setup": setup, "jobs": jobs}
    for done in run_pool(Bench, arguments, range(len(jobs)), setup.config, name=what):
        progress.add(done["evaluations"] + 1)
        rows.append(done)
    return rows


if __name__ == "__main__":
    run_command(evaluate)
