"""Two evaluations on one workspace: whenever the second one runs to its end, the first one succeeds and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small

from beeline.checkpoint import digest_of
from beeline.config import EvaluateConfig
from beeline.errors import BeelineError
from evaluation import evaluate
from evaluation.results import TEMPORARY
from pipeline.stage import PLAN, Stage
from pipeline.storage import Folder

POINTS = int(os.environ.get("BEELINE_POINTS", "6"))  # at which the second command runs, evenly spread over the first
CONFIG = EvaluateConfig(draws=1, count=32, shard_size=16, batch_size=16, samples=3, neighbours=20, held_out=8)


def in_this_process(
    worker: type, arguments: Mapping[str, Any], items: Sequence[int], pool: Any, **_: Any
) -> Iterator[dict[str, Any]]:
    """Run the pool's work without actors, because only the order of reads and writes matters here."""
    made = worker(**arguments)
    yield from (made.work(item) for item in items)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return small.workspace(tmp_path_factory.mktemp("small"))


class Hook:
    """Calls `action` at the `at`-th use of any folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.action = 0, -1, lambda: None
        for name in ("read", "write", "remove", "sizes"):
            monkeypatch.setattr(Folder, name, self._watched(getattr(Folder, name)))

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                self.action()
            return original(*arguments)

        return call


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Hook:
    monkeypatch.setattr(evaluate, "run_pool", in_this_process)
    return Hook(monkeypatch)


def measure(place: Folder, models: Sequence[str], nfe: tuple[int, ...]) -> None:
    evaluate.measure(str(place), "digits", replace(CONFIG, nfe=nfe), dict.fromkeys(models, ("0",)))


def results(place: Folder, model: str) -> tuple[dict[str, Any], Any]:
    """Return rows by name, and straightness."""
    metrics = json.loads((place / f"evaluation/{model}").read("metrics.json"))
    rows = {f"{row['sampler']} {row['metric']}": row for row in metrics["rows"]}
    assert len(rows) == len(metrics["rows"]), "a row is there twice"
    assert {entry["label"] for entry in metrics["order"]} == {row["sampler"] for row in metrics["rows"]}
    return rows, metrics["straightness"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((("teacher",), (2,)), (("teacher",), (2,))),
        ((("teacher",), (2, 1)), (("teacher",), (3, 2))),
        ((("teacher",), (1,)), (("students/lmm",), (1,))),
    ],
    ids=["same", "other-rows", "other-model"],
)
def test_the_second_command_may_run_at_any_point_of_the_first(
    made: Folder, tmp_path: Path, hook: Hook, first: Any, second: Any
) -> None:
    alone = Folder(str(shutil.copytree(made.uri, tmp_path / "alone")))
    measure(alone, *first)
    uses, hook.count = hook.count, 0
    measure(alone, *second)
    models = {*first[0], *second[0]}
    expected = {model: results(alone, model) for model in models}
    for number in range(POINTS):
        place = Folder(str(shutil.copytree(made.uri, tmp_path / f"{number}")))
        hook.at, hook.action = 1 + number * uses // POINTS, lambda place=place: measure(place, *second)
        hook.count = 0
        measure(place, *first)
        assert hook.count > uses, "the second one did not run"
        for model in models:
            assert results(place, model) == expected[model], f"use {hook.at} of {uses}"
            folder = place / f"evaluation/{model}"
            assert not [name for name in folder.sizes() if name.startswith(TEMPORARY)]
            assert Stage(place, f"evaluation/{model}", folder.read_json(PLAN)).is_complete()
        assert not [name for name in (place / "evaluation/reference/probe").sizes() if name.startswith("part-")]
        measure(place, *first)  # nothing is left to do
        shutil.rmtree(place.uri)


def test_a_calibrated_teacher_is_measured_at_its_levels(made: Folder, tmp_path: Path, hook: Hook) -> None:
    place = Folder(str(shutil.copytree(made.uri, tmp_path / "ws")))
    calibrated = replace(CONFIG, solver="calibrated")
    with pytest.raises(BeelineError, match=r"teacher/solver.json is missing; make it with: python -m beeline.calibrate"):
        evaluate.measure(str(place), "digits", calibrated, {"teacher": ("0",)})
    weights = digest_of((place / "teacher").read("model.safetensors"))
    (place / "teacher").write_json("solver.json", {"levels": [80.0, 4.0, 0.5], "model_sha256": weights})
    evaluate.measure(str(place), "digits", calibrated, {"teacher": ("0",)})
    rows, _ = results(place, "teacher")
    assert rows["calibrated 3 fd_probe_32"]["nfe"] == 3
