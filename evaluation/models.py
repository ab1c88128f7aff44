"""The measured models of a workspace: their figures, their training, and the metric that compares them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from beeline.config.student import BEST, half_life_of, student_folder
from beeline.errors import BeelineError, reading
from beeline.features.measuring import measuring_name
from beeline.files.layout import check_layout
from beeline.files.names import CONFIG, EVALUATION, STUDENTS, TEACHER
from beeline.metrics.measures import FID, FRECHET, is_diversity
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.sampling import Sampling
from beeline.sampling.few_step import Step
from evaluation.results import METRICS, again, metrics_in
from pipeline.records import success_in
from pipeline.storage import Folder

STUDENT = rf"{STUDENTS}/[\w-][\w.-]*(/[\w-][\w.-]*)?"  # matches a model's folder in the workspace, nothing outside it
# Prefixes of the metrics that models are compared by, most preferred first.
PREFERRED = (f"{FID}_", f"{FRECHET}_dinov2", f"{FRECHET}_probe", f"{FRECHET}_")
LINES = f"{LinesMatchingConfig.__module__}:{LinesMatchingConfig.__qualname__}"
SEEN = "†"  # marks figures in features that the student's own loss used


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A row of metrics.json: `metric` over `n` samples of `model`, drawn by `sampler`, for each noise seed (`draws`)."""

    model: str
    nfe: int
    steps: tuple[Step, ...] | None
    sampler: str
    metric: str
    n: int
    mean: float
    std: float
    min: float
    draws: tuple[float, ...]

    @property
    def spread(self) -> str:
        """The standard deviation over the draws, or a dash for a single draw."""
        return number(self.std, like=self._size) if len(self.draws) > 1 else "—"

    @property
    def text(self) -> str:
        """Mean and spread, such as "0.315 ± 0.051"."""
        mean = number(self.mean, like=self._size)
        return f"{mean} ± {self.spread}" if len(self.draws) > 1 else mean

    @property
    def _size(self) -> float:
        return 1.0 if is_diversity(self.metric) else self.mean


@dataclasses.dataclass(frozen=True)
class Ingredients:
    """Settings of the last phase of a lines-matching student, from its config.json."""

    distance: str
    adversarial: bool
    networks: tuple[str, ...]
    steps: tuple[int, ...] | None

    @property
    def rank(self) -> tuple[bool, bool, bool]:
        """Sort key: models with an ingredient come after those without it."""
        return self.distance not in ("l2", "huber"), self.adversarial, self.steps is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A measured model. `training` is the record of its training in a student's config.json, or {} without one. `iterations`
    include those of the student it started from. `features` are the measuring networks whose features its losses have used, and
    those of the student it started from."""

    name: str
    figures: tuple[Figure, ...]
    samplings: tuple[Sampling, ...]
    straightness: Mapping[str, Any] | None
    provenance: Mapping[str, Any]
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    iterations: tuple[int, ...] = ()
    features: frozenset[str] = frozenset()
    number: int = 0

    @property
    def title(self) -> str:
        """Name in tables: "lmm · reconstruction"."""
        return self.name.removeprefix(f"{STUDENTS}/").replace("/", " · ")

    @property
    def is_average(self) -> bool:
        """Whether it is another average of a student, or the student's best validated weights."""
        part = self.name.split("/")[2] if self.name.count("/") == 2 else ""
        return part == BEST or half_life_of(part) is not None

    @property
    def ingredients(self) -> Ingredients | None:
        """Settings of a lines-matching student; None for a teacher, for other objectives, and for students without a record."""
        objective = phases_of(self.training).get(self.training.get("phase", ""), {}).get("objective", {})
        if objective.get("method") != LINES:
            return None
        steps, networks = objective.get("steps"), objective.get("discriminator", {}).get("networks", ())
        adversarial = bool(objective.get("adversarial_weight"))
        return Ingredients(
            str(objective.get("distance")), adversarial, tuple(networks), None if steps is None else tuple(steps)
        )

    @property
    def about(self) -> str:
        """The method in words; "" if it is not known."""
        part = self.name.rpartition("/")[2]
        if self.is_average:
            half_life = half_life_of(part)
            return f"average of the weights, half-life {half_life} iterations" if half_life else "best validated weights"
        return str(self.training.get("method", ""))

    def mark(self, metric: str) -> str:
        """A mark for figures in features that a loss used: they do not measure the student independently. "" for others."""
        return f" {SEEN}" if any(f"_{network}_" in f"_{metric}_" for network in self.features) else ""

    def figure(self, label: str, metric: str) -> Figure | None:
        """The figure of one sampling in one metric, or None."""
        return next((found for found in self.figures if (found.sampler, found.metric) == (label, metric)), None)

    def of(self, metric: str) -> list[Figure]:
        """The figures in one metric, sorted by NFE."""
        return sorted((found for found in self.figures if found.metric == metric), key=lambda found: found.nfe)


def student_folders(place: Folder) -> list[str]:
    """The folders of all students, each followed by those of its parts if it is a set of students."""
    found = []
    for student in map(student_folder, (place / STUDENTS).folders()):
        parts = sorted(filter(str.isdecimal, (place / student).folders()), key=int)
        found += [student, *(f"{student}/{part}" for part in parts)]
    return found


def measured_models(place: Folder) -> list[Model]:
    """List the teacher, then the students, those with an ingredient after those without. Raises BeelineError for damaged
    metrics."""
    measured = place / EVALUATION
    names = [student_folder(name) for name in (measured / STUDENTS).folders()]
    names += [f"{name}/{part}" for name in names for part in (measured / name).folders()]
    found = [_model(place, name) for name in (TEACHER, *names) if success_in(measured / name)]
    found.sort(key=lambda model: (model.name != TEACHER, _order(model)))
    return [dataclasses.replace(model, number=k) for k, model in enumerate(found)]


def _order(model: Model) -> tuple[Any, ...]:
    return (model.is_average, model.ingredients is not None,
            model.ingredients.rank if model.ingredients else (), model.name)  # fmt: skip


def _model(place: Folder, name: str) -> Model:
    folder = place / EVALUATION / name
    found = metrics_in(folder)
    with reading(f"{folder}/{METRICS} is not as expected", again(folder)):
        if found is None:
            raise ValueError("it is missing")
        figures = tuple(_figure(row) for row in found["rows"])
        ways = {row.sampler: Sampling.parse(row.sampler) for row in figures}
        samplings = tuple(ways[entry["label"]] for entry in found["order"])
        if len(samplings) != len(ways):
            raise ValueError(f"order names {len(samplings)} samplings, rows {len(ways)}")
        straightness = found.get("straightness")
        if straightness is not None:
            curves = {len(straightness[key]) for key in ("sigmas", "values", "own", "speed")}
            if len(curves) != 1:
                raise ValueError(f"straightness has curves of {sorted(curves)} values")
    with reading(f"{place / name}/{CONFIG} does not say how the student was trained", "make or copy the model again"):
        history = _history(place, name)
        model = Model(
            name=name, figures=figures, samplings=samplings, straightness=straightness, provenance=found["provenance"],
            training=history[-1], iterations=tuple(count for record in history for count in _iterations(record)),
            features=frozenset(measuring_name(network) for record in history for network in record.get("features") or ()),
        )  # fmt: skip
        _ = _order(model), model.about  # the report uses both; damaged settings fail here
    return model


def _figure(row: Mapping[str, Any]) -> Figure:
    made = Figure(
        model=str(row["model"]), nfe=int(row["nfe"]), steps=None if row["steps"] is None else tuple(row["steps"]),
        sampler=str(row["sampler"]), metric=str(row["metric"]), n=int(row["n"]), mean=float(row["mean"]),
        std=float(row["std"]), min=float(row["min"]), draws=tuple(map(float, row["draws"])),
    )  # fmt: skip
    if made.nfe < 1:
        raise ValueError(f"a row has nfe {made.nfe}")
    return made


def _training(place: Folder, name: str) -> Mapping[str, Any]:
    """The record of training in a student's config.json, as trainers/training.py writes it; {} for a teacher."""
    config = None if name == TEACHER else (place / name).read_json(CONFIG)
    if config is None:
        return {}
    check_layout(
        config, {"about?": {"trained?": {"init?": str, "phases?": {}}, "phase?": str, "method?": str, "features?": [str]}}
    )
    return config.get("about") or {}


def phases_of(training: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the phases of a training, by name and in order."""
    phases = (training.get("trained") or {}).get("phases") or {}
    return {name: phase for name, phase in phases.items() if phase.get("iterations")}


def _history(place: Folder, name: str) -> list[Mapping[str, Any]]:
    """The records of training of a student and of those it started from, the first one first; [{}] for a teacher."""
    history, seen = [_training(place, name)], {name}
    while history[0].get("phase", "") in phases_of(history[0]):
        init = str(history[0]["trained"].get("init", TEACHER))
        if not re.fullmatch(STUDENT, init) or init in seen:  # a student may have been copied here from elsewhere
            break
        seen.add(init)
        history.insert(0, _training(place, init))
    return history


def _iterations(training: Mapping[str, Any]) -> list[int]:
    """Iterations of each phase of a training, until the one that published the student."""
    phases, last = phases_of(training), training.get("phase", "")
    if last not in phases:
        return []
    return [int(phases[phase]["iterations"]) for phase in list(phases)[: list(phases).index(last) + 1]]


def main_metric(models: Sequence[Model]) -> str:
    """The metric of the overview and the curves.

    Criteria in this order: FID or a Fréchet distance; shared by teacher and students; FID before Fréchet distances in DINOv2, a
    probe and others; most models; most samples.
    """
    owners: dict[str, list[str]] = {}
    counts = {row.metric: row.n for model in models for row in model.figures}
    for model in models:
        for metric in {row.metric for row in model.figures}:
            owners.setdefault(metric, []).append(model.name)

    def worth(metric: str) -> tuple[Any, ...]:
        shared = TEACHER in owners[metric] and len(owners[metric]) > 1
        rank = next((k for k, prefix in enumerate(PREFERRED) if metric.startswith(prefix)), len(PREFERRED))
        return rank == len(PREFERRED), not shared, rank, -len(owners[metric]), -counts[metric], metric

    if not owners:
        raise BeelineError("no model has figures; measure with: python evaluation/evaluate.py RECIPE --model teacher ...")
    return min(owners, key=worth)


def all_metrics(models: Sequence[Model]) -> list[str]:
    """All metrics, in the order of their first use."""
    return list(dict.fromkeys(row.metric for model in models for row in model.figures))


def disagreements(models: Sequence[Model]) -> list[str]:
    """Differences in how models were measured, such as "students/x: reference_sha256". They make figures incomparable."""
    same = ("count", "images", "reference_sha256", "networks_sha256", "noise_seeds", "resize", "quantised")
    first = models[0].provenance
    return [
        f"{model.name}: {', '.join(differing)}"
        for model in models[1:]
        if (differing := [key for key in same if model.provenance.get(key) != first.get(key)])
    ]


def number(value: float, like: float | None = None) -> str:
    """Format a figure with three decimals, or with more if it is small; `like` is the value that sets the decimals."""
    size = abs(value if like is None else like)
    if not math.isfinite(value):
        return "not finite"
    if size >= 1e6:
        return f"{value:,.0f}"
    return f"{value:.3f}" if size >= 0.1 or size == 0 else f"{value:.4f}" if size >= 0.001 else f"{value:.2g}"
