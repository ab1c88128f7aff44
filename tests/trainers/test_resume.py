"""A killed rank or driver changes nothing: the weights equal those of an undisturbed run, bit for bit."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

from harness import LINES, ROOT, TINY_LMM, TINY_TEACHER, TWO_RANKS, Head, Run, files, wait_for

from pipeline.storage import Folder
from trainers.log import read_log


def kill_a_rank_after(head: Head, command: list[str], folder: Path, checkpoints: list[int]) -> None:
    """Run the command; whenever a checkpoint of the list appears, SIGKILL one training process."""
    process = subprocess.Popen(command, cwd=ROOT, env=head.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for k, step in enumerate(checkpoints):
        wait_for(
            lambda s=step: (folder / "checkpoints" / f"step-{s:08d}" / "index.json").exists() or process.poll() is not None,
            240, f"checkpoint {step}",
        )  # fmt: skip
        ranks = head.workers("RayTrainWorker")
        assert ranks, "the run was over before it could be disturbed"
        ranks[k % len(ranks)].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()[-4000:]
    assert b"resumed at step" in output


def test_a_killed_rank_in_each_phase(head: Head, undisturbed: Path, trained: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace)
    command = [sys.executable, "trainers/train_lmm.py", "digits", "--workspace", str(workspace), *TINY_LMM, *TWO_RANKS]
    kill_a_rank_after(head, command, workspace / "students/lmm", [20, 60])
    for folder in ("students/lmm", "students/lmm/reconstruction"):
        assert files(workspace / folder, "model.safetensors") == files(undisturbed / folder, "model.safetensors")
    ours, theirs = (read_log(Folder(str(ws / "students/lmm"))) for ws in (workspace, undisturbed))
    assert [(row["step"], row["lines"], row["phase"]) for row in ours] == [
        (row["step"], row["lines"], row["phase"]) for row in theirs
    ]
    assert [row["step"] for row in ours] == list(range(5, 85, 5))
    assert {"lambda", "critic", "adversarial"} <= ours[-1].keys()


def test_a_killed_rank_in_a_part_of_a_set(head: Head, run: Run, trained: Path, tmp_path: Path) -> None:
    """The parts, and the model that joins them, have the bytes of an undisturbed run."""
    options = ["--student", "l2", "--student.subsets", "2", f"{LINES}.iterations", "40", "--student.batch-size", "16"]
    options += ["--student.checkpoint-every", "10", f"{LINES}.objective.num-steps", "6", *TWO_RANKS]
    for name in ("ours", "theirs"):
        shutil.copytree(trained, tmp_path / name)
    run("trainers/train_lmm.py", "digits", "--workspace", tmp_path / "theirs", *options)
    command = [sys.executable, "trainers/train_lmm.py", "digits", "--workspace", str(tmp_path / "ours"), *options]
    kill_a_rank_after(head, command, tmp_path / "ours/students/l2/1", [20])
    for folder in ("students/l2", "students/l2/0", "students/l2/1"):
        ours, theirs = (files(tmp_path / name / folder, "*.*") for name in ("ours", "theirs"))
        assert {"model.safetensors", "config.json", "plan.json"} <= ours.keys()
        for file in ("model.safetensors", "config.json", "plan.json"):
            assert ours[file] == theirs[file]


def test_a_killed_driver(head: Head, run: Run, trained: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("teacher"))
    arguments = ["digits", "--workspace", str(workspace), *TINY_TEACHER, "--teacher.workers.count", "1"]
    process = subprocess.Popen(
        [sys.executable, "trainers/train_teacher.py", *arguments], cwd=ROOT, env=head.environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: (workspace / "teacher/checkpoints/step-00000010").exists(), 240, "a checkpoint")
    process.kill()
    process.wait()
    assert not (workspace / "teacher/_SUCCESS").exists()
    wait_for(lambda: not head.workers("RayTrainWorker"), 60, "the ranks to end with their driver")
    run("trainers/train_teacher.py", *arguments)
    assert files(workspace / "teacher", "model.safetensors") == files(trained / "teacher", "model.safetensors")


def test_the_student_starts_from_the_teachers_weights(run: Run, trained: Path, tmp_path: Path) -> None:
    """One step with a tiny learning rate keeps the teacher's weights."""
    from safetensors.numpy import load

    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace)
    run(
        "trainers/train_lmm.py", "digits", "--workspace", workspace, "--student", "l2", f"{LINES}.iterations", "1",
        f"{LINES}.optimizer.lr", "1e-12", f"{LINES}.objective.num-steps", "6",
    )  # fmt: skip
    student, teacher = (load((workspace / name / "model.safetensors").read_bytes()) for name in ("students/l2", "teacher"))
    assert student.keys() == teacher.keys()
    assert all(abs(student[name] - teacher[name]).max() < 1e-6 for name in teacher)
