"""Measure models against the real images into evaluation/<model>/, with a pool of actors.

    python evaluation/evaluate.py digits --model teacher --nfe 35 9 3 1
    python evaluation/evaluate.py digits --model students/lmm students/l2 --steps 0
    python evaluation/evaluate.py cifar10 --model students/lmm/reconstruction --steps 0 0,1 0,1,2 0,3,5 0,1,3,5

measures.py lists the metrics and their names. Averages of a student's weights are models of their own (students/lmm/ema-200).
Class labels match those of the real images. Each call adds rows to the results of earlier calls. The numbers are the same, to
the last bit, for any number of actors and after any number of restarts.
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
    """Measure several models with one pool. `models` maps each name to step schedules, which only students use."""
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
    measurements = [_measurement(setup, name, replace(config, steps=steps), digests, given) for name, steps in models.items()]
    work = [measurement for measurement in measurements if measurement.stage.begin(more=bool(measurement.samplings))]
    if not work:
        return
    seconds = _prepare_and_sample(setup, work, digests)
    _judge(setup, work)
    for measurement in work:
        measurement.publish(setup, seconds.get(measurement.name, {}))


def check_measurable(
    place: Folder, recipe: str, config: EvaluateConfig, images: Mapping[str, Any]
) -> tuple[dict[str, tuple[str, int]], Moments | None, str]:
    """The measuring networks (`_networks`), and the given reference with its SHA-256.

    Raises BeelineError if one is missing, if the reference does not fit the network, and for too few samples for the number
    of features.
    """
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
    """The remaining work for one model: `samplings` whose figures are not published yet."""

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
        """The items that need held-out pairs; none without pairs."""
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
        """Write metrics and sheets, and the `seconds` that samples took. Then remove the files of published samplings.

        Files of samplings that another command still measures stay.
        """
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
    """Finish the stage. Repeats until `_SUCCESS` lists the files of the folder: another command may write at the same time."""
    while True:
        stage.finish(temporary=results.TEMPORARY, **facts)
        if stage.is_complete():
            return


def _networks(place: Folder, config: EvaluateConfig, recipe: str) -> dict[str, tuple[str, int]]:
    """The digest (`checkpoint.digest`) of each measuring network, and the number of its features."""
    networks = {}
    for name in config.features:
        if name in PROBES:
            probe, digest = require_probe(place, PROBES[name], recipe)
            networks[name] = digest, probe.tap_channels[-1]
        else:
            network, digest = require_measuring(place, name)
            networks[name] = digest, network.dimensions
    return networks


def _given_reference(config: EvaluateConfig) -> tuple[Moments | None, str]:
    """The statistics in the file that `config.reference` names, and its SHA-256; (None, "") without one."""
    if not config.reference:
        return None, ""
    if "inception" not in config.features:
        raise BeelineError("--reference gives statistics in Inception's features; add inception to --features")
    folder, _, name = config.reference.rpartition("/")
    try:
        data = Folder(folder or ".").read(name)
    except FileNotFoundError as error:
        raise BeelineError(f"{config.reference} does not exist; expected an .npz file with mu and sigma") from error
    try:
        return Moments.from_npz(data), hashlib.sha256(data).hexdigest()
    except ValueError as error:
        raise BeelineError(f"{config.reference}: {error}; give EDM's statistics, an .npz file as published") from error


def _pairs(place: Folder, recipe: str) -> dict[str, Any] | None:
    """The plan of pairs/. Prints a line and returns None if there are no pairs."""
    try:
        return require(place, "pairs", recipe)
    except BeelineError:
        print(
            f"evaluation: no pairs in {place}; straightness and the distance to the teacher's images are not measured",
            flush=True,
        )
        return None


def _measurement(setup: Setup, name: str, config: EvaluateConfig, networks: Mapping[str, str], given: str) -> Measurement:
    """Find the remaining work for a model. Writes nothing."""
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
    straight = few_step is None or (few_step.trained_steps is None and not few_step.guess)
    left = [sampling for sampling in samplings if sampling.label not in published]
    return Measurement(name, stage, left, straight)


def _prepare_and_sample(setup: Setup, work: Sequence[Measurement], networks: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Run the first pass: features of real images, held-out pairs, all samples. Returns by model the seconds of its samples."""
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
        reference(place, name, setup.moments)  # fails for a reference of another network, before samples are judged
    return _seconds(jobs, rows)


def _merge(stage: Stage, files: list[str], count: int) -> None:
    """Merge the groups' files into one reference, unless another command has done so and removed them."""
    try:
        if not stage.is_complete():
            merge_reference(stage.folder, files)
            stage.finish(temporary=("part-",), images=count)
    except FileNotFoundError as error:
        if not stage.is_complete():
            raise BeelineError(f"{error} was removed during the run; run the command again") from error


def _judge(setup: Setup, work: Sequence[Measurement]) -> None:
    """Run the second pass: metrics from features."""
    jobs = [
        job
        for measurement in work
        for job in _left(measurement.stage.folder, [*measurement.judgements(setup), *measurement.comparisons(setup)])
    ]
    _run(setup, "evaluation, figures", jobs)


def _left(folder: Folder, jobs: Sequence[Any]) -> list[Any]:
    """The items whose file is missing or damaged, except those of samplings that are published by now."""
    files, published = folder.sizes(), results.measured(folder)
    left = [job for job in jobs if getattr(job, "sampling", None) is None or job.sampling.label not in published]
    return [job for job in left if job.file not in files or not sound(folder, job.file)]


def _seconds(jobs: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """An actor's seconds per network evaluation and per image for features, by model, for the samples of this run.

    They are medians over work items: the first item of an actor may include compilation.
    """
    seconds: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        job = jobs[row["item"]]
        if isinstance(job, Samples):
            item_seconds = row[SAMPLING] / job.evaluations, row[LOOKING] / len(job.indices)
            seconds.setdefault(job.model, []).append(item_seconds)
    return {
        name: dict(zip((PER_EVALUATION, PER_LOOK), map(statistics.median, zip(*times, strict=True)), strict=True))
        for name, times in seconds.items()
    }


def _run(setup: Setup, what: str, jobs: list[Any]) -> list[dict[str, Any]]:
    """Run all work items with the pool. Returns the row of each."""
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
