"""Figures of models against the real images into evaluation/<model>/, by a pool of actors.

    python evaluation/evaluate.py digits --model teacher --nfe 35 9 3 1
    python evaluation/evaluate.py digits --model students/lmm students/l2 --steps 0
    python evaluation/evaluate.py cifar10 --model students/lmm/reconstruction --steps 0 0,1 0,1,2 0,3,5 0,1,3,5

What figures there are, and their names, is in measures.py. Averages of a student's weights are models of their own
(students/lmm/ema-200). Class labels match those of the real images. Rows add up from call to call. The same numbers come
out, to the last bit, for any number of actors, after any number of kills.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import dataclasses
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import tyro

from beeline.config import EvaluateConfig, to_dict
from beeline.errors import BeelineError
from beeline.features.measuring import PROBES
from beeline.metrics.frechet import Moments
from beeline.sampling import Sampling
from beeline.sampling.few_step import FewStep
from beeline.settings import ModelPath, Some, check
from evaluation import results
from evaluation.bench import HELD_OUT, Bench, Setup, sampled_model
from evaluation.jobs import LOOKING, SAMPLING, Fidelity, HeldOut, Judge, Lines, RealImages, Samples, Sheet, sound
from evaluation.reference import KEPT, check_reference, groups, merge_reference, reference, reference_folder
from evaluation.samplings import samplings_for
from pipeline import prometheus
from pipeline.command import run_command
from pipeline.model_folders import require_measuring, require_probe
from pipeline.pool import run_pool
from pipeline.progress import Progress
from pipeline.stage import Stage, check_fits, fingerprint, require
from pipeline.storage import Folder

PER_EVALUATION, PER_LOOK = "seconds_per_evaluation", "seconds_per_look"  # of _SUCCESS


def evaluate(
    workspace: str,
    recipe: tyro.conf.Suppress[str],
    evaluate: Annotated[EvaluateConfig, tyro.conf.arg(name="")],
    model: Some[ModelPath] = ("teacher",),
) -> None:
    """Measure models against <workspace>/images.

    Args:
        workspace: Local folder or s3://bucket/prefix.
        model: Folders of the models: teacher, students/<name>, students/<name>/ema-<half-life>.
    """
    check("--model", model, Some[ModelPath])
    measure(workspace, recipe, evaluate, {name: evaluate.steps for name in model})


def measure(workspace: str, recipe: str, config: EvaluateConfig, models: Mapping[str, tuple[str, ...]]) -> None:
    """Measure several models with one pool; `models` gives each student the step schedules to sample it at."""
    place = Folder(workspace)
    for name in models:
        check("--model", name, ModelPath)
    images = require(place, "images", recipe)
    networks, moments, given = check_measurable(place, recipe, config, images)
    count = config.count or images["images"]["count"]
    setup = Setup(
        workspace=place, recipe=recipe, config=config, images=images, pairs=_pairs(place, recipe), count=count, moments=moments
    )
    digests = {name: digest for name, (digest, _) in networks.items()}
    found = [_measurement(setup, name, replace(config, steps=steps), digests, given) for name, steps in models.items()]
    work = [measurement for measurement in found if measurement.stage.begin(more=bool(measurement.samplings))]
    if not work:
        return
    seconds = _prepare_and_sample(setup, work, digests)
    _judge(setup, work)
    for measurement in work:
        measurement.publish(setup, seconds.get(measurement.name, {}))


def check_measurable(
    place: Folder, recipe: str, config: EvaluateConfig, images: Mapping[str, Any]
) -> tuple[dict[str, tuple[str, int]], Moments | None, str]:
    """The measuring networks (`_networks`), and the given reference with its SHA-256. Raises BeelineError where they are
    missing, do not go together, or have more features than there are samples."""
    moments, given = _given_reference(config)
    networks = _networks(place, config, recipe)
    count = config.count or images["images"]["count"]
    for name, (_, dimensions) in networks.items():
        if count <= dimensions and not config.few:
            raise BeelineError(
                f"{count} samples are too few for a distance in the {dimensions} features of {name}; take more than "
                f"{dimensions} (--count), or measure in other features (--features)"
            )
        if name == "inception" and moments is not None:
            check_reference(moments, name, dimensions)
    return networks, moments, given


@dataclasses.dataclass
class Measurement:
    """What is left to measure of one model: `samplings` whose figures are not published yet."""

    name: str
    stage: Stage
    samplings: list[Sampling]
    straight: bool

    def samples(self, setup: Setup) -> list[Samples]:
        """One item for each shard of each draw of each sampling, in that order."""
        size = setup.config.shard_size
        return [
            Samples(self.name, sampling, number, shard, range(start, min(start + size, setup.count)))
            for sampling in self.samplings
            for number in range(setup.config.draws)
            for shard, start in enumerate(range(0, setup.count, size))
        ]

    def sheets(self, setup: Setup) -> list[Sheet]:
        """One item for each sampling."""
        return [Sheet(self.name, sampling, setup.config.samples) for sampling in self.samplings]

    def judgements(self, setup: Setup) -> list[Judge]:
        """One item for each draw of each sampling."""
        parts: dict[tuple[Sampling, int], list[str]] = {}
        for item in self.samples(setup):
            parts.setdefault((item.sampling, item.draw), []).append(item.file)
        return [Judge(self.name, sampling, number, tuple(files)) for (sampling, number), files in parts.items()]

    def comparisons(self, setup: Setup) -> list[Fidelity | Lines]:
        """What needs held-out pairs."""
        if setup.pairs is None:
            return []
        count = setup.config.held_out
        lines = [Lines(self.name, setup.pairs["pairs"]["num_steps"], count)] if self.straight else []
        return [*(Fidelity(self.name, sampling, count) for sampling in self.samplings), *lines]

    def evaluations(self, setup: Setup) -> int:
        """Network evaluations of all its items."""
        items = [*self.samples(setup), *self.sheets(setup), *self.comparisons(setup)]
        return sum(item.evaluations for item in items)

    def publish(self, setup: Setup, seconds: Mapping[str, float]) -> None:
        """Write metrics and sheets, and the `seconds` that samples took. Remove files that were only needed for published
        figures; what another command still measures stays."""
        folder = self.stage.folder
        results.publish(setup, self.name, self.samplings, self.stage.plan, self.straight)
        for name in results.temporary(folder):
            folder.remove(name)
        folder.clean()
        published = (results.metrics_in(folder) or {"rows": []})["rows"]
        for row in published:
            prometheus.gauge("evaluation_figure", row["mean"], model=self.name, sampler=row["sampler"], metric=row["metric"])
        measured = {row["sampler"]: row["nfe"] for row in published}
        samples = setup.config.draws * setup.count
        finish(self.stage, samples=samples * len(measured), evaluations=samples * sum(measured.values()), **seconds)


def finish(stage: Stage, **facts: Any) -> None:
    """Finish the stage with the files that stay, until they are those that `_SUCCESS` lists: another command may write too."""
    while True:
        stage.finish(temporary=results.TEMPORARY, **facts)
        if stage.is_complete():
            return


def _networks(place: Folder, config: EvaluateConfig, recipe: str) -> dict[str, tuple[str, int]]:
    """The digest (`checkpoint.digest`) of each measuring network, and the number of its features."""
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
        raise BeelineError(f"{config.reference}: {error}; give EDM's statistics, an .npz file as published") from error


def _pairs(place: Folder, recipe: str) -> dict[str, Any] | None:
    """The plan of pairs/; None, with a line said, before there are any."""
    try:
        return require(place, "pairs", recipe)
    except BeelineError:
        print(f"evaluation: no pairs in {place}; straightness and nearness to the teacher's images are left out", flush=True)
        return None


def _measurement(setup: Setup, name: str, config: EvaluateConfig, networks: Mapping[str, str], given: str) -> Measurement:
    """What is left to measure of this model; nothing is written yet."""
    model, digest = sampled_model(setup.workspace, name, setup.recipe, config)
    check_fits(setup.workspace, setup.images, model.network_config, name)
    samplings = samplings_for(model, config)
    plan = {
        "evaluate": to_dict(config, resources=False),
        "count": setup.count,
        "model_sha256": digest,
        "networks_sha256": networks,
        "reference_sha256": given,
        "images": fingerprint(setup.images),
    }
    return unpublished(Stage(setup.workspace, f"evaluation/{name}", plan), name, samplings, model.few_step)


def unpublished(stage: Stage, name: str, samplings: Sequence[Sampling], few_step: FewStep | None) -> Measurement:
    """The measurement of those `samplings` of a model that its stage has not published yet. `few_step`: how a student is
    sampled, None for a teacher. Reads the workspace and writes nothing."""
    published = results.measured(stage.folder)
    # Students of single levels mean nothing at other levels.
    straight = few_step is None or few_step.trained_steps is None
    left = [sampling for sampling in samplings if sampling.label not in published]
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
        _merge(stage, [part.file for part in parts], images["images"]["count"])
        for part in parts:
            stage.folder.remove(part.file)
        stage.folder.clean()
    for name in networks:
        reference(place, name, setup.moments)  # a reference of another network is refused before samples are judged
    return _seconds(jobs, rows)


def _merge(stage: Stage, files: list[str], count: int) -> None:
    """Make one reference of the groups' files, unless another command has, which then removes them."""
    try:
        if not stage.is_complete():
            merge_reference(stage.folder, files)
            stage.finish(temporary=("part-",), images=count)
    except FileNotFoundError as error:
        if not stage.is_complete():
            raise BeelineError(f"{error} was removed meanwhile; run the command again") from error


def _judge(setup: Setup, work: Sequence[Measurement]) -> None:
    """The second pass: figures from what was seen."""
    jobs = [
        job
        for measurement in work
        for job in _left(measurement.stage.folder, [*measurement.judgements(setup), *measurement.comparisons(setup)])
    ]
    _run(setup, "evaluation, figures", jobs)


def _left(folder: Folder, jobs: Sequence[Any]) -> list[Any]:
    """The items whose file is missing or damaged, without those of samplings that are published by now."""
    there, published = folder.sizes(), results.measured(folder)
    left = [job for job in jobs if getattr(job, "sampling", None) is None or job.sampling.label not in published]
    return [job for job in left if job.file not in there or not sound(folder, job.file)]


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
    arguments = {"setup": setup, "jobs": jobs}
    evaluations = sum(job.evaluations for job in jobs) if any(isinstance(job, Samples) for job in jobs) else 0
    total, unit = (evaluations, "network evaluations") if evaluations else (len(jobs), "measurements")
    with Progress(what, total, unit) as progress:
        for done in run_pool(Bench, arguments, range(len(jobs)), setup.config, name=what):
            progress.add(done["evaluations"] if evaluations else 1)
            rows.append(done)
    return rows


if __name__ == "__main__":
    run_command(evaluate)
