"""The head of the page: what the workspace holds, the best figures, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

from beeline.files.names import IMAGES
from beeline.metrics.measures import is_frechet, rises
from evaluation.models import TEACHER, Figure, Model, number
from evaluation.page.cost import PairsCost
from evaluation.page.words import plural
from pipeline.records import plan_in
from pipeline.storage import Folder

PLAN = {f"{IMAGES}?": {"resolution": 1, "channels": 1, "count": 0, "num_classes?": 0}}  # what the page reads of it
COLOURS = {1: "grey", 3: "colour"}  # by channels

Card = tuple[str, str, str]
"""A figure, its spread or "", and what it is."""


def best_figure(models: Sequence[Model], metric: str) -> Figure | None:
    """The best figure of these models: of students the best at their fewest evaluations, of the teacher the best of all."""
    figures = [figure for model in models for figure in model.of(metric) if math.isfinite(figure.mean)]
    sign = -1 if rises(metric) else 1
    fewest = min((figure.nfe for figure in figures if figure.steps is not None), default=None)
    return min(
        (figure for figure in figures if fewest in (None, figure.nfe)), key=lambda figure: sign * figure.mean, default=None
    )


def cards(
    models: Sequence[Model], metric: str, best: Figure | None, teacher: Figure | None, pairs: PairsCost | None
) -> list[Card]:
    """The page's main figures: `best` is the students' best figure, `teacher` the teacher's."""
    shown: list[Card] = []
    titles = {model.name: "the teacher" if model.name == TEACHER else model.title for model in models}
    for figure in (best, teacher):
        if figure:
            spread = figure.spread if len(figure.draws) > 1 else ""
            text = f"{metric} of {titles[figure.model]} with {plural(figure.nfe, 'evaluation')}"
            shown.append((number(figure.mean), spread, text))
    if best and teacher:
        shown.append((f"{teacher.nfe / best.nfe:.0f}×", "", "fewer network evaluations per image"))
        fewest = models[0].of(metric)[0]
        if is_frechet(metric) and fewest.nfe < teacher.nfe and fewest.mean > best.mean > 0:
            text = f"smaller {metric} than the teacher with {plural(fewest.nfe, 'evaluation')}"
            shown.append((f"{fewest.mean / best.mean:.1f}×", "", text))
    paid_back = pairs.paid_back(best.nfe) if best and pairs else None
    if paid_back:
        shown.append((f"{paid_back:,}", "", "images until the student has saved as many evaluations as the pairs took"))
    return shown


def real_images(place: Folder) -> str:
    """The real images in words; "" where there are none."""
    images = (plan_in(place / IMAGES, PLAN) or {}).get(IMAGES)
    if not images:
        return ""
    side, channels = images["resolution"], images["channels"]
    colour = COLOURS.get(channels, f"{channels} channels")
    classes = f"{images['num_classes']:,} classes" if images.get("num_classes") else "no classes"
    return f"{images['count']:,} real images, {side}×{side}, {colour}, {classes}"
