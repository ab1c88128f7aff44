"""One self-contained report.html of a workspace, which opens anywhere without a network.

    python evaluation/report.py digits

What is there is shown, what is not is left out: a teacher and one student are enough. The page is report.html.j2; figures come
from models.py, charts from figures.py, samples from strips.py, sweeps from sweeps.py, time from cost.py, the paper's numbers
from paper.py.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import tyro
from markupsafe import Markup, escape

from beeline.checkpoint import CONFIG
from beeline.errors import BeelineError, reading
from beeline.files.layout import check_layout
from beeline.metrics.measures import rises
from evaluation import cost, models
from evaluation.models import DIVERSITY, TEACHER, Figure, Model
from evaluation.page import paper, strips
from evaluation.page.charts import GLYPHS, Chart, Series, chart, colour
from evaluation.page.explain import explain
from evaluation.results import NEAREST, SAMPLES
from evaluation.sweeps import sweeps
from pipeline.command import run_command
from pipeline.records import plan_in
from pipeline.stage import require
from pipeline.storage import Folder

REPORT = "report.html"
FRECHET = ("fid_", "fd_")


def report(workspace: str, recipe: tyro.conf.Suppress[str]) -> None:
    """Write <workspace>/report.html from what is there.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    place = Folder(workspace)
    require(place, "evaluation/teacher", recipe)
    found = models.measured_models(place)
    if len(found) == 1:
        raise BeelineError(
            f"no student is measured in {place}; do that with: python evaluation/evaluate.py {recipe} "
            f"--workspace {place} --model students/lmm"
        )
    main, metrics = models.main_metric(found), models.all_metrics(found)
    pairs, (trainings, losses) = cost.pairs_cost(place), cost.trainings(place, found)
    best, teacher = _best(found[1:], main), _best(found[:1], main)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "page"),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["breaking"] = _breaking
    page = environment.get_template("report.html.j2").render(
        recipe=recipe,
        workspace=str(place) if not place.is_local else Path(place.uri).name,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        models=found,
        metrics=metrics,
        main=main,
        best=best,
        teacher=teacher,
        draws=max(len(row.draws) for model in found for row in model.figures),
        rises=rises,
        explain=explain,
        colour=colour,
        glyphs=list(GLYPHS.values()),
        number=models.number,
        headline=_headline(found, main, best, teacher, pairs),
        data=_data(place),
        warnings=models.disagreements(found),
        **_pictures(place, found),
        curves=_curves(found, main),
        ablation=_ablation(found, main, metrics),
        tables=paper.tables(recipe, found, main),
        straightness=_straightness(found),
        diversity=[metric for metric in metrics if metric.split("_")[0] in DIVERSITY],
        sweeps=sweeps(place),
        trainings=trainings,
        losses=losses,
        stages=cost.stages(place, found),
        cost=pairs.sentences(best.nfe if best else 1) if pairs else [],
        plans=_plans(place, found),
    )
    place.write(REPORT, page.encode())
    print(f"report: {place}/{REPORT} ({len(page) / 1e6:.1f} MB)", flush=True)


def _breaking(name: str) -> Markup:
    """A name that may break into lines after its underscores and slashes, if it is long."""
    return Markup(re.sub("([_/])", r"\1<wbr>", str(escape(name)))) if len(name) > 14 else escape(name)


def _best(found: Sequence[Model], metric: str) -> Figure | None:
    """The best figure at the fewest evaluations of students; of the teacher, the best."""
    rows = [row for model in found for row in model.of(metric) if math.isfinite(row.mean)]
    sign = -1 if rises(metric) else 1
    fewest = min((row.nfe for row in rows if row.steps is not None), default=None)
    return min((row for row in rows if fewest in (None, row.nfe)), key=lambda row: sign * row.mean, default=None)


def _headline(
    found: Sequence[Model], main: str, best: Figure | None, teacher: Figure | None, pairs: cost.PairsCost | None
) -> list[tuple[str, str, str]]:
    """What a reader should take away, as (figure, its spread or "", what it is)."""
    made: list[tuple[str, str, str]] = []
    titles = {model.name: "the teacher" if model.name == TEACHER else model.title for model in found}
    for row in (best, teacher):
        if row:
            spread = row.spread if len(row.draws) > 1 else ""
            made.append((models.number(row.mean), spread, f"{main} of {titles[row.model]} with {_evaluations(row.nfe)}"))
    if best and teacher:
        made.append((f"{teacher.nfe / best.nfe:.0f}×", "", "fewer network evaluations for each image"))
        least = next(iter(found[0].of(main)))
        if main.startswith(FRECHET) and least.nfe < teacher.nfe and least.mean > best.mean > 0:
            text = f"nearer to the real images than the teacher with {_evaluations(least.nfe)}"
            made.append((f"{least.mean / best.mean:.1f}×", "", text))
    paid_back = pairs.paid_back(best.nfe) if best and pairs else None
    return [*made, (f"{paid_back:,}", "", "images until the pairs are paid back, in evaluations")] if paid_back else made


def _evaluations(nfe: int) -> str:
    return f"{nfe} evaluation{'s' * (nfe != 1)}"


def _data(place: Folder) -> str:
    """The real images, in words."""
    sizes = {"images?": {"resolution": 1, "channels": 1, "count": 0, "num_classes?": 0}}
    images = (plan_in(place / "images", sizes) or {}).get("images")
    if not images:
        return ""
    side, kind = images["resolution"], {1: "grey", 3: "colour"}.get(images["channels"], f"{images['channels']} channels")
    classes = f"{images['num_classes']:,} classes" if images.get("num_classes") else "no classes"
    return f"{images['count']:,} real images, {side}×{side}, {kind}, {classes}"


def _pictures(place: Folder, found: Sequence[Model]) -> dict[str, Any]:
    """The strips of every model: of the same noise, and beside the nearest real images; and whether they are lossless."""
    sheets = {
        (model.name, name): _read(place / "evaluation" / model.name, name) for model in found for name in (SAMPLES, NEAREST)
    }
    lossless = sum(len(png) for png in sheets.values() if png) <= strips.BUDGET

    def cut(name: str, lines: int) -> list[tuple[Model, list[Any]]]:
        made = []
        for model in found:
            png = sheets[model.name, name]
            if png:
                sheet = strips.Sheet(png, len(model.samplings), lines, f"{place}/evaluation/{model.name}/{name}")
                made.append((model, list(zip(model.samplings, sheet.pictures(lossless=lossless), strict=True))))
        return made

    return {"samples": cut(SAMPLES, 1), "nearest": cut(NEAREST, 2), "lossless": lossless}


def _read(folder: Folder, name: str) -> bytes | None:
    try:
        return folder.read(name)
    except FileNotFoundError:
        return None


def _curves(found: Sequence[Model], main: str) -> Chart | None:
    """The main metric by evaluations, with the spread over noise seeds."""
    rows = {}
    for model in found:
        plain = {way.label for way in model.samplings if way.steps is None or way.plain}
        rows[model.name] = [row for row in model.of(main) if row.sampler in plain]
    counts = sorted({row.nfe for those in rows.values() for row in those})
    there = {nfe: [name for name, those in rows.items() if nfe in [row.nfe for row in those]] for nfe in counts}

    def beside(row: Figure) -> float:
        """Models of as many evaluations stand side by side."""
        return row.nfe * 1.045 ** (there[row.nfe].index(row.model) - (len(there[row.nfe]) - 1) / 2)

    series = [
        Series(
            name=model.title, number=model.number, x=[beside(row) for row in rows[model.name]],
            y=[row.mean for row in rows[model.name]], error=[row.std for row in rows[model.name]],
        )
        for model in found
    ]  # fmt: skip
    log = "xy" if main.startswith(FRECHET) else "x"
    alt = f"{main} by network evaluations for each image"
    return chart(series, x="network evaluations per image", y=main, alt=alt, log=log, ticks=counts)


def _ablation(found: Sequence[Model], main: str, metrics: Sequence[str]) -> dict[str, Any]:
    """Every student at one evaluation, in the main metric and in nearness to the teacher's images."""
    pair = next((metric for metric in metrics if metric.startswith("pair_rms")), None)
    rows = []
    for model in found[1:]:
        for way in model.samplings:
            figure = model.figure(way.label, main)
            if way.nfe == 1 and way.plain and figure:
                rows.append({"model": model, "figure": figure, "pair": model.figure(way.label, pair) if pair else None})
    return {
        "rows": rows,
        "pair": pair,
        "most": max((row["figure"].mean for row in rows if math.isfinite(row["figure"].mean)), default=0),
    }


def _straightness(found: Sequence[Model]) -> dict[str, Any]:
    """A table of the means, and three charts over the noise levels."""
    those = [(model, model.straightness) for model in found if model.straightness is not None]
    kinds = {
        "values": ("relative residual", "y", "Straightness along the teacher's lines"),
        "own": ("relative residual", "y", "Straightness along own trajectories"),
        "speed": ("unevenness of speed", "", "Unevenness of speed along own trajectories"),
    }
    charts = []
    for key, (label, log, title) in kinds.items():
        series = [Series(name=m.title, number=m.number, x=s["sigmas"], y=s[key]) for m, s in those]
        made = chart(
            series, x="noise level σ", y=label, alt=f"{title}, by noise level", log="x" + log, least=1e-4 if log else 0
        )
        if made:
            charts.append((title, made))
    return {"rows": those, "charts": charts, "left_out": [model.title for model in found if model.straightness is None]}


def _plans(place: Folder, found: Sequence[Model]) -> list[tuple[str, str]]:
    """Everything that says how something was made, as (what, JSON)."""
    students = [f"students/{name}" for name in (place / "students").folders()]
    swept = [f"sweeps/{name}" for name in (place / "sweeps").folders()]
    plans: list[tuple[str, Mapping[str, Any] | None]] = [
        (name, plan_in(place / name, {})) for name in ("images", "probe", TEACHER, "pairs", *students, *swept)
    ]
    config = (place / TEACHER).read_json(CONFIG) or {}
    with reading(f"{place / TEACHER}/{CONFIG} does not say where the teacher is from", "make or copy the model again"):
        check_layout(config, {"about?": {}})
        plans.append(("teacher, imported", (config.get("about") or {}).get("imported")))
    plans += [(f"evaluation/{model.name}", model.provenance) for model in found]
    return [(name, json.dumps(plan, indent=1)) for name, plan in plans if plan]


if __name__ == "__main__":
    run_command(report)
