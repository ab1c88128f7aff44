"""Only metrics of the same kind are compared: the paper's tables with our results, and the choice of the main metric."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from measured import DIGITS, FRESH, ONE, TEACHER_WAYS, TWO, made

from beeline.objectives.lmm import LinesMatchingConfig
from beeline.recipes import RECIPES
from evaluation.models import main_metric
from evaluation.page import paper
from evaluation.page.explain import explain


def cells(table: paper.Table) -> dict[tuple[str, str], paper.Cell]:
    return {(steps, column): cell for steps, _, row in table.rows for column, cell in zip(table.columns, row, strict=True)}


def test_beside_the_paper_stand_the_students_of_its_columns() -> None:
    students = RECIPES["cifar10"](0).students
    models = [
        made("teacher", [("heun 18", 35, None)], ["fid_50k"]),
        made("students/l2", [ONE], ["fid_50k"], students["l2"]),
        made("students/lmm", [ONE, ("0,1", 2, [0, 1])], ["fid_50k"], students["lmm"]),
        made("students/lmm/ema-6931", [ONE], ["fid_50k"], students["lmm"]),
        made("students/lmm/reconstruction", [ONE, FRESH, TWO], ["fid_50k"], students["lmm"]),
        made("students/sot", [ONE, ("0,1", 2, [0, 1])], ["fid_50k"], students["sot"]),
        made("students/kd", [ONE], ["fid_50k"], students["kd"]),
    ]
    (table,) = paper.tables("cifar10", models, "fid_50k")
    assert table.beside
    assert table.columns == ("L2", "VGG", "VGG + ADL", "VGG + ADL + SOT")
    found = cells(table)
    assert found["(0)", "L2"] == paper.Cell("5.125", models[1].figures[0].text, "students/l2")
    assert found["(0)", "VGG"].model == "students/lmm/reconstruction"
    assert found["(0)", "VGG + ADL"] == paper.Cell("1.672", models[2].figures[0].text, "students/lmm")
    assert found["(0, 1)", "VGG + ADL"].model == "students/lmm"
    assert found["(0)", "VGG + ADL + SOT"].model == "students/sot"
    # A student of (0) alone has no place in the row of (0, 1), nor has another sampling rule in that of (0, 8).
    assert found["(0, 1)", "VGG + ADL + SOT"] == paper.Cell("1.389", "—", "")
    assert found["(0, 8)", "VGG"] == paper.Cell("—", models[4].figures[2].text, "students/lmm/reconstruction")
    assert found["(0, 1, 3, 5)", "VGG + ADL + SOT"] == paper.Cell("—", "—", "")
    assert "students/kd" not in {cell.model for cell in found.values()}
    assert "paper 1.79 at NFE 35; ours" in table.teacher


@pytest.mark.parametrize("metric", ["fid_10k", "fd_dinov2_vitl14_50k", "kid_50k", "fd_probe_50k"])
def test_another_metric_is_never_beside_the_papers_fid(metric: str) -> None:
    students = RECIPES["cifar10"](0).students
    models = [made("teacher", [("heun 18", 35, None)], [metric]), made("students/l2", [ONE], [metric], students["l2"])]
    theirs, own = paper.tables("cifar10", models, metric)
    assert theirs.beside
    assert {cell.ours for cell in cells(theirs).values()} == {"—"}
    assert "ours" not in theirs.teacher
    assert not own.beside
    assert own.metric == metric
    assert {cell.paper for cell in cells(own).values()} == {"—"}
    assert cells(own)["(0)", "L2"].ours == models[1].figures[0].text


def test_other_networks_than_the_papers_are_not_beside_it() -> None:
    """cifar10_small's students use probes: perceptual, but neither VGG nor the paper's discriminator."""
    students = RECIPES["cifar10_small"](0).students
    name, metric = "students/lmm", "fid_50k"
    models = [
        made("teacher", [("heun 18", 35, None)], [metric]),
        made(name, [ONE], [metric], students["lmm"]),
        made(f"{name}/reconstruction", [ONE], [metric], students["lmm"]),
    ]
    (theirs,) = paper.tables("cifar10", models, metric)
    assert {cell.ours for cell in cells(theirs).values()} == {"—"}
    published = RECIPES["cifar10"](0).students["lmm"]
    phase = published.phases["adversarial"]
    assert isinstance(phase.objective, LinesMatchingConfig)
    probing = dataclasses.replace(phase.objective.discriminator, networks=("probe",))
    phase = dataclasses.replace(phase, objective=dataclasses.replace(phase.objective, discriminator=probing))
    mixed = dataclasses.replace(published, phases=published.phases | {"adversarial": phase})
    (theirs,) = paper.tables("cifar10", [models[0], made(name, [ONE], [metric], mixed)], metric)
    assert {cell.ours for cell in cells(theirs).values()} == {"—"}
    (own,) = paper.tables("cifar10_small", models, metric)
    assert not own.beside
    assert [cells(own)["(0)", column].model for column in paper.OWN.values()] == ["", f"{name}/reconstruction", "", name]


def test_unconditional_cifar_has_fid_and_inception_score_apart() -> None:
    students, metrics = RECIPES["cifar10_uncond"](0).students, ["fid_50k", "is_50k"]
    models = [made("teacher", [("heun 18", 35, None)], metrics), made("students/lmm", [ONE], metrics, students["lmm"])]
    fid, score = paper.tables("cifar10_uncond", models, "fid_50k")
    assert (cells(fid)["(0)", paper.OTHER].paper, cells(fid)["(0, 1)", paper.OTHER].paper) == ("1.90", "1.55")
    assert (cells(score)["(0)", paper.OTHER].paper, cells(score)["(0, 1)", paper.OTHER].paper) == ("10.16", "10.20")
    assert cells(fid)["(0)", paper.ADL].ours == models[1].figures[0].text
    assert cells(score)["(0)", paper.ADL].ours == models[1].figures[1].text
    assert {cell.ours for table in (fid, score) for (_, name), cell in cells(table).items() if name == paper.OTHER} == {"—"}


def test_the_main_metric_is_shared_and_fid_before_others() -> None:
    def chosen(teacher: Sequence[str], student: Sequence[str]) -> str:
        return main_metric([made("teacher", TEACHER_WAYS, teacher), made("students/x", [ONE], student)])

    everything = ["recall_50k", "fd_probe_50k", "fd_dinov2_vitl14_50k", "fid_50k", "kid_50k"]
    assert chosen(everything, everything) == "fid_50k"
    assert chosen(everything[:3], everything) == "fd_dinov2_vitl14_50k"
    assert chosen(["fd_probe_1797"], ["fid_50k"]) == "fid_50k"
    assert all(explain(metric) for metric in [*everything, *DIGITS, "fid_10k", "authenticity_dinov2_vits14_5k"])
