"""A sweep: trials differ as recorded, kills lose no finished trial, stopped trials leave nothing, the best is promoted."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from harness import ADVERSARIAL, LINES, ROOT, TINY_LMM, Head, Run, wait_for
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import TrialScheduler

import beeline
from beeline.config import SweepConfig
from beeline.metrics.measures import VALIDATION
from evaluation.sweep_table import pareto
from trainers.trials import PerSchedule, rung_of, settings

SMALL = [
    "--sweep.trials", "8", "--sweep.iterations", "16", "--sweep.rungs", "3", "--sweep.learning-rates", "1e-6", "3e-3",
    "--sweep.adversarial-weights", "0", "0.3", "--sweep.ema-half-lives", "2", "5", "--sweep.schedules", "0", "0,3",
    "--sweep.init", "students/lmm", "--evaluate.count", "100", "--evaluate.draws", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def workspace(run: Run, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(trained, tmp_path_factory.mktemp("sweep") / "ws"))
    student = (*TINY_LMM, f"{LINES}.iterations", "10", f"{ADVERSARIAL}.iterations", "0")
    run("trainers/train_lmm.py", "digits", "--workspace", copy, *student, "--student.workers.count", "1")
    return copy


def test_a_killed_sweep_goes_on_and_leaves_nothing_behind(run: Run, head: Head, workspace: Path) -> None:
    command = ["trainers/sweep_lmm.py", "digits", "--workspace", str(workspace), *TINY_LMM, *SMALL]
    folder = workspace / "sweeps/sot"
    driver = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=head.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(list(folder.glob("trial-*.json"))) >= 2, 240, "two trials to end")
    driver.kill()
    driver.wait()
    wait_for(lambda: not head.workers("Trial("), 60, "the trials' actors to end")
    ended = {path: path.read_bytes() for path in folder.glob("trial-*.json")}
    models = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/model.safetensors")}
    done = run(*command)
    assert f"sweep: {len(ended)} of 8 trials are complete" in done.stdout
    assert {path: path.read_bytes() for path in ended} == ended
    assert {path: path.stat().st_mtime_ns for path in models} == models
    rows = trials(workspace)
    assert [row["trial"] for row in rows] == list(range(8))
    assert {row["steps"] for row in rows} == {"0", "0,3"}
    finished, stopped = ([row for row in rows if row["stopped"] == state] for state in (False, True))
    assert finished
    assert stopped
    assert {row["metric"] for row in finished} == {"fd_probe_losses_100"}
    assert len({row["distance"] for row in finished}) == len(finished)
    assert all(row["distance"] is None for row in stopped)
    assert not list(folder.glob("trials/*/checkpoints/*/index.json"))
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert head.left_over() == ([], [])


def trials(workspace: Path) -> list[dict[str, Any]]:
    return pq.read_table(workspace / "sweeps/sot/trials.parquet").to_pylist()


def test_what_is_tried_reaches_the_workers(workspace: Path) -> None:
    """Checked by what each student records of its training, and by its weights."""
    folder, weights = workspace / "sweeps/sot", []
    for row in trials(workspace):
        if row["stopped"]:
            continue
        model = beeline.load(folder / f"trials/{row['trial']:04d}")
        trained = json.loads((folder / f"trials/{row['trial']:04d}/config.json").read_text())["about"]["trained"]
        (phase,) = trained["phases"].values()
        assert phase["optimizer"]["lr"] == row["lr"]
        assert phase["objective"]["discriminator"]["optimizer"]["lr"] == row["critic_lr"]
        assert phase["objective"]["adversarial_weight"] == row["adversarial_weight"]
        assert trained["ema_half_lives"] == [row["ema_half_life"]]
        assert model.few_step is not None
        assert model.few_step.trained_steps == tuple(map(int, row["steps"].split(",")))
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
        log = [json.loads(line) for line in (folder / f"trials/{row['trial']:04d}/train.jsonl").read_text().splitlines()]
        assert ("critic" in str(log[-1].keys())) == (row["adversarial_weight"] > 0)
        assert log[-1]["step"] == 16
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_the_best_is_promoted_and_more_trials_are_added(run: Run, workspace: Path) -> None:
    command = ("trainers/sweep_lmm.py", "digits", "--workspace", workspace, *TINY_LMM, *SMALL)
    before = trials(workspace)
    assert "already complete" in run(*command).stdout
    done = run(*command, "--sweep.trials", "9", "--sweep.promote", "tuned", "--sweep.promote-nfe", "2")
    assert "sweep: 8 of 9 trials are complete" in done.stdout
    rows = trials(workspace)
    assert rows[:8] == before
    best = min((row for row in rows if row["nfe"] == 2 and not row["stopped"]), key=lambda row: row["distance"])
    promoted = (workspace / "students/tuned/model.safetensors").read_bytes()
    assert promoted == (workspace / f"sweeps/sot/trials/{best['trial']:04d}/model.safetensors").read_bytes()
    assert json.loads((workspace / "students/tuned/plan.json").read_text())["promoted"]["trial"] == best["trial"]
    none = run(*command, "--sweep.promote", "other", "--sweep.promote-nfe", "7", ok=False)
    assert "--sweep.promote-nfe is 7; expected the steps of one of the schedules" in none.stderr
    wrong = run(*command, "--sweep.learning-rates", "1e-3", "1e-4", ok=False)
    assert "--sweep.learning-rates is (0.001, 0.0001); expected the lower bound, then the upper bound" in wrong.stderr


@given(st.integers(0, 99), st.integers(0, 9))
def test_settings_depend_on_the_trial_alone_and_stay_within_bounds(number: int, seed: int) -> None:
    sweep = SweepConfig(schedules=("0", "0,1", "0,3,5"), adversarial_weights=(0.5, 1.0), ema_half_lives=(10.0, 20.0))
    found = settings(number, sweep, seed)
    assert found == settings(number, SweepConfig(**{**sweep.__dict__, "trials": 50}), seed)
    assert found["steps"] == sweep.schedules[number % 3]
    assert found["nfe"] == (1, 2, 3)[number % 3]
    assert 1e-4 <= found["lr"] <= 1e-3
    assert 5e-4 <= found["critic_lr"] <= 5e-3
    assert found["adversarial_weight"] in (0.5, 1.0)
    assert found["ema_half_life"] in (10.0, 20.0)


def test_learning_rates_are_spread_over_the_logarithm() -> None:
    sweep = SweepConfig(learning_rates=(1e-6, 1e-2))
    logs = [math.log10(settings(number, sweep, 0)["lr"]) for number in range(400)]
    assert all(abs(sum(low <= x < low + 1 for x in logs) - 100) < 35 for low in (-6, -5, -4, -3))


def scheduler(rungs: dict[int, list[dict[str, Any]]]) -> PerSchedule:
    sweep = SweepConfig(iterations=8, rungs=3, schedules=("0", "0,1"))
    assert rung_of(sweep) == 2
    return PerSchedule(sweep, {number: settings(number, sweep, 0) for number in range(20)}, rungs)


def decide(asha: PerSchedule, number: int, distance: float) -> str:
    """Return ASHA's decision for trial `number` at its first rung."""
    controller: Any = None
    trial: Any = SimpleNamespace(trial_id=f"trial-{number}", config={"trial": number})
    asha.on_trial_add(controller, trial)
    return asha.on_trial_result(controller, trial, {"step": 2, VALIDATION: distance})


def test_asha_compares_trials_of_one_schedule_and_remembers_earlier_runs() -> None:
    fresh = scheduler({})
    assert decide(fresh, 0, 1.0) == TrialScheduler.CONTINUE
    assert decide(fresh, 2, 2.0) == TrialScheduler.STOP  # worse than trial 0
    assert decide(fresh, 1, 9.0) == TrialScheduler.CONTINUE  # the first of the other schedule
    assert decide(fresh, 6, math.nan) == TrialScheduler.STOP
    assert decide(fresh, 8, math.inf) == TrialScheduler.STOP
    assert decide(fresh, 10, 0.9) == TrialScheduler.CONTINUE
    again = scheduler({0: [{"step": 2, VALIDATION: 1.0}, {"step": 4, VALIDATION: math.nan}]})
    assert decide(again, 2, 2.0) == TrialScheduler.STOP  # as if the run had not been interrupted
    assert decide(again, 4, 0.5) == TrialScheduler.CONTINUE


def test_the_front_is_what_no_other_beats_with_as_few_evaluations() -> None:
    found = [(1, 0.5), (1, 0.4), (2, 0.6), (2, 0.3), (3, 0.3), (4, 0.1)]
    rows = [{"nfe": nfe, "distance": distance, "stopped": False} for nfe, distance in found]
    rows.append({"nfe": 1, "distance": None, "stopped": True})
    rows = [{"nfe": 1, "distance": math.nan, "stopped": False}, *rows]
    assert [(row["nfe"], row["distance"]) for row in pareto(rows)] == [(1, 0.4), (2, 0.3), (4, 0.1)]
