"""User errors give one message, without a traceback and with a non-zero exit status."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from harness import ADVERSARIAL, LINES, TINY_PAIRS, Run

COMMANDS = [
    "pipeline/ingest_images.py",
    "trainers/train_probe.py",
    "trainers/train_teacher.py",
    "pipeline/gen_pairs.py",
    "trainers/train_lmm.py",
    "trainers/sweep_lmm.py",
    "evaluation/evaluate.py",
    "evaluation/report.py",
    "cluster/run_pipeline.py",
    "cluster/rehearse.py",
]


@pytest.mark.parametrize("script", COMMANDS)
def test_help_and_bad_options(script: str, run: Run) -> None:
    assert "--workspace" in run(script, "digits", "--help").stdout
    unknown = run(script, "digits", "--no-such-option", "1", ok=False)
    assert unknown.returncode == 2
    assert "no-such-option" in unknown.stderr + unknown.stdout
    assert "Traceback" not in unknown.stderr


def test_an_unknown_recipe_lists_the_known_ones(run: Run) -> None:
    done = run("pipeline/gen_pairs.py", "digit", ok=False)
    assert done.returncode == 2
    assert "recipe 'digit' is unknown" in done.stderr
    assert "one of: digits" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("script", "missing", "maker"),
    [
        ("trainers/train_probe.py", "images", "pipeline/ingest_images.py"),
        ("trainers/train_teacher.py", "images", "pipeline/ingest_images.py"),
        ("pipeline/gen_pairs.py", "teacher", "trainers/train_teacher.py"),
        ("trainers/train_lmm.py", "pairs", "pipeline/gen_pairs.py"),
        ("trainers/sweep_lmm.py", "pairs", "pipeline/gen_pairs.py"),
        ("evaluation/evaluate.py", "images", "pipeline/ingest_images.py"),
        ("evaluation/report.py", "evaluation/teacher", "evaluation/evaluate.py"),
    ],
)
def test_a_missing_input_names_the_command_that_makes_it(
    script: str, missing: str, maker: str, run: Run, tmp_path: Path
) -> None:
    done = run(script, "digits", "--workspace", tmp_path / "empty", ok=False)
    assert done.returncode == 1
    assert f"{tmp_path}/empty/{missing}" in done.stderr
    assert f"make it with: python {maker} digits --workspace {tmp_path}/empty" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "empty").exists()


def test_an_unwritable_workspace(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run("pipeline/ingest_images.py", "digits", "--workspace", tmp_path / "file" / "ws", ok=False)
    assert done.stderr.startswith("error: ")
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_stage_says_so_and_a_changed_setting_is_refused(run: Run, trained: Path) -> None:
    done = run("pipeline/gen_pairs.py", "digits", "--workspace", trained, *TINY_PAIRS)
    assert done.stdout.startswith("pairs: already complete")
    # how the work is spread is not part of what is made
    run("pipeline/gen_pairs.py", "digits", "--workspace", trained, *TINY_PAIRS, "--pairs.max-actors", "7")
    refused = run("pipeline/gen_pairs.py", "digits", "--workspace", trained, *TINY_PAIRS, "--pairs.seed", "9", ok=False)
    assert "pairs.seed: 0 there, 9 asked for" in refused.stderr
    assert "Nothing was changed" in refused.stderr
    reseeded = run("pipeline/gen_pairs.py", "digits", "--workspace", trained, *TINY_PAIRS, "--seed", "9", ok=False)
    assert "pairs.seed: 0 there, 9 asked for" in reseeded.stderr


def test_settings_that_contradict_each_other(run: Run, trained: Path, tmp_path: Path) -> None:
    place = ("digits", "--workspace", trained)
    line = run("trainers/train_lmm.py", *place, "--student.name", "x", f"{LINES}.objective.line", "ve", ok=False)
    assert line.stderr.startswith("error: LinesMatchingConfig.rule is 'line'; expected a rule that follows the line 've'")
    steps = run("trainers/train_lmm.py", *place, "--student.name", "x", f"{ADVERSARIAL}.objective.steps", "8", "0", ok=False)
    assert steps.stderr.startswith(f"error: {ADVERSARIAL}.objective.steps is (8, 0); expected increasing indices from 0")
    batch = run("trainers/train_lmm.py", *place, "--student.name", "odd", "--student.batch-size", "33", ok=False)
    assert "batch size 33 does not divide among 2 workers" in batch.stderr
    workspace = tmp_path / "ws"
    shutil.copytree(trained / "images", workspace / "images")
    network = ("--teacher.network.img-resolution", "16")
    shape = run("trainers/train_teacher.py", "digits", "--workspace", workspace, *network, ok=False)
    assert "1 channels at 8 pixels; teacher.network takes 1 at 16" in shape.stderr
    labels = run("trainers/train_teacher.py", "digits", "--workspace", workspace, "--teacher.network.label-dim", "5", ok=False)
    assert "10 classes; teacher.network.label_dim is 5" in labels.stderr
