"""A rehearsal runs every stage of a published recipe with two ranks, leaves the workspace unchanged, and its speeds are
used."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray.exceptions
from colour import colour_zip
from harness import Run

import beeline
from beeline.checkpoint import build, dump
from beeline.config import Recipe, WorkersConfig
from beeline.errors import BeelineError
from beeline.recipes import RECIPES, cifar10
from cluster.planning.speeds import IMAGES, Work, speed
from cluster.planning.workspace import RECORD, REHEARSAL, Workspace
from cluster.rehearsal import substitutes
from cluster.rehearsal.outcome import LONGEST, Outcome, reason, text
from cluster.rehearsal.shrink import shrunk
from cluster.rehearse import all_steps, clear
from pipeline.model_folders import publish_model
from pipeline.storage import Folder

pytestmark = pytest.mark.timeout(1800)  # the rehearsal itself, on a slow machine
FEATURES = ("probe", "inception")  # the large DINOv2 would take minutes
NARROW = ("--teacher.network.model-channels", "32", "--evaluate.features", *FEATURES)
BACKBONES = ("vgg16", "tf_efficientnet_lite0", "deit_base_distilled_patch16_224")
STUDENTS = ("lmm", "l2", "sot", "kd", "rf")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """cifar10 with a narrow network, as in NARROW."""
    made = cifar10()
    teacher = replace(made.teacher, network=replace(made.teacher.network, model_channels=32))
    return replace(made, teacher=teacher, evaluate=replace(made.evaluate, features=FEATURES))


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """List sizes and times of all files, except those of the rehearsal."""
    files = [path for path in folder.rglob("*") if path.is_file() and REHEARSAL not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def rehearsed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A workspace with one of the pretrained networks, and the command's output."""
    place = tmp_path_factory.mktemp("rehearsed")
    images, workspace = colour_zip(place / "images.zip", resolution=32, classes=10, count=60), place / "ws"
    substitutes._make("vgg16", Folder(str(workspace / "weights/vgg16")))
    (workspace / "notes.txt").write_text("mine")
    before = contents(workspace)
    done = run(
        "cluster/rehearse.py", "cifar10", "--workspace", workspace, "--cpu", "--ranks", "2", "--weights", "random",
        "--images.source", images, *NARROW, timeout=1800,
    )  # fmt: skip
    assert contents(workspace) == before
    return workspace, done.stdout


def test_every_stage_works_with_two_ranks(rehearsed: tuple[Path, str]) -> None:
    workspace, said = rehearsed
    record = json.loads((workspace / REHEARSAL / RECORD).read_text())
    rows = {row["stage"]: row for row in record["stages"]}
    students = [f"students/{name}" for name in STUDENTS]
    assert list(rows) == [
        *(f"weights/{name}" for name in (*BACKBONES, "inception")),
        *("images", "probe", "teacher", "pairs", "pairs (verified)"),
        *("students/lmm", "students/lmm (resumed)", *students[1:], "sweeps/sot"),
        *("evaluation/teacher", "evaluation/students", "report"),
    ]
    assert all(row["ok"] and row["peak_mb"] > 50 for row in rows.values())
    table = said.split(f"rehearsal of cifar10, {workspace}/{REHEARSAL}/{RECORD}\n")[1]
    assert [line.split()[:2] for line in table.splitlines()[: len(rows)]] == [["works", name.split()[0]] for name in rows]
    assert "the same weights to the last bit" in rows["students/lmm (resumed)"]["note"]
    assert [rows[name]["unit"] for name in ("teacher", "pairs", "evaluation/teacher")] == ["image", "pair", "evaluation"]
    assert all(0 <= rows[name]["data_wait"] < 1 and rows[name]["seconds_per_unit"] > 0 for name in ("teacher", *students))
    assert (record["mode"], record["complete"], record["machine"]["gpu"]) == ("cpu", True, None)
    plan = json.loads((workspace / REHEARSAL / "students/lmm/plan.json").read_text())
    assert set(plan["features_sha256"]) == set(BACKBONES)


def test_stand_ins_are_named_and_what_is_there_is_not_replaced(rehearsed: tuple[Path, str]) -> None:
    workspace, said = rehearsed
    names = [f"weights/{name}" for name in (*BACKBONES[1:], "inception")]
    assert json.loads((workspace / REHEARSAL / RECORD).read_text())["substitutes"] == dict.fromkeys(names, "random weights")
    assert f"substitutes: {names[0]}: random weights; " in said
    files = [workspace / part / "weights/vgg16/model.safetensors" for part in ("", REHEARSAL)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_estimates_use_the_speeds_of_the_same_kind_of_device(rehearsed: tuple[Path, str], recipe: Recipe) -> None:
    workspace, _ = rehearsed
    there = Workspace(str(workspace), recipe)
    found = there.measured()
    assert {(m.task.kind, m.device) for m in found} == {
        (kind, "cpu") for kind in ("images", "teacher", "sampling", "looking", "reconstruction", "adversarial")
    }
    size = next(m.task.size for m in found if m.task.kind == "teacher")
    for kind in ("teacher", "sampling", "looking"):
        task = Work(kind=kind, size=size, precision="fp32")
        assert f"{workspace}/{REHEARSAL}/{RECORD}" in speed(task, "cpu", measured=found).source
        assert RECORD not in speed(task, "h200", measured=found).source
    assert f"{workspace}/{REHEARSAL}/{RECORD}" in speed(IMAGES, "cpu", measured=found).source
    there = Workspace(str(workspace), recipe, "unreachable")
    assert there.measured() == []


def test_a_failing_stage_is_a_line_and_what_needs_it_is_not_tried(run: Run, tmp_path: Path) -> None:
    there = tmp_path / "ws" / REHEARSAL
    there.mkdir(parents=True)
    (there / RECORD).write_text('{"stages": []}')
    (there / "old").mkdir()
    done = run(
        "cluster/rehearse.py", "digits", "--workspace", tmp_path / "ws", "--cpu", "--images.source", "/nowhere", ok=False
    )
    assert f"rehearsal: digits in {there}, emptied first" in done.stdout
    assert not (there / "old").exists()
    lines = [line.split("  ") for line in done.stdout.splitlines() if line.startswith("FAILED  ")]
    table = {line[1].strip(): line[-1].strip() for line in lines}
    assert "images.source '/nowhere', which does not exist, is neither" in table["images"]
    assert table["probe"] == "not tried, because it needs images"
    assert table["students/sot"] == "not tried, because it needs probe, pairs, students/lmm"
    assert "error: 12 of 12 stages do not work yet: images, probe, teacher, pairs, " in done.stderr
    assert not json.loads((there / RECORD).read_text())["stages"][0]["ok"]


def test_only_what_a_rehearsal_made_is_removed(tmp_path: Path) -> None:
    here, kept = tmp_path / "ws" / REHEARSAL, tmp_path / "kept"
    assert not clear(Folder(str(here)))
    here.mkdir(parents=True)
    kept.mkdir()
    (kept / "file").write_text("mine")
    (here / "teacher").mkdir()
    (here / "teacher/model.safetensors").write_text("")
    with pytest.raises(BeelineError, match=r"holds teacher but no rehearsal.json, so no rehearsal made it; nothing was"):
        clear(Folder(str(here)))
    assert (here / "teacher/model.safetensors").exists()
    (here / RECORD).write_text(json.dumps({"stages": []}))
    (here / "link").symlink_to(kept)
    assert clear(Folder(str(here)))
    assert [path.name for path in here.iterdir()] == [RECORD]
    assert (kept / "file").read_text() == "mine"


@pytest.mark.s3
def test_a_rehearsal_in_a_bucket_is_removed(bucket: Folder) -> None:
    here = bucket / REHEARSAL
    for folder, name in ((here, RECORD), (here / "students/lmm", "model.safetensors"), (bucket / "rehearsal-2", "file")):
        folder.write(name, b'{"stages": []}')
    assert clear(here)
    assert (list(here.sizes()), here.folders(), list((bucket / "rehearsal-2").sizes())) == ([RECORD], [], ["file"])


def test_the_teacher_of_the_workspace_is_taken(tmp_path: Path, recipe: Recipe) -> None:
    there, here = Workspace(str(tmp_path), recipe), Folder(str(tmp_path / REHEARSAL))
    assert substitutes.teacher(there, here) is None
    network = replace(recipe.teacher.network, model_channels=16, num_blocks=1)
    publish_model(there.place / "teacher", dump(build(network), {"imported": {"file": "edm.pkl"}}))
    there = Workspace(str(tmp_path), recipe)
    step = next(step for step in all_steps(there, here, shrunk(recipe, cpu=True), bool, random=False) if step.name == "teacher")
    assert step.run() == "imported from edm.pkl"
    assert beeline.load(tmp_path / REHEARSAL / "teacher").network_config == network


@pytest.mark.parametrize("name", RECIPES)
def test_only_counts_are_smaller(name: str) -> None:
    """Networks, ranks, GPUs, precision, batches and feature networks are those of the recipe."""
    real, small = RECIPES[name](0), shrunk(RECIPES[name](0), cpu=False)
    counts = {"iterations", "log_every", "checkpoint_every", "keep", "validate_every", "validate_count", "trackers"}
    counts |= {"count", "shard_size", "limit", "min_actors", "max_actors", "trials", "rungs", "promote", "min_accuracy"}
    counts |= {"draws", "held_out", "few", "max_failures", "min_count"}
    assert changes(real, small) <= counts
    assert all(student.workers.count == 5 for student in shrunk(real, cpu=False, ranks=5).students.values())
    on_cpu = shrunk(real, cpu=True, ranks=2)
    assert changes(real, on_cpu) - counts <= {
        *(
            "ranks",
            "gpus",
            "threads",
            "precision",
            "compiled",
            "batch_size",
            "nfe",
            "samples",
            "steps",
            "few_steps",
            "num_steps",
            "reflow_steps",
        )
    }
    for key, student in on_cpu.students.items():
        assert list(student.running) == list(real.students[key].running)
        for name, phase in student.phases.items():
            assert phase.objective == real.students[key].phases[name].objective
    assert {on_cpu.teacher.workers.gpus, on_cpu.probe.gpus, on_cpu.pairs.gpus, on_cpu.sweep.gpus} == {0}


def changes(old: Any, new: Any) -> set[str]:
    """List names of fields that differ, at any depth; a training's number of processes appears as "ranks"."""
    found: set[str] = set()
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(a):
            found |= changes(a, b)
        elif isinstance(a, dict):
            found |= {name for key in a for name in changes(a[key], b[key])}
        elif a != b:
            found.add("ranks" if isinstance(old, WorkersConfig) and field.name == "count" else field.name)
    return found


def test_reasons_are_one_line_each() -> None:
    wrapped = RuntimeError("Ray's words")
    wrapped.__cause__ = ValueError("the cause\nand more")
    assert reason(wrapped) == "ValueError: the cause"
    told = BeelineError("what to do")
    wrapped.__cause__ = told
    assert reason(wrapped) == "what to do"
    traced = ray.exceptions.UserCodeException("ray::work()\n  File 'x'\nRuntimeError: out of memory")
    assert reason(traced) == "RuntimeError: out of memory"
    assert len(reason(ValueError("x" * 1000))) <= LONGEST + 4
    assert text(Outcome(stage="pairs", ok=False, reason="no teacher"), 6) == "FAILED  pairs   no teacher"
