"""One table of several workspaces: means over them, the best sampling of each count, costs."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness import ROOT
from measured import FRESH, ONE, TEACHER_WAYS, TWO, measure, trained

from beeline.recipes import RECIPES
from evaluation.compare import compare
from pipeline.storage import Folder

METRICS = ("fd_probe_1797", "precision_probe_1797", "recall_probe_1797")
STUDENT = RECIPES["digits"](0).students["l2"]
COST = {"training": 96_000, "phases": {"reconstruction": 96_000}, "pairs": 87_500, "inherited": {}}


def workspace(path: Path, *names: str, probe: str = "aa") -> str:
    place = Folder(str(path))
    measure(place, "teacher", TEACHER_WAYS, METRICS, networks_sha256={"probe": probe})
    for name in names:
        trained(place, name, replace(STUDENT, name=name), cost=COST)
        measure(place, f"students/{name}", [ONE, TWO, FRESH], METRICS, networks_sha256={"probe": probe})
    return str(path)


def cells(page: str, head: str) -> list[str]:
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {head} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_students_of_all_workspaces_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = workspace(tmp_path / "a", "one", "longer", "alone")
    second = workspace(tmp_path / "b", "one", "longer")
    path = Path(second) / "evaluation/students/one/metrics.json"
    path.write_text(re.sub(r'("metric": "fd_probe_1797", "n": 100, "mean": )[0-9.]+', r"\g<1>3.0", path.read_text()))
    compare((first, second))
    page = "".join(line for line in capsys.readouterr().out.splitlines(keepends=True) if line.startswith("|"))
    assert "alone" not in page
    heads = cells(page, "student")
    assert heads[2:5] == ["1 evaluation", "2 evaluations", "4 evaluations"]
    one = dict(zip(heads, cells(page, "one"), strict=True))
    assert one["1 evaluation"] == "2.060 [1.120, 3.000]"
    assert one["2 evaluations"] == "2.560 [2.120, 3.000] (0,8)"  # better than with fresh noise
    assert (one["4 evaluations"], one["training"], one["pairs"]) == ("—", "96.0 k", "87.5 k")
    assert one["precision"].startswith("1.220")  # at one evaluation
    students = [line.split(" | ")[0] for line in page.splitlines()[4:]]
    assert students == ["| longer", "| one"]  # the better first
    assert page.splitlines()[2].startswith("| teacher | heun 18: ")
    assert len({line.count("|") for line in page.splitlines()}) == 1


def test_workspaces_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    first, second = workspace(tmp_path / "a", "one"), workspace(tmp_path / "b", "one", probe="bb")
    for arguments, message in (
        ([first, second], "the workspaces were not measured in the same way (networks_sha256)"),
        ([], "no workspace was given"),
        ([str(tmp_path / "nothing")], "has no measured teacher"),
        ([workspace(tmp_path / "c")], "no student is measured in all of"),
    ):
        done = subprocess.run(
            [sys.executable, "evaluation/compare.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
