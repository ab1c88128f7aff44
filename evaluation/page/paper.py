"""The paper's figures, and tables in its layout (Tables 7 to 9) with ours next to them.

Only comparable figures share a table: next to the paper's FID only fid_50k, in a column only students with the ingredients of
that column, in a row only students that are trained and sampled at its steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from beeline.files.names import TEACHER
from beeline.sampling import Sampling
from beeline.sampling.few_step import Step
from evaluation.models import Figure, Model
from evaluation.page.words import NONE

Steps = tuple[Step, ...]
BACKBONES = {"tf_efficientnet_lite0", "deit_base_distilled_patch16_224"}
L2, VGG, ADL, SOT, OTHER = "L2", "VGG", "VGG + ADL", "VGG + ADL + SOT", "LMM, variant not known"
OWN = {L2: "L2", VGG: "perceptual", ADL: "perceptual + ADL", SOT: "perceptual + ADL + SOT"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """The paper's means over independent draws of 50,000 samples, in our `metric`; `teacher` is (NFE, figure)."""

    what: str
    metric: str
    rows: Mapping[Steps, Mapping[str, float]]
    teacher: tuple[int, float] | None = None


PAPER: dict[str, tuple[Published, ...]] = {
    "cifar10": (
        Published(
            what="FID on CIFAR-10, class-conditional",
            metric="fid_50k",
            teacher=(35, 1.79),
            rows={
                (0,): {L2: 5.125, VGG: 3.124, ADL: 1.672, SOT: 1.575},
                (0, 1): {L2: 4.289, VGG: 2.796, ADL: 1.394, SOT: 1.389},
                (0, 1, 2): {L2: 4.019, VGG: 2.761, ADL: 1.386},
                (0, 3, 5): {L2: 3.337, VGG: 2.601, ADL: 1.381},
                (0, 1, 3, 5): {L2: 3.315, VGG: 2.625, ADL: 1.383},
            },
        ),
    ),
    "imagenet64": (
        Published(
            what="FID on ImageNet 64x64, class-conditional",
            metric="fid_50k",
            teacher=(79, 2.23),
            rows={(0,): {VGG: 6.968, ADL: 1.731, SOT: 1.473}, (0, 1): {VGG: 5.472, ADL: 1.318, SOT: 1.167}},
        ),
    ),
    "afhqv2": (
        Published(
            what="FID on AFHQv2 64x64, unconditional",
            metric="fid_50k",
            rows={(0,): {VGG: 5.458, ADL: 2.687, SOT: 2.767}, (0, 1): {VGG: 4.254, ADL: 1.545, SOT: 1.776}},
        ),
    ),
    "cifar10_uncond": (
        Published(
            what="FID on CIFAR-10, unconditional", metric="fid_50k", rows={(0,): {OTHER: 1.90}, (0, 1): {OTHER: 1.55}}
        ),
        Published(
            what="Inception Score on CIFAR-10, unconditional", metric="is_50k",
            rows={(0,): {OTHER: 10.16}, (0, 1): {OTHER: 10.20}},
        ),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """The paper's figure and ours, "—" for a missing one; `model` is our model."""

    paper: str
    ours: str
    model: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """`columns` are variants; `rows` are (steps, NFE, a cell for each column). `beside` says whether the table holds the
    paper's figures; `note` says why it does not, or what we lack."""

    what: str
    metric: str
    beside: bool
    columns: tuple[str, ...]
    rows: tuple[tuple[str, int, tuple[Cell, ...]], ...]
    teacher: str
    note: str


def tables(recipe: str, models: Sequence[Model], main: str) -> list[Table]:
    """The paper's tables of this recipe with our comparable figures. If our main metric is another one, a table of ours alone
    follows in the same layout."""
    beside = [_beside(published, models) for published in PAPER.get(recipe, ())]
    if any(table.metric == main for table in beside):
        return beside
    why = (
        f"The paper's figures are not in this table: they are FID over 50,000 samples (fid_50k), and {main} is another metric"
        if recipe in PAPER
        else f"The paper has no figures for {recipe}, and {main} on other data does not compare with its FID"
    )
    own = _own(models, main, why + ".")
    return [*beside, own] if own.rows else beside


def variant(model: Model, *, papers: bool) -> str | None:
    """The column of a student, None if it fits none. With `papers`, it must use the paper's own networks: VGG16 in LPIPS, and
    both backbones of the discriminator."""
    used = model.ingredients
    if used is None or model.is_average:
        return None
    if used.distance == "l2":
        return L2 if not used.adversarial and used.steps is None else None
    if used.distance not in ("lpips", "probe") or (papers and used.distance != "lpips"):
        return None
    if not used.adversarial:
        return VGG if used.steps is None else None
    if papers and set(used.networks) != BACKBONES:
        return None
    return ADL if used.steps is None else SOT


def ours(models: Sequence[Model], column: str, steps: Steps, metric: str, *, papers: bool) -> Figure | None:
    """The figure of our student of a column at `steps`, sampled by its own rule; of several students the first by name. A SOT
    student counts only in the row of the steps that it is trained at."""
    for model in sorted(models, key=lambda model: model.name):
        if variant(model, papers=papers) != column:
            continue
        if column == SOT and model.ingredients is not None and model.ingredients.steps != steps:
            continue
        labels = [sampling.label for sampling in model.samplings if _is_papers(sampling) and sampling.steps == steps]
        figures = [figure for label in labels if (figure := model.figure(label, metric)) is not None]
        if figures:
            return figures[0]
    return None


def _beside(published: Published, models: Sequence[Model]) -> Table:
    own = [column for column in (L2, VGG, ADL, SOT) if _any(models, column, published.metric, papers=True)]
    papers = [column for column in (L2, VGG, ADL, SOT, OTHER) if any(column in row for row in published.rows.values())]
    columns = tuple(column for column in (L2, VGG, ADL, SOT, OTHER) if column in {*own, *papers})
    schedules = dict.fromkeys([*published.rows, *_schedules(models, own, published.metric, papers=True)])
    rows = tuple(
        (_label(steps), len(steps), tuple(_cell(published, models, column, steps) for column in columns)) for steps in schedules
    )
    parts = [f"paper {published.teacher[1]:.2f} at NFE {published.teacher[0]}"] if published.teacher else []
    parts += [f"ours {figure.text} at NFE {figure.nfe}" for figure in _teacher(models, published.metric)]
    notes = []
    if not own:
        notes.append(
            f"No student with the paper's ingredients is measured in {published.metric}. To measure one: "
            "evaluation/evaluate.py --features inception --count 50000."
        )
    if OTHER in columns:
        notes.append("The paper does not say which variant these figures belong to, so ours are not compared with them.")
    return Table(
        what=published.what, metric=published.metric, beside=True, columns=columns, rows=rows, teacher="; ".join(parts),
        note=" ".join(notes),
    )  # fmt: skip


def _cell(published: Published, models: Sequence[Model], column: str, steps: Steps) -> Cell:
    paper = published.rows.get(steps, {}).get(column)
    figure = ours(models, column, steps, published.metric, papers=True)
    digits = 3 if published.metric.startswith("fid") and column != OTHER else 2
    return Cell(
        NONE if paper is None else f"{paper:.{digits}f}", figure.text if figure else NONE, figure.model if figure else ""
    )


def _own(models: Sequence[Model], metric: str, note: str) -> Table:
    columns = tuple(OWN)
    rows = []
    for steps in _schedules(models, columns, metric, papers=False):
        figures = [ours(models, column, steps, metric, papers=False) for column in columns]
        cells = tuple(Cell(NONE, f.text if f else NONE, f.model if f else "") for f in figures)
        rows.append((_label(steps), len(steps), cells))
    teacher = "; ".join(f"{figure.text} at NFE {figure.nfe}" for figure in _teacher(models, metric))
    return Table(
        what=f"Ours in {metric}", metric=metric, beside=False, columns=tuple(OWN[column] for column in columns),
        rows=tuple(rows), teacher=teacher, note=note,
    )  # fmt: skip


def _schedules(models: Sequence[Model], columns: Sequence[str], metric: str, *, papers: bool) -> list[Steps]:
    """The step schedules at which students of these columns are measured, by NFE."""
    schedules = {
        sampling.steps
        for model in models
        if variant(model, papers=papers) in columns
        for sampling in model.samplings
        if _is_papers(sampling) and sampling.steps is not None and model.figure(sampling.label, metric)
    }
    return sorted(schedules, key=lambda steps: (len(steps), steps))


def _is_papers(sampling: Sampling) -> bool:
    """Whether the paper may have such a row: indices into the schedule alone, and the student's own rule."""
    return sampling.plain and all(isinstance(step, int) for step in sampling.steps or ())


def _any(models: Sequence[Model], column: str, metric: str, *, papers: bool) -> bool:
    return bool(_schedules(models, [column], metric, papers=papers))


def _teacher(models: Sequence[Model], metric: str) -> list[Figure]:
    """The teacher's figure at the most evaluations, in a list; [] if there is none."""
    return [figure for model in models if model.name == TEACHER for figure in model.of(metric)[-1:]]


def _label(steps: Steps) -> str:
    return f"({', '.join(map(str, steps))})"
