"""The dashboard queries only series that exist, and Ray's own dashboard shows meaningful names."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import TINY_LMM, TINY_PAIRS, Head, Run
from ray.dashboard.consts import GPU_TAG_KEYS
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ray.util.state import list_actors, list_tasks

from cluster.grafana.dashboard import FILE, dashboard

# Ray writes these for machines with a GPU alone. That it would is checked against Ray's own tables.
OF_GPUS = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_gram_available"}
STUDENT = (*TINY_LMM, "--student.workers.count", "1", "--student.validate-every", "40", "--student.validate-count", "100")
SWEEP = (
    *STUDENT, "--sweep.trials", "1", "--sweep.iterations", "4", "--sweep.rungs", "1", "--sweep.schedules", "0",
    "--evaluate.count", "100", "--evaluate.draws", "1",
)  # fmt: skip
Series = dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def seen(head: Head, run: Run, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Series:
    """Collect the labels of every series, by name, that the endpoint has at any time while pairs are made, a student is trained
    and swept, and its trials are measured. It is scraped every second, because gauges end soon after their processes."""
    workspace = tmp_path_factory.mktemp("watched") / "ws"
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("pairs"))
    found: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
    over = threading.Event()

    def scrape() -> None:
        last = False
        while not last:
            last = over.wait(1.0)
            found.update((name, tuple(labels.items())) for name, labels, _ in head.series())

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        place = ("digits", "--workspace", workspace)
        run("pipeline/gen_pairs.py", *place, *TINY_PAIRS, "--pairs.price", "2")
        run("trainers/train_lmm.py", *place, *STUDENT)
        run("trainers/sweep_lmm.py", *place, *SWEEP)
    finally:
        over.set()
        scraper.join()
    series: Series = {}
    for name, labels in found:
        series.setdefault(name, []).append(dict(labels))
    return series


def test_the_dashboard_is_what_its_script_makes() -> None:
    assert json.loads(FILE.read_text()) == dashboard(), "run python cluster/grafana/dashboard.py"
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [(x, y) for panel in panels for x in _span(panel, "x", "w") for y in _span(panel, "y", "h")]
    assert len(cells) == len(set(cells)), "panels overlap"
    (provider,) = yaml.safe_load((FILE.parent / "provisioning/dashboards/beeline.yaml").read_text())["providers"]
    assert provider["name"] != "Ray"
    assert provider["options"]["path"] == "$BEELINE_GRAFANA"


def test_every_series_that_the_dashboard_asks_for_is_there(seen: Series) -> None:
    asked = list(_asked())
    assert {name for name, *_ in asked} >= OF_GPUS, "a series that is excepted is not asked for"
    for name, matchers, labels, where in asked:
        if name in OF_GPUS and name not in seen:
            assert name.removeprefix("ray_") in METRICS_GAUGES, where
            assert labels | {label for label, *_ in matchers} <= set(GPU_TAG_KEYS), where
            continue
        fits = [series for series in seen.get(name, []) if all(_fits(series, *matcher) for matcher in matchers)]
        assert fits, f"{where}: no {name} with {matchers}; there are {seen.get(name)}"
        assert any(all(series.get(label) for label in labels) for series in fits), f"{where}: {labels} of {fits}"


def test_runs_are_told_apart(seen: Series) -> None:
    figures = {(labels["model"], labels["figure"]) for labels in seen["ray_beeline_training_figure"]}
    expected = {"lines", "adversarial", "lambda", "critic", "grad_norm", "critic_grad_norm", "fd_probe_losses"}
    assert figures >= {("students/lmm", figure) for figure in expected}
    judged = {(labels["model"], labels["sampler"]) for labels in seen["ray_beeline_evaluation_figure"]}
    assert ("sweeps/sot/trials/0000", "0") in judged
    assert {labels["state"] for labels in seen["ray_beeline_sweep_trials"]} == {"left", "stopped", "finished"}


def test_rays_dashboard_shows_names_that_say_what_runs(head: Head, seen: Series) -> None:
    assert {labels["ray_train_run_name"] for labels in seen["ray_train_controller_state"]} >= {"students-lmm"}
    listed: dict[str, Any] = {"limit": 10_000, "timeout": 60, "raise_on_missing_output": False}
    there: list[Any] = list_actors(head.dashboard, **listed)
    actors = {actor.class_name for actor in there}
    assert actors >= {f"MapWorker(MapBatches({name}))" for name in ("images", "pairs", "evaluation", "evaluation, figures")}
    assert "Trial(sot)" in actors
    there = list_tasks(head.dashboard, filters=[("type", "=", "NORMAL_TASK")], **listed)
    tasks = {task.name for task in there}
    assert tasks >= {"probe/losses", "probe/measure"}
    unreadable = re.compile(r"_Shell|ImplicitFunc|ResourceTrainable|\b_train\b")
    assert not [name for name in actors | tasks if unreadable.search(name)]


def _span(panel: dict[str, Any], at: str, size: str) -> range:
    place = panel["gridPos"]
    return range(place[at], place[at] + place[size])


def _asked() -> Iterator[tuple[str, list[tuple[str, str, str]], set[str], str]]:
    """List for each selector of each query: the series, its matchers, the labels it must have, and its owner."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            expr = target["expr"]
            kept = {label.strip() for found in re.findall(r"by \((.*?)\)", expr) for label in found.split(",")}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, panel["title"]
            selectors = re.findall(r"(ray_\w+)(?:{(.*?)})?", expr)
            assert selectors, panel["title"]
            for name, matchers in selectors:
                yield name, re.findall(r'(\w+)(=~|!~|!=|=)"(.*?)"', matchers), kept, panel["title"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore
            yield name, [], {label}, f"${variable['name']}"


def _fits(labels: dict[str, str], label: str, how: str, wanted: str) -> bool:
    """Match as Prometheus does; a variable matches anything."""
    wanted, value = re.sub(r"\$\w+", ".*", wanted), labels.get(label, "")
    same = bool(re.fullmatch(wanted, value)) if "~" in how else wanted == value
    return same != how.startswith("!")
