"""Every code path that creates tensors, on a GPU: a fake one (fake_cuda.py describes its limits), or the machine's own."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import every_method
import numpy as np
import pytest
import small
import torch
from fake_cuda import WaitError, fake_cuda, without_waiting
from methods import ConsistencyConfig, MatchingConfig

import beeline
from beeline import calibrate
from beeline.augmentation import LABELS, augment
from beeline.checkpoint import build, dump
from beeline.config import (
    EvaluateConfig,
    OptimizerConfig,
    PhaseConfig,
    StudentConfig,
    TeacherConfig,
)
from beeline.denoiser import Denoiser
from beeline.features import Frozen
from beeline.features.backbones import build_backbone
from beeline.features.measuring import Eye, MeasuringProbe, build_measuring
from beeline.features.probe import Probe, train_probe
from beeline.files.arrays import unpack
from beeline.labels import pair_labels
from beeline.metrics.straightness import straightness, trajectories
from beeline.noise import unit_noise
from beeline.objectives import Batch, Context, ObjectiveConfig
from beeline.objectives.discriminator import DiscriminatorConfig
from beeline.objectives.edm import edm_loss
from beeline.objectives.ema import ema_update
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.learner import Learner
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.objectives.rectified_flow import RectifiedFlowConfig
from beeline.sampling import Sampling, generate, sample
from beeline.sampling.inference import prepare
from beeline.schedule import edm_sigmas
from evaluation.bench import HELD_OUT, Bench, Setup
from evaluation.jobs import Fidelity, HeldOut, Judge, Lines, RealImages, Samples, Sheet
from evaluation.reference import merge_reference, reference_folder
from evaluation.samplings import draw, teacher_sampling
from pipeline.gen_pairs import load_sampler, make_pairs
from pipeline.model_folders import require_model, require_probe
from pipeline.sheet import sheet_png
from pipeline.storage import Folder
from trainers import checkpoints, loop
from trainers.log import read_log
from trainers.student import student_training
from trainers.train_teacher import teacher_training
from trainers.training import Training
from trainers.validation import Validation

OPTIMIZER = OptimizerConfig(lr=1e-3)
RADAM = OptimizerConfig(kind="radam", lr=1e-3)
LINES = LinesMatchingConfig(num_steps=4)
CRITICS = DiscriminatorConfig(optimizer=OPTIMIZER, width=8, networks=("probe", "scratch"))
ADVERSARIAL = replace(LINES, adversarial_weight=0.5, discriminator=CRITICS)
PHASE = PhaseConfig(iterations=2, optimizer=OPTIMIZER, objective=LINES)
CADENCE = loop.Cadence(log_every=1, checkpoint_every=1, keep=10)
COLOUR = replace(small.NETWORK, img_resolution=32, img_channels=3, attn_resolutions=())


def student(*objectives: ObjectiveConfig, optimizer: OptimizerConfig = OPTIMIZER, **changes: Any) -> StudentConfig:
    """Build a student with one phase per objective; the last one uses `optimizer`."""
    phases = {f"phase-{k}": replace(PHASE, objective=objective) for k, objective in enumerate(objectives)}
    last = f"phase-{len(objectives) - 1}"
    phases[last] = replace(phases[last], optimizer=optimizer)
    return StudentConfig(name="tried", phases=phases, batch_size=4, ema_half_lives=(3.0, 30.0), **changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A workspace of 8x8 images, to read from."""
    place = small.workspace(tmp_path_factory.mktemp("small"))
    small.write_weak(place)
    return place


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A workspace of networks without classes, to read from."""
    network = replace(small.NETWORK, label_dim=0)
    place = small.workspace(tmp_path_factory.mktemp("unlabelled"), network)
    small.write_weak(place, network)
    return place


@pytest.fixture
def place(made: Folder, tmp_path: Path) -> Folder:
    """A copy of that workspace, to write to."""
    return Folder(str(shutil.copytree(made.uri, tmp_path / "ws")))


@pytest.fixture
def device() -> Iterator[torch.device]:
    with fake_cuda() as device:
        yield device


def same(on_gpu: Any, on_cpu: Any) -> None:
    """Assert that values are nearly equal; the GPU uses other batch sizes."""
    if isinstance(on_cpu, dict):
        assert on_gpu.keys() == on_cpu.keys()
        for key, value in on_cpu.items():
            same(on_gpu[key], value)
    elif isinstance(on_cpu, torch.Tensor):
        same(on_gpu.cpu().numpy(), on_cpu.numpy())
    elif isinstance(on_cpu, str):
        assert on_gpu == on_cpu
    else:
        np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)


def test_a_fake_gpu_refuses_what_a_gpu_refuses(device: torch.device) -> None:
    x, y = torch.ones(3, 3, device=device), torch.ones(3, 3)
    same_device = "same device"
    for wrong in (lambda: x + y, lambda: y.copy_(y) @ x, lambda: torch.cat([x, y]), lambda: y[torch.arange(2).to(device)]):
        with pytest.raises(RuntimeError, match=rf"(?i){same_device}|indices should be"):
            wrong()
    with pytest.raises(TypeError, match="can't convert cuda"):
        x.numpy()
    with pytest.raises(TypeError, match="can't convert cuda"):
        np.asarray(x)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, generator=torch.Generator(device))
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, generator=torch.Generator(), device=device)
    weight = torch.nn.Linear(3, 3).to(device)
    weight(x).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.is_cuda for parameter in weight.parameters())
    assert (x * torch.tensor(2.0))[torch.arange(2)].sum().item() == 12  # numbers and indices may be on the CPU
    assert y.copy_(x).device.type == copy.deepcopy(x).cpu().device.type == "cpu"


def test_waiting_for_a_fake_gpu_is_noticed() -> None:
    with fake_cuda() as device:
        x = torch.arange(3.0).to(device)
        waits: list[Callable[[], Any]] = [x[0].item, x.cpu, lambda: x[x > 0], x.nonzero, lambda: bool(x[0] > 0)]
        if not torch.cuda.is_initialized():
            for wait in waits:
                with without_waiting(), pytest.raises(WaitError):
                    wait()
        with without_waiting():
            torch.where(x > 0, x, 0).sum()
        assert [wait() is not None for wait in waits] == [True] * 5


# Sampling


@pytest.mark.parametrize("solver", ["heun", "euler", "calibrated"])
def test_pairs(made: Folder, device: torch.device, solver: Any) -> None:
    plan = small.plans(made)["pairs"] | {"sigmas": edm_sigmas(5).tolist()}
    config = replace(small.PAIRS, solver="calibrated" if solver == "calibrated" else "heun")
    rows = range(20)
    noise, labels = unit_noise(3, rows, (1, 8, 8)), pair_labels(rows, small.CLASSES)
    on_cpu = require_model(made, "teacher", "digits")[0]
    on_cpu.levels = tuple(plan["sigmas"])
    on_gpu = load_sampler(made, "digits", plan, config)
    assert next(on_gpu.parameters()).is_cuda
    if solver == "euler":
        same(*(generate(model, 6, solver="euler", num_steps=4) for model in (on_gpu, on_cpu)))
    else:
        same(*(make_pairs(model, noise, labels, config) for model in (on_gpu, on_cpu)))


@pytest.mark.parametrize("rule", ["same_noise", "line", "fresh_noise"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_few_steps(made: Folder, device: torch.device, rule: Any, precision: Any) -> None:
    model = require_model(made, "students/lmm", "digits")[0]
    sampling = Sampling(steps=(0, 2), rule=rule)
    on_gpu = prepare(copy.deepcopy(model).to(device), precision=precision)
    images = draw(on_gpu, sampling, range(7), np.arange(7, dtype=np.int32) % 4, seed=1, batch_size=3)
    assert images.device.type == "cuda"
    assert sheet_png(images, columns=3)
    if precision == "fp32":
        same(images, draw(model, sampling, range(7), np.arange(7, dtype=np.int32) % 4, seed=1, batch_size=3))
    assert sample(on_gpu, range(2), torch.arange(2), sampling, seed=0).is_cuda


@pytest.mark.parametrize("line", ["ve", "lerp"])
def test_straightness(made: Folder, device: torch.device, line: Any) -> None:
    model = require_model(made, "students/lmm", "digits")[0]
    generator = torch.Generator().manual_seed(0)
    x1, noise = (torch.randn(8, 1, 8, 8, generator=generator) for _ in range(2))
    labels, sigmas = torch.arange(8) % 4, edm_sigmas(4)
    on_cpu = straightness(model, x1, noise, labels, sigmas, line=line), trajectories(model, noise, labels, num_steps=4)
    x1, noise, labels = (one.to(device) for one in (x1, noise, labels))
    model.to(device)
    on_gpu = straightness(model, x1, noise, labels, sigmas, line=line), trajectories(model, noise, labels, num_steps=4)
    same(on_gpu[0], on_cpu[0])
    same(np.array(on_gpu[1]), np.array(on_cpu[1]))


def test_calibration(made: Folder, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "REFERENCE_STEPS", 6)
    teacher = beeline.load(f"{made}/teacher").to(device)
    bench = calibrate.Bench(teacher, 6, 0, batch_size=4)
    levels, error = calibrate.search(lambda tried: bench.adams(tried).rms, calibrate.uniform_levels(4), 4, 0)
    assert len(levels) == 4
    assert 0 < error < float("inf")
    assert bench.heun(3).rms > 0


# Measuring


@pytest.mark.parametrize("name", ["probe", "inception", "dinov2_vits14"])
def test_measuring_networks(made: Folder, device: torch.device, name: str) -> None:
    network = MeasuringProbe(require_probe(made, "measure", "digits")[0]) if name == "probe" else build_measuring(name)
    seen = Eye(network, device).look(torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8))
    assert seen.features.shape == (2, network.dimensions)
    assert np.isfinite(seen.features).all()
    assert (seen.logits is not None) == (name == "inception")


def measured(place: Folder) -> dict[str, Any]:
    """List what every item of a measurement of teacher and student writes, by file."""
    plans = small.plans(place)
    config = EvaluateConfig(draws=1, shard_size=16, batch_size=8, samples=6, neighbours=20)
    setup = Setup(workspace=place, recipe="digits", config=config, count=40, **plans)
    rows = {
        "teacher": [teacher_sampling(15), teacher_sampling(2)],
        "students/lmm": [Sampling(steps=(0, 2), rule=rule) for rule in (None, "same_noise", "fresh_noise")],
    }
    real = [RealImages("probe", group) for group in range(3)]
    first: list[Any] = [*real, HeldOut(64, 1)]
    then: list[Any] = []
    for name, ways in rows.items():
        for row in ways:
            parts = [Samples(name, row, 0, shard, range(16 * shard, min(16 * shard + 16, 40))) for shard in range(3)]
            first += [*parts, Sheet(name, row, 6)]
            then += [Judge(name, row, 0, tuple(part.file for part in parts)), Fidelity(name, row, 64)]
        then.append(Lines(name, 4, 64))
    bench = Bench(setup, [*first, *then])
    for number in range(len(first)):
        bench.work(number)
    merge_reference(place / reference_folder("probe"), [part.file for part in real])
    for number in range(len(first), len(bench.jobs)):
        bench.work(number)
    folders = ["evaluation/teacher", "evaluation/students/lmm", HELD_OUT, reference_folder("probe")]
    files = {f"{name}/{file}": (place / name).read(file) for name in folders for file in (place / name).sizes()}
    assert len(files) == 5 * (3 + 1 + 2) + 2 + 1 + 3 + 2
    return {
        name: (place / name.rpartition("/")[0]).read_json(name.rpartition("/")[2])
        if name.endswith(".json")
        else {key: array for key, array in unpack(data, name).items() if key != "device"}
        for name, data in files.items()
    }


def test_every_item_of_a_measurement(made: Folder, place: Folder, tmp_path: Path) -> None:
    on_cpu = measured(Folder(str(shutil.copytree(made.uri, tmp_path / "cpu"))))
    with fake_cuda():
        on_gpu = measured(place)
    for name in on_cpu:
        assert on_gpu[name].keys() == on_cpu[name].keys()
        for key, value in on_cpu[name].items():
            if key == "images":  # 8-bit: a rounding may go the other way
                assert np.abs(on_gpu[name][key].astype(int) - value).max() <= 1
            elif not name.rpartition("/")[2].startswith("draw-"):
                np.testing.assert_allclose(on_gpu[name][key], value, rtol=1e-3, atol=2e-2) if key != "line" else None


def test_a_validation(made: Folder, device: torch.device) -> None:
    model = require_model(made, "students/lmm", "digits")[0].to(device)
    validation = Validation(made, "digits", small.plans(made)["images"], count=20, seed=0, device=device)
    figures, sheet = validation.judge(model)
    assert figures["fd_probe_losses"] > 0
    assert figures.keys() == {"fd_probe_losses", "precision_probe_losses", "recall_probe_losses"}
    assert sheet.startswith(b"\x89PNG")


# Training


def trained(place: Folder, device: torch.device, config: StudentConfig) -> None:
    """Train a student through its phases with validation and checkpoints at every step, then again from each."""

    def task(session: loop.Session) -> Training:
        return student_training(session=session, workspace=place, recipe="digits", config=config, **small.plans(place))

    folder = place / f"students/{config.name}"
    session = loop.Session(folder=folder, device=device)
    first = task(session)
    assert loop.run(first, session, replace(CADENCE, validate_every=config.validate_every))
    assert all(tensor.is_cuda for average in first.averages for tensor in average.state_dict().values())
    weights = folder.read("model.safetensors")
    for step in checkpoints.steps(folder):
        state = checkpoints.load(folder, step)
        session = loop.Session(folder=folder, device=device, restored=state)
        assert loop.run(task(session), session, replace(CADENCE, checkpoint_every=100, validate_every=config.validate_every))
        assert folder.read("model.safetensors") == weights
    beeline.load(f"{folder}")


@pytest.mark.parametrize(
    "config",
    [
        student(LINES, ADVERSARIAL, validate_every=2, validate_count=20, accumulate=2),
        student(replace(LINES, distance="l2"), optimizer=RADAM),
        student(
            replace(LINES, line="ve", rule="same_noise", distance="huber", levels="sigma"),
            replace(ADVERSARIAL, line="ve", rule="same_noise", steps=(0, 2)),
            optimizer=RADAM, precision="bf16", phase_switch="restart",
        ),
        student(DistillationConfig(num_steps=4)),
        student(RectifiedFlowConfig(num_steps=4)),
        student(ConsistencyConfig(num_steps=4, weighted=True), MatchingConfig(num_steps=4, every=2)),
    ],
    ids=["adversarial", "radam", "bf16", "kd", "rf", "of one's own"],
)  # fmt: skip
def test_students(place: Folder, device: torch.device, config: StudentConfig) -> None:
    trained(place, device, config)


OBJECTIVES = every_method.objectives("cifar10_methods", "digits_methods")
WAITS = ("fd", "ot_cfm")  # reads all real images in the first step; pairs noise and images on the CPU


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_method(
    made: Folder, unlabelled: Folder, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
    labels: bool,
) -> None:  # fmt: skip
    """Steps in which student and critic learn, without waiting for the GPU."""
    workspace, session = made if labels else unlabelled, loop.Session(folder=Folder(str(tmp_path)), device=device)
    config = every_method.training(OBJECTIVES[name])
    task = student_training(session=session, workspace=workspace, recipe="digits", config=config, **small.plans(workspace))
    backward = task.objective.backward

    def strict(*arguments: Any) -> dict[str, torch.Tensor]:
        with contextlib.nullcontext() if name in WAITS else without_waiting():
            return backward(*arguments)

    monkeypatch.setattr(task.objective, "backward", strict)
    learners = [learner for learner in (task.student, task.critic) if learner is not None]
    before = [[part.detach().clone() for part in learner.parameters] for learner in learners]
    for step in range(2):
        assert all(np.isfinite(float(figure)) for figure in task.step(step).values())
    for learner, weights in zip(learners, before, strict=True):
        assert any(not torch.equal(part, old) for part, old in zip(learner.parameters, weights, strict=True))
    assert all(tensor.is_cuda for average in task.averages for tensor in average.state_dict().values())
    assert task.state is None or all(tensor.is_cuda for tensor in task.state.state_dict().values())


@pytest.mark.parametrize(
    ("distance", "network"),
    [
        ("lpips", "tf_efficientnet_lite0"),
        ("lpips_avg", "deit_base_distilled_patch16_224"),
        ("johnson", "scratch"),
    ],
)
def test_pretrained_networks(device: torch.device, distance: Any, network: Any) -> None:
    """A step on colour images with mirrored real images, and random weights in the frozen networks."""
    torch.manual_seed(0)
    critic = replace(CRITICS, networks=(network,), resize=128, mirror=True)
    config = replace(ADVERSARIAL, distance=distance, resize=48, discriminator=critic)
    features = {name: Frozen(build_backbone(name), device=device) for name in config.needs().features}
    student = Learner(build(COLOUR).train().to(device), RADAM)
    average = build(COLOUR).to(device)
    made = config.build(
        Context(image_shape=(3, 32, 32), num_classes=small.CLASSES, models={}, features=features, average=average)
    )
    assert made.critic is not None
    learner = Learner(made.critic.to(device), RADAM)
    generator = torch.Generator(device).manual_seed(0)
    noise, x1, real = (torch.randn(2, 3, 32, 32, device=device, generator=generator) for _ in range(3))
    labels = torch.eye(small.CLASSES, device=device)[:2]
    batch = Batch(size=2, step=0, total=10, noise=noise, x1=x1, labels=labels, real=real, real_labels=labels)
    figures = made.backward(student, learner, batch, generator)
    assert all(np.isfinite(float(value)) for value in figures.values())
    assert student.update(0, 10)["grad_norm"] > 0
    assert learner.update(0, 10)["grad_norm"] > 0


def test_a_teacher(place: Folder, device: torch.device) -> None:
    """EDM's loss and averages, with augmentation, mirrored images, accumulation and autocast."""
    for changes in ({"augment": 0.5, "accumulate": 2}, {"flip": True, "precision": "bf16", "ema_ramp": 0.0}):
        network = replace(small.NETWORK, augment_dim=LABELS if "augment" in changes else 0, dropout=0.1)
        settings: dict[str, Any] = {"network": network, "iterations": 3, "batch_size": 8, "ema_half_life": 2.0} | changes
        config = TeacherConfig(optimizer=OPTIMIZER, **settings)
        session = loop.Session(folder=place / "teacher", device=device)
        images = small.plans(place)["images"]
        task = teacher_training(session=session, workspace=place, recipe="digits", config=config, images=images)
        assert loop.run(task, session, CADENCE)
        assert read_log(session.folder)[-1]["loss"] > 0
        assert all(tensor.is_cuda for tensor in task.averages[0].state_dict().values())


def test_losses_without_a_task(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    model = build(replace(small.NETWORK, augment_dim=LABELS)).to(device)
    average = copy.deepcopy(model)
    images, labels = augment(torch.zeros(4, 1, 8, 8, device=device), 0.5, generator)
    edm_loss(model, images, torch.arange(4, device=device), generator, labels).backward()
    ema_update(average, model, 10.0, 1, 0.05)
    assert images.is_cuda
    assert dump(average, {})["model.safetensors"] == dump(model, {})["model.safetensors"]


def test_a_probe(made: Folder, device: torch.device) -> None:
    config = require_probe(made, "losses", "digits")[0].config
    probe = Probe(config, channels=1, num_classes=4).to(device)
    images, labels = torch.rand(40, 1, 8, 8, device=device), torch.arange(40, device=device) % 4
    accuracy = train_probe(probe, images, labels, iterations=3, batch_size=8, lr=1e-3, seed=0)
    assert 0 <= accuracy <= 1
    assert dump(probe, {})


MODELS: dict[str, Callable[[Denoiser], Any]] = {
    "a network's own steps": lambda model: generate(model, 3),
    "labels by class": lambda model: generate(model, 3, labels=torch.tensor([1, 2, 3])),
    "labels as one-hot": lambda model: model(torch.zeros(2, 1, 8, 8).to("cuda"), torch.tensor(1.0), torch.eye(4)[:2]),
}


@pytest.mark.parametrize("call", MODELS.values(), ids=MODELS)
def test_as_a_library(made: Folder, device: torch.device, call: Callable[[Denoiser], torch.Tensor]) -> None:
    assert call(beeline.load(f"{made}/students/lmm").to(device)).is_cuda
