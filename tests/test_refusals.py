"""Invalid settings: each command refuses them in one line that names the option, before anything is written."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from harness import ADVERSARIAL, FRECHET, LINES, ROOT, Run

from beeline.errors import BeelineError
from pipeline.command import run_command
from pipeline.room import check_room
from pipeline.runtime import RECIPE

INGEST = ("pipeline.ingest_images", "ingest_images")
PROBE = ("trainers.train_probe", "train_probes")
TEACHER = ("trainers.train_teacher", "train_teacher")
PAIRS = ("pipeline.gen_pairs", "gen_pairs")
VERIFY = ("pipeline.verify_pairs", "verify_pairs")
LMM = ("trainers.train_lmm", "train_lmm")
SWEEP = ("trainers.sweep_lmm", "sweep_lmm")
EVALUATE = ("evaluation.evaluate", "evaluate")
REPORT = ("evaluation.report", "report")
PIPELINE = ("cluster.run_pipeline", "run_pipeline")
ESTIMATE = ("cluster.estimate", "estimate")

# Options of a command, and how its message goes on after "error: ".
REFUSED: list[tuple[tuple[str, str], str, str]] = [
    (INGEST, "--images.shard-size -5", "--images.shard-size is -5; expected a whole number from 1"),
    (INGEST, "--images.shard-size 0", "--images.shard-size is 0;"),
    (INGEST, "--images.resolution 0", "--images.resolution is 0;"),
    (INGEST, "--images.channels 4", "--images.channels is 4; expected a whole number that is 1 or 3"),
    (INGEST, "--images.max-actors 0", "--images.max-actors is 0;"),
    (INGEST, "--images.min-actors 5", "ImagesConfig.max_actors is 2; expected at least min_actors, 5"),
    (INGEST, "--images.cpus nan", "--images.cpus is nan; expected a number from 0"),
    (INGEST, "--images.gpus 1.5", "--images.gpus is 1.5; expected a number from 0 to 1,024 whole or at most 1"),
    (INGEST, "--images.threads 0", "--images.threads is 0;"),
    (PROBE, "--probe.iterations 0", "--probe.iterations is 0;"),
    (PROBE, "--probe.batch-size 0", "--probe.batch-size is 0;"),
    (PROBE, "--probe.lr inf", "--probe.lr is inf;"),
    (PROBE, "--probe.min-accuracy nan", "--probe.min-accuracy is nan;"),
    (PROBE, "--probe.losses.widths", "--probe.losses.widths is (); expected values, each"),
    (PROBE, "--probe.losses.widths 30 64 64 64", "--probe.losses.widths is (30, 64, 64, 64); expected multiples of 4"),
    (PROBE, "--probe.measure.strides 1", "--probe.measure.strides is (1,); expected one for each of the widths"),
    (PROBE, "--probe.losses.seed 18446744073709551616", "--probe.losses.seed is 18446744073709551616;"),
    (TEACHER, "--teacher.iterations -5", "--teacher.iterations is -5;"),
    (TEACHER, "--teacher.ema-half-life nan", "--teacher.ema-half-life is nan;"),
    (TEACHER, "--teacher.optimizer.lr inf", "--teacher.optimizer.lr is inf;"),
    (TEACHER, "--teacher.optimizer.betas 0.9 1", "--teacher.optimizer.betas is (0.9, 1.0);"),
    (TEACHER, "--teacher.optimizer.warmup -1", "--teacher.optimizer.warmup is -1;"),
    (TEACHER, "--teacher.network.model-channels 3", "--teacher.network.model-channels is 3;"),
    (TEACHER, "--teacher.network.model-channels 36", "teacher.network cannot be built:"),
    (TEACHER, "--teacher.network.channel-mult", "--teacher.network.channel-mult is ();"),
    (TEACHER, "--teacher.network.num-blocks 100000", "--teacher.network.num-blocks is 100000;"),
    (TEACHER, "--teacher.network.label-dim 100000000", "--teacher.network.label-dim is 100000000;"),
    (TEACHER, "--teacher.network.dropout 1", "--teacher.network.dropout is 1.0;"),
    (TEACHER, "--teacher.network.img-resolution 0", "--teacher.network.img-resolution is 0;"),
    (
        TEACHER,
        "--teacher.network.img-resolution 28 --teacher.network.channel-mult 1 2 2 2",
        "--teacher.network.img-resolution is 28; expected a multiple of 8",
    ),
    (TEACHER, "--teacher.network.channel-mult 64 64 --teacher.network.model-channels 8192", "teacher.network would have"),
    (TEACHER, "--teacher.log-every 0", "--teacher.log-every is 0;"),
    (TEACHER, "--teacher.checkpoint-every 0", "--teacher.checkpoint-every is 0;"),
    (TEACHER, "--teacher.accumulate 0", "--teacher.accumulate is 0;"),
    (TEACHER, "--teacher.keep 0", "--teacher.keep is 0;"),
    (TEACHER, "--teacher.batch-size 0", "--teacher.batch-size is 0;"),
    (TEACHER, "--teacher.workers.count 0", "--teacher.workers.count is 0;"),
    (TEACHER, "--teacher.workers.min-count 9", "--teacher.workers.min-count is 9; expected at most count, 2"),
    (TEACHER, "--teacher.workers.max-failures -2", "--teacher.workers.max-failures is -2;"),
    (PAIRS, "--pairs.shard-size -5", "--pairs.shard-size is -5;"),
    (PAIRS, "--pairs.count 0", "--pairs.count is 0;"),
    (PAIRS, "--pairs.count=-1", "--pairs.count is -1;"),
    (PAIRS, "--pairs.count 1000000000000000", "--pairs.count is 1000000000000000; expected a whole number from 1 to"),
    (PAIRS, "--pairs.count 1000000000", "--pairs.count is 1000000000; expected at most 50,000,000, which is 100,000 shards"),
    (PAIRS, "--pairs.num-steps 0", "--pairs.num-steps is 0;"),
    (PAIRS, "--pairs.batch_size 0", "--pairs.batch_size is 0;"),
    (PAIRS, "--pairs.seed -1", "--pairs.seed is -1;"),
    (PAIRS, "--pairs.seed 18446744073709551616", "--pairs.seed is 18446744073709551616;"),
    (PAIRS, "--pairs.price nan", "--pairs.price is nan;"),
    (PAIRS, "--pairs.max-actors 1", "--pairs.max-actors is 1; expected at least min_actors, 2"),
    (PAIRS, "--seed 18446744073709551616", "--seed is '18446744073709551616'; expected a whole number from 0 to"),
    (PAIRS, "--seed ²", "--seed is '²';"),
    (PAIRS, "--seed -1", "--seed is '-1';"),
    (PAIRS, "--seed 1.5", "--seed is '1.5';"),
    (VERIFY, "--verify.remake -1", "--verify.remake is -1;"),
    (VERIFY, "--verify.shown 1000000000", "--verify.shown is 1000000000;"),
    (LMM, "--student.name ../../x", "--student.name is '../../x'; expected text of letters, digits"),
    (LMM, "--student.name=", "--student.name is '';"),
    (LMM, "--student.name .", "--student.name is '.';"),
    (LMM, "--student.name ..", "--student.name is '..';"),
    (LMM, "--student.name a/b", "--student.name is 'a/b';"),
    (LMM, "--student.name=-x", "--student.name is '-x';"),
    (LMM, "--student.name é", "--student.name is 'é';"),
    (LMM, f"--student.name {'x' * 300}", "--student.name is 'xxx"),
    (LMM, "--student.init ../teacher", "--student.init is '../teacher'; expected text naming a folder"),
    (LMM, "--student.init /etc", "--student.init is '/etc';"),
    (LMM, f"{ADVERSARIAL}.objective.num-steps 0", f"{ADVERSARIAL}.objective.num-steps is 0;"),
    (LMM, f"{LINES}.iterations -5", f"{LINES}.iterations is -5;"),
    (LMM, f"{ADVERSARIAL}.iterations -5 {LINES}.iterations 5", f"{ADVERSARIAL}.iterations is -5;"),
    (LMM, f"{ADVERSARIAL}.objective.adversarial-weight nan", f"{ADVERSARIAL}.objective.adversarial-weight is nan;"),
    (LMM, f"{LINES}.objective.pixel-weight inf", f"{LINES}.objective.pixel-weight is inf;"),
    (LMM, "--student.ema-half-lives 50 nan", "--student.ema-half-lives is (50.0, nan);"),
    (LMM, "--student.ema-half-lives", "--student.ema-half-lives is ();"),
    (LMM, "--student.ema-half-lives 50 50", "--student.ema-half-lives is (50.0, 50.0); expected values that differ"),
    (LMM, f"{ADVERSARIAL}.objective.steps 0 18", f"{ADVERSARIAL}.objective.steps is (0, 18); expected indices below num_steps"),
    (LMM, f"{LINES}.objective.rule same_noise", f"{LINES}.objective.rule is 'same_noise'; expected a rule that follows"),
    (LMM, f"{LINES}.objective.line ve", "LinesMatchingConfig.rule is 'line'; expected a rule that follows the line 've'"),
    (
        LMM,
        f"{LINES}.objective.distance lpips {LINES}.objective.resize 15",
        f"{LINES}.objective.resize is 15; expected 16 or more, for VGG16",
    ),
    (LMM, "--student other", "--student is 'other'; this recipe has lmm, l2, sot"),
    (LMM, "--student l2 --student.phases.reconstruction.iterations 0", "student 'l2' needs at least one phase"),
    (
        LMM,
        f"--student.phase-switch continue {ADVERSARIAL}.optimizer.kind radam",
        "the phases use the optimisers adam and radam, and phase_switch is 'continue'",
    ),
    (LMM, f"{ADVERSARIAL}.objective.steps", f"{ADVERSARIAL}.objective.steps is ();"),
    (LMM, f"{ADVERSARIAL}.objective.discriminator.resize 100", f"{ADVERSARIAL}.objective.discriminator.resize is 100;"),
    (LMM, f"{ADVERSARIAL}.objective.discriminator.networks", f"{ADVERSARIAL}.objective.discriminator.networks is ();"),
    (LMM, "--student.accumulate 0", "--student.accumulate is 0;"),
    (LMM, "--student.validate-every -1", "--student.validate-every is -1;"),
    (LMM, "--student.validate-count 0", "--student.validate-count is 0;"),
    (LMM, f"{LINES}.iterations 0 {ADVERSARIAL}.iterations 0 {FRECHET}.iterations 0", "student 'lmm' needs at least one phase"),
    (LMM, "--student.batch-size 33", "batch size 33 does not divide among"),
    (SWEEP, "--sweep.name ../x", "--sweep.name is '../x';"),
    (SWEEP, "--sweep.promote a/b", "--sweep.promote is 'a/b';"),
    (SWEEP, "--sweep.promote best --sweep.promote-nfe 9", "--sweep.promote-nfe is 9;"),
    (SWEEP, "--sweep.trials 1000000000000000", "--sweep.trials is 1000000000000000;"),
    (SWEEP, "--sweep.trials 0", "--sweep.trials is 0;"),
    (SWEEP, "--sweep.schedules 8,0", "--sweep.schedules is ('8,0',); expected values, each text with increasing"),
    (SWEEP, "--sweep.schedules", "--sweep.schedules is ();"),
    (SWEEP, "--sweep.schedules 0,0.821", "--sweep.schedules is ('0,0.821',); expected values, each text with increasing"),
    (SWEEP, "--sweep.schedules 0,18", "--sweep.schedules is ('0,18',); expected indices below the objective's num_steps, 18"),
    (SWEEP, "--student kd", "the phases of 'kd' are end points alone"),
    (SWEEP, "--sweep.learning-rates 0 1", "--sweep.learning-rates is (0.0, 1.0);"),
    (SWEEP, "--sweep.learning-rates nan nan", "--sweep.learning-rates is (nan, nan);"),
    (SWEEP, "--sweep.adversarial-weights", "--sweep.adversarial-weights is ();"),
    (SWEEP, "--sweep.rungs 0", "--sweep.rungs is 0;"),
    (SWEEP, "--sweep.gpus -1", "--sweep.gpus is -1"),
    (EVALUATE, "--model ../x", "--model is ('../x',);"),
    (EVALUATE, "--model students/../../x", "--model is ('students/../../x',);"),
    (EVALUATE, "--model /etc", "--model is ('/etc',);"),
    (EVALUATE, "--model", "--model is ();"),
    (EVALUATE, "--steps", "--steps is (); expected values"),
    (EVALUATE, "--steps=", "--steps is ('',);"),
    (EVALUATE, "--steps 1", "--steps is ('1',);"),
    (EVALUATE, "--steps 0,0.0", "--steps is ('0,0.0',); expected values, each text with increasing indices"),
    (EVALUATE, "--steps 0 0,0.5,2.0", "--steps is ('0', '0,0.5,2.0');"),
    (EVALUATE, "--steps 0,1e-3", "--steps is ('0,1e-3',);"),
    (EVALUATE, "--rule=gamma\u00a02", "--rule is 'gamma\\xa02'; expected 'trained' or text that is same_noise"),
    (EVALUATE, "--rule gamma", "--rule is 'gamma';"),
    (EVALUATE, "--rule other", "--rule is 'other'; expected 'trained' or text that is same_noise"),
    (EVALUATE, "--nfe 0", "--nfe is (0,);"),
    (EVALUATE, "--draws 0", "--draws is 0;"),
    (EVALUATE, "--count -1", "--count is -1;"),
    (EVALUATE, "--count 1000000000000000", "--count is 1000000000000000;"),
    (EVALUATE, "--shard-size 0", "--shard-size is 0;"),
    (EVALUATE, "--batch-size 0", "--batch-size is 0;"),
    (EVALUATE, "--samples 0", "--samples is 0;"),
    (EVALUATE, "--neighbours 0", "--neighbours is 0;"),
    (EVALUATE, "--seed 99999999999999999999999", "--seed is '99999999999999999999999';"),
    (REPORT, "--seed x", "--seed is 'x';"),
    (PIPELINE, "--images.resolution 16", "images has 1 channels at 16 pixels, but teacher.network has 1 at 8. Make"),
    (PIPELINE, "--students.l2.name other", "--students.l2.name is 'other'; expected 'l2'"),
    (PIPELINE, "--students.l2.phases.reconstruction.iterations -1", "--students.l2.phases.reconstruction.iterations is -1;"),
    (PIPELINE, "--few-steps 0,99", "the last step in few_steps is 99; expected a whole number from 0 to 17"),
    (PIPELINE, "--few-steps 0,0.5,8", "few_steps of students/lmm/reconstruction: steps are (0, 0.5, 8); their noise"),
    (PIPELINE, "--students.l2.dropout 1", "--students.l2.dropout is 1.0;"),
    (PIPELINE, "--students.l2.phases.reconstruction.objective.distance lpips", "the distance 'lpips' would run at 8 pixels"),
    (ESTIMATE, "--price nan", "--price is nan;"),
    (ESTIMATE, "--utilisation nan", "--utilisation is nan;"),
    (ESTIMATE, "--utilisation 0", "--utilisation is 0.0; expected a number above 0"),
    (ESTIMATE, "--gpus -5", "--gpus is -5;"),
    (ESTIMATE, "--cores -1", "--cores is -1;"),
    (ESTIMATE, "--pairs.count 0", "--pairs.count is 0;"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "options", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_it_is_refused_in_one_line_before_anything_is_written(
    command: tuple[str, str],
    options: str,
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, stage = command
    recipe = "digits_methods" if "--student kd" in options else "digits"
    words = [recipe, "--workspace", str(tmp_path / "ws"), *options.split(" ")]
    monkeypatch.setenv(RECIPE, "")  # commands set it
    monkeypatch.setattr(sys, "argv", [f"{module.replace('.', '/')}.py", *words])
    with pytest.raises(SystemExit) as ended:
        run_command(getattr(importlib.import_module(module), stage))
    captured = capfd.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert (ended.value.code, captured.err.count("\n"), captured.out) == (1, 1, "")
    assert not list(tmp_path.iterdir())


def test_the_right_command_follows_a_wrong_one(run: Run, tmp_path: Path) -> None:
    command = ("pipeline/ingest_images.py", "digits", "--workspace", tmp_path / "ws")
    wrong = run(*command, "--images.shard-size", "-5", ok=False)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert wrong.stderr.startswith("error: --images.shard-size is -5; expected a whole number from 1")
    assert not (tmp_path / "ws").exists()
    run(*command)
    weak = ("trainers/train_probe.py", "digits", "--workspace", tmp_path / "ws", "--probe.iterations", "20")
    failed = run(*weak, "--probe.lr", "1e30", "--probe.min-accuracy", "0", ok=False)
    assert "error: the model is not published" in failed.stderr
    assert not (tmp_path / "ws/probe/plan.json").exists()
    run(*weak, "--probe.min-accuracy", "0")


def test_more_than_this_machine_has_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    check_room("pairs", 8, cpus=0.5, gpus=0)
    for processes, cpus, gpus, found in (
        (9, 0.5, 0.0, "9 x 0.5 CPU at once, but Ray on this machine has 4"),
        (1, 1.0, 0.5, "1 x 0.5 GPU at once, but Ray on this machine has 0"),
    ):
        with pytest.raises(BeelineError, match=f"pairs asks for {found}"):
            check_room("pairs", processes, cpus=cpus, gpus=gpus)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    check_room("pairs", 99, cpus=9, gpus=9)


def test_commands_without_a_recipe(trained: Path) -> None:
    for command in (["-m", "beeline.calibrate", str(trained / "teacher")], ["evaluation/toy2d.py"]):
        done = subprocess.run(
            [sys.executable, *command, "--seed", "-1"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith("error: --seed is -1; expected a whole number from 0 to 9,223,372,036,854,775,807")
    assert not (trained / "teacher/solver.json").exists()
