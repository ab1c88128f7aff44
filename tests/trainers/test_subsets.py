"""Sets of students: a training for each subset of the classes, and one model that routes by label."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.distributed

import beeline
from beeline.config import OptimizerConfig, PhaseConfig, StudentConfig, to_dict
from beeline.errors import BeelineError, SettingError
from beeline.labels import subset
from beeline.objectives import ObjectiveConfig
from beeline.objectives.fd_loss import FrechetLossConfig
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.scores.dmd import DMD2Config, DMDConfig
from beeline.recipes import RECIPES
from evaluation.models import student_folders
from pipeline.reader import some_images
from pipeline.records import cost_in, success_in
from pipeline.storage import Folder
from trainers import checkpoints, loop, train_lmm
from trainers.cost import training_cost
from trainers.student import check_subsets, student_training
from trainers.sweep_lmm import check_sweep
from trainers.training import Training
from trainers.trials import can_vary
from trainers.validation import Validation

DIGITS = RECIPES["digits"](0)
ADAM = OptimizerConfig(lr=1e-3, warmup=0)
SUBSETS = [subset(number, 2, small.CLASSES) for number in range(2)]
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def student(*objectives: ObjectiveConfig, **changes: Any) -> StudentConfig:
    """A set of two students of four iterations in each phase: `phase-0`, `phase-1`, ..."""
    phases = {
        f"phase-{k}": PhaseConfig(iterations=4, optimizer=ADAM, objective=objective) for k, objective in enumerate(objectives)
    }
    settings = {"batch_size": 6, "checkpoint_every": 2, "log_every": 2, "subsets": 2, **changes}
    return StudentConfig(name="msd", phases=phases, **settings)


DMD = student(DMDConfig())
MIXED = student(DMDConfig(regression_weight=0.5, distance="l2"), DMD2Config(fake_steps=2), ema_half_lives=(3.0, 30.0))


@pytest.fixture
def place(tmp_path: Path) -> Folder:
    return small.workspace(tmp_path / "ws")


class Killed(Exception):
    """The end of a process."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings run in this process, without Ray. Lists the folders of those that began."""
    folders: list[str] = []

    def launch(
        build: Callable[..., loop.Task], arguments: Mapping[str, Any], folder: Folder, *, name: str, **options: Any
    ) -> None:
        def newest(refused: Collection[int]) -> tuple[int, loop.State] | None:
            return checkpoints.newest(folder, refused)

        folders.append(name)
        session = loop.Session(folder=folder)
        loop.train(lambda session: build(session=session, **arguments), session, options["cadence"], newest)

    monkeypatch.setattr(train_lmm, "launch", launch)
    return folders


def train(place: Folder, config: StudentConfig, part: int | None = None) -> None:
    train_lmm.train_lmm(place.uri, "digits", config, part)


def contents(folder: Path) -> dict[str, bytes]:
    """All models of a set, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for name in (WEIGHTS, CONFIG) for path in folder.rglob(name)}


def train_until(place: Folder, config: StudentConfig, folder: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the process ends after the checkpoint of `step` in `folder`."""
    save = checkpoints.save

    def saved(place: Folder, number: int, *arguments: Any, **options: Any) -> None:
        save(place, number, *arguments, **options)
        if str(place).endswith(folder) and number == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", saved)
        with pytest.raises(Killed):
            train(place, config)


@pytest.mark.usefixtures("launched")
def test_killed_in_a_part_and_started_again(place: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both phases, both averages: the same bytes, and finished parts are not trained again."""
    other = small.workspace(tmp_path / "other")
    train(other, MIXED)
    for folder, step in (("msd/0", 2), ("msd/1", 6)):
        train_until(place, MIXED, folder, step, monkeypatch)
        assert success_in(place / "students/msd") is None
        assert WEIGHTS not in (place / "students/msd").sizes()
    first = (tmp_path / "ws/students/msd/0/_SUCCESS").stat().st_mtime_ns
    train(place, MIXED)
    assert (tmp_path / "ws/students/msd/0/_SUCCESS").stat().st_mtime_ns == first
    ours, theirs = (contents(tmp_path / name / "students/msd") for name in ("ws", "other"))
    models = ["", "phase-0/", "ema-30/"]
    assert set(ours) == {f"{p}{model}{file}" for p in ("", "0/", "1/") for model in models for file in (WEIGHTS, CONFIG)}
    assert ours == theirs


def test_parts_may_be_trained_apart(
    place: Folder, tmp_path: Path, launched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train(place, DMD, part=1)
    assert launched == ["students/msd/1"]
    assert success_in(place / "students/msd") is None
    train(place, DMD, part=1)
    assert "students/msd/1: already complete" in capsys.readouterr().out
    train(place, DMD)
    assert launched == ["students/msd/1", "students/msd/0"]
    done = success_in(place / "students/msd")
    assert done is not None
    assert done["images_seen"] == 2 * 4 * 6
    train(place, DMD)
    assert len(launched) == 2
    assert "students/msd: already complete" in capsys.readouterr().out
    with pytest.raises(BeelineError, match=r"students/msd was made with other settings: student.seed: 0 there, 5 asked for"):
        train(place, replace(DMD, seed=5))
    config = json.loads((tmp_path / "ws/students/msd/1/config.json").read_text())
    assert config["about"]["classes"] == [2, 3]
    assert student_folders(place) == ["students/lmm", "students/msd", "students/msd/0", "students/msd/1"]


@pytest.mark.usefixtures("launched")
def test_the_set_is_its_parts(place: Folder, tmp_path: Path) -> None:
    train(place, DMD)
    routed, *parts = (beeline.load(tmp_path / "ws/students/msd" / name) for name in (".", "0", "1"))
    assert routed.few_step == parts[0].few_step == DMD.phases["phase-0"].objective.sampling()
    images = []
    for label in range(small.CLASSES):
        labels = torch.full((5,), label)
        images.append(beeline.generate(routed, 5, labels=labels))
        assert torch.equal(images[-1], beeline.generate(parts[label // 2], 5, labels=labels))
    assert not torch.equal(images[0], beeline.generate(parts[1], 5, labels=torch.zeros(5, dtype=torch.long)))
    mixed = beeline.generate(routed, 5, labels=torch.tensor([3, 0, 2, 1, 0]))
    torch.testing.assert_close(mixed, torch.stack([images[k][row] for row, k in enumerate((3, 0, 2, 1, 0))]), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("launched")
def test_a_set_costs_the_sum_of_its_trainings(place: Folder) -> None:
    train(place, DMD)
    found, one = cost_in(place / "students/msd"), training_cost(place, "digits", replace(DMD, subsets=1), small.NETWORK)
    assert found is not None
    assert found["training"] == pytest.approx(2 * one["training"], abs=1)
    assert found["training"] == pytest.approx(2 * 4 * 6 * 8, rel=0.02)  # 8 evaluations for each image of a step of DMD
    assert cost_in(place / "students/msd/0") is None


def task(place: Folder, config: StudentConfig, number: int, tmp_path: Path, **session: Any) -> Training:
    ours = loop.Session(folder=Folder(str(tmp_path / f"part-{number}")), **session)
    return student_training(
        session=ours, workspace=place, recipe="digits", config=config, subset=SUBSETS[number], **small.plans(place)
    )


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_sees_its_classes_alone(number: int, place: Folder, tmp_path: Path) -> None:
    """Fresh noise, pairs, real images, statistics of all real images, and validation."""
    classes = set(SUBSETS[number].classes)
    for objective in (DMDConfig(), DistillationConfig(num_steps=4), DMD2Config(fake_steps=1)):
        training, seen, real = task(place, student(objective), number, tmp_path), set[int](), set[int]()
        for step in range(8):
            for batch, _ in training._batches(step, step):
                assert batch.labels is not None
                seen |= set(batch.labels.argmax(dim=1).tolist())
                real |= set() if batch.real_labels is None else set(batch.real_labels.argmax(dim=1).tolist())
        assert seen == classes
        assert real == (classes if objective.needs().images else set())
    training = task(place, student(FrechetLossConfig(networks=("probe",))), number, tmp_path)
    images, labels = some_images(place / "images", small.plans(place)["images"]["images"], small.COUNT)
    of_classes = images[[label in classes for label in labels]]
    found = torch.cat(list(training._real_images()))
    assert sorted(image.sum().item() for image in found) == pytest.approx(
        sorted(float((image / 127.5 - 1).sum()) for image in of_classes), abs=1e-3
    )
    validation = Validation(
        place, "digits", small.plans(place)["images"], count=100, seed=0, device=torch.device("cpu"),
        classes=SUBSETS[number].classes,
    )  # fmt: skip
    assert set(validation.labels.tolist()) == classes
    assert len(validation.labels) == small.COUNT // 2


def test_labels_of_a_part_are_a_function_of_the_position(place: Folder, tmp_path: Path) -> None:
    training = task(place, DMD, 1, tmp_path)
    assert training._fresh(range(3, 9))["labels"].tolist() == [3, 2, 3, 2, 3, 2]
    assert training.name == "msd/1"


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    place = Folder(f"{folder}/ws")
    for number in range(2):
        training = task(place, MIXED, number, Path(folder), rank=rank, world_size=2)
        loop.run(training, training.session, loop.Cadence(log_every=1, checkpoint_every=100))
        sums = [float(parameter.double().sum()) for parameter in training.model.parameters()]
        Path(f"{folder}/sums-{number}-{rank}.json").write_text(json.dumps(sums))
    torch.distributed.destroy_process_group()


def test_two_ranks_end_alike(place: Folder, tmp_path: Path) -> None:
    """Both parts, each with pairs, fresh noise and real images. The set is then joined from their models."""
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
        assert process.exitcode == 0
    sums = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("sums-*.json")}
    for number in range(2):
        assert sums[f"sums-{number}-0.json"] == sums[f"sums-{number}-1.json"]
    assert sums["sums-0-0.json"] != sums["sums-1-0.json"]
    assert all((tmp_path / f"part-{number}" / WEIGHTS).exists() for number in range(2))


@pytest.mark.usefixtures("launched")
def test_what_is_refused_before_anything_is_written(place: Folder, tmp_path: Path) -> None:
    train(place, DMD)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        BeelineError, match=r"student 'msd' has 5 subsets of classes, but teacher has 4 classes; set --student\."
    ):
        train(place, replace(DMD, subsets=5))
    with pytest.raises(
        BeelineError, match=r"students/msd is a set of 2 students, .* take a model of all classes, or one of the"
    ):
        train(place, replace(DMD, name="other", subsets=1, init="students/msd"))
    for part in (-1, 2):
        with pytest.raises(BeelineError, match=rf"--part is {part}; student 'msd' has parts 0 to 1"):
            train(place, DMD, part)
    with pytest.raises(BeelineError, match=r"--part is 0; student 'msd' has one part; leave --part out"):
        train(place, replace(DMD, subsets=1), 0)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(BeelineError, match=r"but teacher has no classes; set --student\.subsets to 1"):
        check_subsets(DMD, 0)
    with pytest.raises(SettingError, match="names that are not numbers"):
        replace(DMD, phases={"0": DMD.phases["phase-0"]})
    replace(DMD, phases={"0": DMD.phases["phase-0"]}, subsets=1)


@pytest.mark.usefixtures("launched")
def test_a_part_can_be_started_from(place: Folder) -> None:
    """It is an ordinary model."""
    train(place, DMD)
    train(place, replace(DMD, name="further", subsets=1, init="students/msd/1"))
    assert WEIGHTS in (place / "students/further").sizes()


def test_identities_of_other_students_stay() -> None:
    assert "subsets" not in to_dict(replace(DMD, subsets=1), resources=False)
    assert to_dict(DMD, resources=False)["subsets"] == 2


def test_a_sweep_of_a_set_is_refused() -> None:
    main = replace(DIGITS.main, subsets=2)
    assert not can_vary(main)
    with pytest.raises(BeelineError, match="'lmm' is a set of 2 students; a sweep varies one"):
        check_sweep(DIGITS.sweep, main)
