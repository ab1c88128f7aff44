"""Compare the students of several workspaces, for example of several seeds, in one Markdown table.

    python evaluation/compare.py runs/seed-0 runs/seed-1 > methods.md

The workspaces must have measured in the same way: same real images, same measuring networks. A row holds a student, its
figure at 1, 2 and 4 evaluations (of several samplings the one that is best on average), precision and recall at its fewest
evaluations, and what its training cost in network evaluations for one image. A dagger marks figures in features that the
student's own loss used.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import math
import statistics
from collections.abc import Sequence
from typing import Annotated

import tyro

from beeline.config.student import student_folder
from beeline.entry import run_main
from beeline.errors import BeelineError
from beeline.files.names import TEACHER
from beeline.metrics.measures import rises
from beeline.settings import Text
from evaluation.models import Figure, Model, disagreements, main_metric, measured_models, number
from evaluation.page.training_cost import COUNTS, Student, short, student_of
from evaluation.page.words import NONE
from pipeline.storage import Folder

FIDELITY = ("precision", "recall")


def compare(workspaces: Annotated[tuple[Text, ...], tyro.conf.Positional], metric: str = "") -> None:
    """Print a Markdown table of the students that all workspaces have measured.

    Args:
        workspaces: Local folders or s3://bucket/prefix.
        metric: Metric of the table, such as fd_probe_1797; by default the report's.
    """
    places = [Folder(workspace) for workspace in workspaces]
    if not places:
        raise BeelineError("no workspace was given; expected one or more: python evaluation/compare.py runs/a runs/b")
    found = [{model.name: model for model in measured_models(place)} for place in places]
    for place, models in zip(places, found, strict=True):
        if TEACHER not in models:
            raise BeelineError(f"{place} has no measured teacher; measure it with: python evaluation/evaluate.py RECIPE")
    teachers = [models[TEACHER] for models in found]
    if differing := disagreements([teachers[0], *teachers[1:]]):
        raise BeelineError(
            f"the workspaces were not measured in the same way ({differing[0].partition(': ')[2]}), so their figures do not "
            "compare; train students with several seeds from the same teacher and probes instead"
        )
    metric = metric or main_metric(list(found[0].values()))
    names = [name for name in found[0] if all(name in models for models in found)]
    students = {
        name: [student_of(place, models[name], metric) for place, models in zip(places, found, strict=True)]
        for name in names
        if name != TEACHER and not found[0][name].is_average
    }
    if not students:
        raise BeelineError(f"no student is measured in all of {', '.join(map(str, places))}")
    print("\n".join(table(teachers, students, metric)))


def table(teachers: Sequence[Model], students: dict[str, list[Student]], metric: str) -> list[str]:
    """The lines of the table: the teacher's samplings, then the students by their figure at the fewest evaluations."""
    heads = [f"{count} evaluation{'s' * (count > 1)}" for count in COUNTS]
    lines = [
        f"| student | method | {' | '.join(heads)} | {' | '.join(FIDELITY)} | training | inherited | pairs |",
        f"|---|---|{'---|' * (len(COUNTS) + len(FIDELITY) + 3)}",
    ]
    for sampling in teachers[0].samplings:
        value = _over([teacher.figure(sampling.label, metric) for teacher in teachers])
        lines.append(f"| {TEACHER} | {sampling.label}: {value} {'| ' * (len(COUNTS) + len(FIDELITY) + 4)}".rstrip())
    sign = -1 if rises(metric) else 1

    def rank(name: str) -> float:
        best = _best([student.model for student in students[name]], COUNTS[0], metric)
        return math.inf if best is None else sign * _mean(best)

    names = sorted(students, key=lambda name: (rank(name), name))
    return lines + [_row(students[name], metric) for name in names]


def _row(runs: Sequence[Student], metric: str) -> str:
    models, first = [run.model for run in runs], runs[0]
    cells = [first.model.name.removeprefix(student_folder("")), first.model.about]
    labels: list[str] = []
    for count in COUNTS:
        best = _best(models, count, metric)
        labels += [best[0].sampler] if best else []
        cells.append(
            NONE if best is None else f"{_over(best)}{first.model.mark(metric)}{'' if count == 1 else f' ({best[0].sampler})'}"
        )
    features = metric.partition("_")[2].rpartition("_")[0]
    for part in FIDELITY:
        names = [row.metric for row in first.model.figures if row.metric.startswith(part) and features in row.metric]
        cells.append(_over([model.figure(labels[0], names[0]) for model in models]) if names and labels else NONE)
    cells += [short(value) for value in (first.training, first.inherited, first.pairs)]
    return f"| {' | '.join(cells)} |"


def _best(models: Sequence[Model], count: int, metric: str) -> list[Figure] | None:
    """The figures of all `models`, seeds of one student, by the sampling with `count` evaluations that is best on average."""
    sign, found = -1 if rises(metric) else 1, list[list[Figure]]()
    for sampling in models[0].samplings:
        figures = [figure for model in models if (figure := model.figure(sampling.label, metric)) is not None]
        if sampling.nfe == count and len(figures) == len(models) and math.isfinite(_mean(figures)):
            found.append(figures)
    return min(found, key=lambda figures: sign * _mean(figures), default=None)


def _mean(figures: Sequence[Figure]) -> float:
    return statistics.fmean(figure.mean for figure in figures)


def _over(figures: Sequence[Figure | None]) -> str:
    """Mean over the workspaces, and each value if there are several."""
    known = [figure for figure in figures if figure is not None]
    if not known:
        return NONE
    values = "" if len(known) == 1 else f" [{', '.join(number(figure.mean) for figure in known)}]"
    return f"{number(_mean(known))}{values}"


def main() -> None:
    """The command."""
    tyro.cli(compare)


if __name__ == "__main__":
    run_main(main)
