"""The page: every section's content, put into report.html.j2."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from beeline.metrics.measures import VALIDATION, is_diversity, rises
from evaluation.models import SEEN, Model, all_metrics, disagreements, main_metric, number
from evaluation.page import cost, curves, headline, paper, provenance, strips, tables, training_cost
from evaluation.page.charts import GLYPHS, colour
from evaluation.page.explain import explain
from evaluation.page.sweeps import sweeps
from evaluation.page.training import trainings
from evaluation.page.words import breaking
from pipeline.storage import Folder

TEMPLATE = "report.html.j2"


def render(place: Folder, recipe: str, models: Sequence[Model]) -> str:
    """The page of a workspace. `models` holds the teacher, then one student or more."""
    metric, metrics = main_metric(models), all_metrics(models)
    best, teacher = headline.best_figure(models[1:], metric), headline.best_figure(models[:1], metric)
    pairs = cost.pairs_cost(place)
    pictures = strips.strips(place, models)
    diversity = [name for name in metrics if is_diversity(name)]
    return _environment().get_template(TEMPLATE).render(
        recipe=recipe,
        workspace=str(place) if not place.is_local else Path(place.uri).name,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        models=models,
        metrics=metrics,
        main=metric,
        best=best,
        teacher=teacher,
        draws=max(len(figure.draws) for model in models for figure in model.figures),
        cards=headline.cards(models, metric, best, teacher, pairs),
        real_images=headline.real_images(place),
        strips=pictures,
        chosen=pictures.first_of(models[0].name, best.model if best else models[1].name),
        warnings=disagreements(models),
        curves=curves.by_evaluations(models, metric),
        distances=tables.distances(models, metric, teacher),
        training_cost=training_cost.training_cost(place, models, metric, teacher),
        ingredients=tables.ingredients(models, metric, metrics),
        pair=tables.pair_metric(metrics),
        paper_tables=paper.tables(recipe, models, metric),
        straightness=curves.straightness(models),
        diversity=diversity,
        diversity_table=tables.figures("Diversity", models, diversity),
        sweeps=sweeps(place),
        validation=VALIDATION,
        trainings=trainings(place, models),
        stages=cost.stages(place, models),
        cost=pairs.sentences(best.nfe if best else 1) if pairs else [],
        figures=tables.figures("All figures", models, metrics),
        measurements=provenance.measurements(place, models),
        facts=provenance.facts(place, models[0]),
        plans=provenance.plans(place, models),
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breaking"] = breaking
    environment.globals |= {
        "rises": rises, "explain": explain, "number": number, "colour": colour, "glyphs": list(GLYPHS.values()),
        "seen": SEEN,
    }  # fmt: skip
    return environment
