"""The figures of students by what their training cost, with everything counted once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from measured import FRESH, ONE, TEACHER_WAYS, TWO, measure, trained

from beeline.errors import BeelineError
from beeline.recipes import RECIPES
from evaluation.models import measured_models
from evaluation.page.charts import Chart
from evaluation.page.headline import best_figure
from evaluation.page.render import render
from evaluation.page.training_cost import TrainingCost, short, training_cost
from pipeline.records import cost_in
from pipeline.storage import Folder

STUDENTS = RECIPES["digits_methods"](0).students | RECIPES["digits"](0).students
METRIC = "fd_probe_1797"
LEVEL, GAMMA = ("0,0.821", 2, [0, 0.821]), ("0,0.821 gamma 0.5", 2, [0, 0.821])
KD = {"training": 96_000, "phases": {"distillation": 96_000}, "pairs": 87_500, "inherited": {}}
LMM = {
    "training": 300_000, "phases": {"reconstruction": 100_000, "adversarial": 200_000}, "pairs": 87_500, "inherited": {},
}  # fmt: skip
LATER = {
    "training": 50_000.5, "phases": {"distillation": 50_000.5}, "pairs": 0,
    "inherited": {"students/lmm": {"training": 100_000, "pairs": 87_500}, "students/kd": {"training": 96_000, "pairs": 0}},
}  # fmt: skip
UNKNOWN = {"training": None, "phases": {"distillation": None}, "pairs": 87_500, "inherited": {}}
LOST = KD | {"inherited": {"students/gone": {"training": None, "pairs": None}}}


@pytest.fixture
def place(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "ws"))


def write(place: Folder, **costs: Any) -> None:
    measure(place, "teacher", TEACHER_WAYS, [METRIC])
    for name, cost in costs.items():
        config = STUDENTS["lmm" if cost == LMM else "kd"]
        trained(place, name, replace(config, name=name), cost=cost)
        measure(place, f"students/{name}", [ONE, TWO, FRESH], [METRIC])


def section(place: Folder) -> TrainingCost | None:
    models = measured_models(place)
    return training_cost(place, models, METRIC, best_figure(models[:1], METRIC))


def cells(place: Folder) -> dict[str, list[str]]:
    shown = section(place)
    assert shown is not None
    return {row.head: [cell.text for cell in row.cells] for row in shown.table.rows}


def drawn(place: Folder) -> Chart:
    shown = section(place)
    assert shown is not None
    assert shown.chart is not None
    return shown.chart


def test_costs_add_up(place: Folder) -> None:
    write(place, kd=KD, lmm=LMM, later=LATER)
    measure(place, "students/lmm/reconstruction", [ONE], [METRIC])
    measure(place, "students/lmm/ema-50", [ONE], [METRIC])
    found = cells(place)
    assert list(found) == ["kd", "lmm", "later", "lmm · reconstruction"]  # by their figures
    assert found["kd"][:4] == ["96.0 k", "0", "87.5 k", "184 k"]
    assert found["lmm"][:4] == ["300 k", "0", "87.5 k", "388 k"]
    assert found["lmm · reconstruction"][:4] == ["100 k", "0", "87.5 k", "188 k"]  # the second phase came later
    assert found["later"][:4] == ["50.0 k", "196 k", "87.5 k", "334 k"]  # pairs once
    one, other, rest = drawn(place).keys
    assert [len(curve.x) for curve in (one, other, rest)] == [4, 3, 2]
    assert (one.name, other.name, rest.name) == ("1 evaluation", "2 evaluations", "teacher, 35 evaluations")
    assert list(one.x) == pytest.approx([0.1835, 0.3875, 0.3335005, 0.1875])  # millions, with the pairs
    assert list(one.left or ()) == pytest.approx([0.096, 0.3, 0.2460005, 0.1])  # without
    assert (other.left, other.labels) == (None, None)
    assert list(one.labels or ()) == ["kd", "", "", ""]  # the cheapest is the best


def test_the_best_sampling_of_each_count_is_taken(place: Folder) -> None:
    """Also one by another rule, or at a noise level; a row keeps the name of its rule."""
    measure(place, "teacher", TEACHER_WAYS, [METRIC])
    trained(place, "kd", STUDENTS["kd"], cost=KD)
    measure(place, "students/kd", [ONE, GAMMA, LEVEL], [METRIC])  # figures rise from row to row
    shown, models = section(place), measured_models(place)
    assert shown is not None
    assert [cell.tip for cell in shown.table.rows[0].cells[4:]] == ["steps 0", "steps 0,0.821 gamma 0.5", ""]
    assert [cell.text for cell in shown.table.rows[0].cells[4:]] == ["1.110", "2.110", "—"]
    page = render(place, "digits", models)
    assert '<span title="steps 0,0.821 gamma 0.5">2.110</span>' in page
    assert "0,0.821 gamma 0.5" in page.split('id="figures"')[1]
    assert [figure.steps for figure in models[1].figures] == [(0,), (0, 0.821), (0, 0.821)]
    assert [type(step) for step in models[1].figures[1].steps or ()] == [int, float]


def test_a_figure_that_is_not_finite_is_none(place: Folder) -> None:
    write(place, kd=KD)
    path = place / "evaluation/students/kd"
    metrics = path.read_json("metrics.json")
    assert metrics is not None
    metrics["rows"][0]["mean"] = float("nan")
    path.write("metrics.json", json.dumps(metrics).encode())
    assert cells(place)["kd"][4:] == ["—", "2.110", "—"]


def test_what_is_not_known_is_not_a_number(place: Folder) -> None:
    write(place, kd=KD, own=UNKNOWN, orphan=LOST, older=None)
    found = cells(place)
    assert found["own"][:4] == ["—", "0", "87.5 k", "—"]
    assert found["orphan"][:4] == ["96.0 k", "—", "—", "—"]
    assert found["older"][:4] == ["—", "—", "—", "—"]
    assert [len(curve.x) for curve in drawn(place).keys[:2]] == [1, 1]


def test_without_any_record_there_is_no_section(place: Folder) -> None:
    write(place, older=None)
    assert section(place) is None
    assert 'id="training-cost"' not in render(place, "digits", measured_models(place))


def test_a_chart_of_45_students(place: Folder) -> None:
    """It has a key for each number of evaluations, and names those alone that no cheaper one beats."""
    costs = {f"m{'x' * (k % 9)}{k}": KD | {"phases": {"distillation": 1000 * 1.2**k}} for k in range(45)}
    write(place, **costs)
    page = render(place, "digits", measured_models(place))
    chart = drawn(place)
    assert [curve.name for curve in chart.keys] == ["1 evaluation", "2 evaluations", "teacher, 35 evaluations"]
    named = [name for name in chart.keys[0].labels or () if name]
    assert 0 < len(named) < 10
    assert all(f">{name}<" in chart.svg for name in named)
    assert page.count('<tr><th scope="row">') > 45
    cost = dict(zip(chart.keys[0].x, chart.keys[0].y, strict=True))
    front = [cost[x] for x, name in zip(chart.keys[0].x, chart.keys[0].labels or (), strict=True) if name]
    assert min(cost.values()) in front


def test_it_is_not_among_the_stages_facts(place: Folder) -> None:
    write(place, kd=KD)
    stages = render(place, "digits", measured_models(place)).split('id="cost"')[1].split("</section>")[0]
    assert "images seen 1,280" in stages
    assert "96,000" not in stages


@pytest.mark.parametrize(
    "cost",
    [
        3, {}, KD | {"pairs": -1}, KD | {"phases": {"distillation": "x"}}, KD | {"phases": []}, KD | {"training": "x"},
        KD | {"inherited": {"students/x": 3}}, KD | {"inherited": {"students/x": {"training": "x"}}},
    ],
)  # fmt: skip
def test_damaged_records_are_named(place: Folder, cost: Any) -> None:
    write(place, kd=cost)
    with pytest.raises(BeelineError, match=r"students/kd/_SUCCESS is not as its stage writes it"):
        cost_in(place / "students/kd")


@pytest.mark.parametrize(
    ("evaluations", "text"),
    [(None, "—"), (0, "0"), (999, "999"), (1000, "1.00 k"), (96_000, "96.0 k"), (1.2e9, "1.20 G"), (4.567e14, "457 T")],
)
def test_short_numbers(evaluations: float | None, text: str) -> None:
    assert short(evaluations) == text
