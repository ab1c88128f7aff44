"""Consistency trajectory models: the exact flow map is the minimiser, and gradients equal those of the formulas."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from closed_form import ClosedForm
from torch import nn

from beeline import counting
from beeline.checkpoint import build
from beeline.config import OptimizerConfig, PhaseConfig, ProbeNetworkConfig, StudentConfig
from beeline.denoiser import Denoiser
from beeline.errors import SettingError
from beeline.features import Frozen
from beeline.features.probe import Probe
from beeline.objectives import Batch, Context, Needs
from beeline.objectives.adversarial import last_layer
from beeline.objectives.discriminator import DiscriminatorConfig
from beeline.objectives.learner import Learner
from beeline.objectives.maps import ctm
from beeline.objectives.maps.ctm import CTM, CTMConfig
from beeline.objectives.perceptual import perceptual
from beeline.sampling.solvers import ode_step
from beeline.schedule import edm_sigmas
from pipeline.storage import Folder
from trainers import loop
from trainers.student import student_training

OPTIMIZER = OptimizerConfig(lr=1e-3)
PLAIN = CTMConfig(distance="l2", solver_law="constant", solver_steps=2, denoising_weight=0.0)
CHEAP = dataclasses.replace(PLAIN, solver_steps=1, compare="predictions")
CRITIC = DiscriminatorConfig(optimizer=OPTIMIZER, width=8, augment=())
LEVELS = [*edm_sigmas(18).float().tolist(), 0.0]
DATA = 0.5  # standard deviation of Gaussian data


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scaled(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The ODE of data N(0, DATA^2) from level t to level s."""
    return x * ((DATA**2 + s**2) / (DATA**2 + t**2)).sqrt()


class GaussianMap(ClosedForm):
    """The flow map of Gaussian data, plus a 1x1 convolution that starts at `error`."""

    def __init__(self, error: float) -> None:
        network = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(network.weight, error)
        network.last_layer = network.weight
        super().__init__(side=4, model=network)
        self.double()

    def output(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        same = s == t
        ratio = torch.where(same, 0.0, s / t)
        exact = torch.where(same, x * DATA**2 / (DATA**2 + t**2), (scaled(x, t, s) - ratio * x) / (1 - ratio))
        return exact + self.model(x / (1 + t))


def exact_step(denoiser: Any, x: torch.Tensor, sigma: torch.Tensor, to: torch.Tensor, labels: Any, *, solver: str) -> Any:
    return scaled(x, sigma.double().reshape(-1, 1, 1, 1), to.double().reshape(-1, 1, 1, 1))


def gaussian_step(config: CTMConfig, error: float, count: int = 32, step: int = 0) -> tuple[dict[str, torch.Tensor], float]:
    """Figures of a step on Gaussian data, and the gradient of the map's error."""
    student, teacher = GaussianMap(error), GaussianMap(0.0).requires_grad_(False)
    average = GaussianMap(0.0)
    objective = config.build(
        Context(image_shape=(1, 4, 4), num_classes=0, models={"teacher": teacher}, features={}, average=average)
    )
    real = DATA * torch.randn(count, 1, 4, 4, generator=seeded(), dtype=torch.float64)
    figures = objective.backward(Learner(student, OPTIMIZER), None, Batch(size=count, step=step, total=9, real=real), seeded())
    assert isinstance(student.model, nn.Conv2d)
    assert student.model.weight.grad is not None
    return figures, float(student.model.weight.grad)


@pytest.mark.parametrize("compare", ["images", "jumps", "predictions"])
@pytest.mark.parametrize("solver_steps", [1, 3, 17, 18])
@pytest.mark.parametrize("zero", [0.0, 1.0])
def test_the_exact_flow_map_is_the_minimiser(
    compare: Any, solver_steps: int, zero: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctm, "ode_step", exact_step)
    config = dataclasses.replace(PLAIN, compare=compare, solver_steps=solver_steps, zero=zero)
    figures, gradient = gaussian_step(config, 0.0)
    wrong, slope = gaussian_step(config, 0.1)
    assert float(wrong["trajectory"]) > 1e-6
    assert slope > 1e-5
    assert float(figures["trajectory"]) < 1e-6 * float(wrong["trajectory"])
    assert abs(gradient) < 1e-3 * slope
    assert gaussian_step(config, -0.1)[1] < 0


def test_heun_steps_come_close_to_the_exact_map() -> None:
    errors = []
    for num_steps in (18, 72):
        config = dataclasses.replace(PLAIN, num_steps=num_steps, solver_steps=num_steps // 18)
        errors.append(float(gaussian_step(config, 0.0)[0]["trajectory"]))
    assert (
        0 < errors[1] < errors[0] / 16
    )  # squares of an error of second order: 4^4 times less where Heun's method is at its order


def test_denoising_makes_the_map_a_denoiser() -> None:
    """With s = t the map learns the mean of clean images: on average over noise, its error has no gradient only at 0."""
    x1 = DATA * torch.randn(200_000, 1, 1, 1, generator=seeded(0), dtype=torch.float64)
    v = ctm.denoising_levels(len(x1), seeded(1))
    x = ctm.noisy(x1, v, seeded(2))
    slopes = []
    for error in (-0.05, 0.0, 0.05):
        model = GaussianMap(error)
        ctm.edm_weighted(model(x, v), x1, v).backward()
        assert isinstance(model.model, nn.Conv2d)
        slopes.append(float(model.model.weight.grad))  # pyright: ignore[reportArgumentType]
    assert slopes[0] < 0 < slopes[2]
    assert abs(slopes[1]) < 0.05 * slopes[2]


def test_levels_of_the_denoising_loss() -> None:
    v = ctm.denoising_levels(20_000, seeded())
    schedule = v.double() ** (1 / 7)
    lowest = 80 ** (1 / 7) + 0.7 * (0.002 ** (1 / 7) - 80 ** (1 / 7))
    assert float(v.max()) <= 80.001
    # Above the lognormal half, ln v ~ N(-1.2, 1.2), the uniform half decides.
    high = float((schedule > (80 ** (1 / 7) + lowest) / 2).double().mean())
    assert high == pytest.approx(0.25, abs=0.02)
    assert float((schedule < lowest).double().mean()) == pytest.approx(0.5 * float(lognormal_below(lowest**7)), abs=0.02)


def lognormal_below(level: float) -> torch.Tensor:
    return torch.special.ndtr((torch.tensor(level).log() + 1.2) / 1.2)


@pytest.fixture
def student(make_denoiser: Callable[..., Denoiser]) -> Denoiser:
    return copy.deepcopy(make_denoiser(second_level=True)).requires_grad_(True).train()


@pytest.fixture
def others(make_denoiser: Callable[..., Denoiser]) -> dict[str, Denoiser]:
    """A teacher, and an average that differs from the student."""
    models = {"teacher": make_denoiser(), "average": copy.deepcopy(make_denoiser(second_level=True))}
    with torch.no_grad():
        for parameter in models["average"].parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(9))
    return models


def batch(count: int = 4, **changes: Any) -> Batch:
    return Batch(**{"size": count, "step": 0, "total": 10, "real": torch.randn(count, 2, 8, 8, generator=seeded(1)), **changes})


def made(config: CTMConfig, others: dict[str, Denoiser], probe: Probe | None = None) -> CTM:
    torch.manual_seed(0)
    features = {} if probe is None else {"probe": Frozen(probe)}
    models = {"teacher": others["teacher"]}
    return config.build(
        Context(image_shape=(2, 8, 8), num_classes=0, models=models, features=features, average=others["average"])
    )


def gradients(model: nn.Module) -> torch.Tensor:
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in found])


def paths(h: int, config: CTMConfig, count: int, generator: torch.Generator) -> tuple[list[list[float]], list[float]]:
    """Levels of each row, and the level of the jump's end, from the same random numbers."""
    rows, ends = [], []
    for at, below, top, zero in torch.rand(4, count, generator=generator).T.tolist():
        first = 0 if top < config.top else int(at * (19 - h))
        last = first + h + int(below * (19 - h - first))
        rows.append(LEVELS[first : first + h + 1])
        ends.append(0.0 if zero < config.zero else LEVELS[last])
    return rows, ends


def row_jump(model: Denoiser, x: torch.Tensor, t: float, s: float) -> torch.Tensor:
    """Jump of one row (1, C, H, W)."""
    if t == 0:
        return x
    return s / t * x + (1 - s / t) * model(x, torch.tensor([t]), None, None, torch.tensor([s]))


def formula(
    config: CTMConfig, model: Denoiser, target: Denoiser | None, teacher: Denoiser, rows: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """The two sides of the distance, row by row from the definition, and the generator as it is then."""
    generator, sides = seeded(), []
    levels, ends = paths(config.solver_steps, config, rows.size, generator)
    assert rows.real is not None
    z = torch.randn(rows.real.shape, generator=generator)
    for n, (path, s) in enumerate(zip(levels, ends, strict=True)):
        x_t = x = rows.real[n : n + 1] + path[0] * z[n : n + 1]
        for sigma, following in itertools.pairwise(path):
            x = ode_step(teacher, x, torch.tensor([sigma]), torch.tensor([following]), None, solver=config.solver)
        with torch.no_grad():
            end = row_jump(model, x, path[-1], s)
        start = row_jump(model, x_t, path[0], s)
        if config.compare == "predictions":
            start = model(x_t, torch.tensor([path[0]]), None, None, torch.tensor([s]))
            end = (end - s / path[0] * x_t) / (1 - s / path[0])
        if config.mapped:
            outer = target or copy.deepcopy(model).requires_grad_(False)
            start, end = row_jump(outer, start, s, 0.0), row_jump(outer, end, s, 0.0)
        sides.append((start, end.detach()))
    return torch.cat([start for start, _ in sides]), torch.cat([end for _, end in sides]), generator


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_decay": 0.0},
        {"solver": "euler", "solver_steps": 5},
        {"compare": "jumps", "top": 0.5},
        {"compare": "predictions", "solver_steps": 1, "zero": 0.5},
        {"zero": 1.0, "solver_steps": 1},
        {"compare": "images", "zero": 0.5},
    ],
)
def test_gradients_are_those_of_the_formula(changes: dict[str, Any], student: Denoiser, others: dict[str, Denoiser]) -> None:
    config, rows, twin = dataclasses.replace(PLAIN, **changes), batch(12), copy.deepcopy(student)
    start, end, _ = formula(config, twin, others["average"] if config.target_decay else None, others["teacher"], rows)
    loss = (start - end).square().mean()
    loss.backward()
    objective = made(config, others)
    figures = objective.backward(Learner(student, OPTIMIZER), None, rows, seeded())
    assert figures.keys() == {"trajectory"}
    assert float(figures["trajectory"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    wanted = gradients(twin)
    torch.testing.assert_close(gradients(student), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    objective.backward(Learner(student, OPTIMIZER), None, dataclasses.replace(rows, weight=0.5), seeded())
    torch.testing.assert_close(gradients(student), 1.5 * wanted, rtol=1e-3, atol=2e-4 * float(wanted.abs().max()))


def test_jumps_to_zero_are_consistency_distillation(student: Denoiser, others: dict[str, Denoiser]) -> None:
    """With s = 0, h = 1 and the student as its own target: |f(x_t, t) - sg f(x_u, u)|^2 on neighbouring levels."""
    config, rows, twin = dataclasses.replace(PLAIN, zero=1.0, solver_steps=1), batch(24), copy.deepcopy(student)
    generator = seeded()
    t, u = torch.tensor(paths(1, config, 24, generator)[0]).T
    assert rows.real is not None
    x_t = rows.real + t[:, None, None, None] * torch.randn(rows.real.shape, generator=generator)
    x_u = ode_step(others["teacher"], x_t, t, u, None)
    zero = torch.zeros(24)
    with torch.no_grad():
        inner = twin(x_u, torch.where(u > 0, u, 1.0), None, None, zero)
        end = torch.where(u[:, None, None, None] > 0, inner, x_u)
    assert 0 < int((u == 0).sum()) < 24
    (twin(x_t, t, None, None, zero) - end).square().mean().backward()
    objective = made(config, others)
    assert objective.state() is None  # nothing is mapped: no target network
    objective.backward(Learner(student, OPTIMIZER), None, rows, seeded())
    wanted = gradients(twin)
    torch.testing.assert_close(gradients(student), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.fixture
def colour_probe() -> Probe:
    torch.manual_seed(0)
    config = ProbeNetworkConfig(widths=(8, 12), strides=(1, 2))
    return Probe(config, channels=2, num_classes=3).eval().requires_grad_(False)


@pytest.mark.parametrize("adversarial", [0.0, 0.5])
def test_terms_are_balanced_at_the_last_layer(
    adversarial: float, student: Denoiser, others: dict[str, Denoiser], colour_probe: Probe
) -> None:
    config = dataclasses.replace(
        PLAIN, distance="probe", denoising_weight=0.7, adversarial_weight=adversarial, discriminator=CRITIC
    )
    rows, twin = batch(6), copy.deepcopy(student)
    start, end, generator = formula(config, twin, others["average"], others["teacher"], rows)
    assert rows.real is not None
    v = ctm.denoising_levels(6, generator)
    x_v = rows.real + v[:, None, None, None] * torch.randn(rows.real.shape, generator=generator)
    weight = ((v**2 + 0.25) / (0.5 * v) ** 2)[:, None, None, None]
    terms = [
        perceptual(colour_probe, start, end).mean(),
        (weight * (twin(x_v, v) - rows.real).square()).mean(),
    ]
    objective = made(config, others, colour_probe)
    critic = None
    if objective.adversary is not None:
        judge = objective.adversary.discriminator.eval()  # spectral norms stand still, so that both sides see the same
        critic = Learner(judge, OPTIMIZER)
        terms.append(-judge(judge.look(start, generator), None)[0].mean())
    norms = [float(torch.autograd.grad(term, last_layer(twin), retain_graph=True)[0].norm()) for term in terms]
    shares = [1.0, *(norms[0] / (norm + 1e-4) for norm in norms[1:])]
    weights = [1.0, 0.7, adversarial]
    assert not adversarial or 0.01 < shares[2] < 10
    total = sum(w * share * term for w, share, term in zip(weights, shares, terms, strict=False))
    assert isinstance(total, torch.Tensor)
    total.backward()
    if critic is not None:
        critic.optimizer.zero_grad()
    figures = objective.backward(Learner(student, OPTIMIZER), critic, rows, seeded())
    assert float(figures["denoising_lambda"]) == pytest.approx(shares[1], rel=1e-2)
    assert ("lambda" in figures) == bool(adversarial)
    wanted = gradients(twin)
    torch.testing.assert_close(gradients(student), wanted, rtol=1e-2, atol=2e-3 * float(wanted.abs().max()))
    assert all(p.grad is None for model in others.values() for p in model.parameters())
    assert objective.target is not None
    assert all(p.grad is None for p in objective.target.parameters())


def test_long_stretches_are_likelier() -> None:
    objective = CTM.__new__(CTM)
    objective.config = CTMConfig(solver_steps=4)
    for start in (0, 1):  # also where student and critic would alternate
        counts = Counter(objective.solver_steps(step) for step in range(start, 4000, 2))
        assert [counts[h] / 2000 for h in (1, 2, 3, 4)] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.01)
    objective.config = CTMConfig(solver_steps=17)
    assert {objective.solver_steps(step) for step in range(400)} == set(range(1, 18))
    assert objective.turns(7).work == objective.solver_steps(7)
    objective.config = CTMConfig(solver_steps=17).representative()
    counts = Counter(objective.solver_steps(step) for step in range(counting.CYCLE))
    assert counts == {11: 20, 12: 40}  # mean 35/3
    objective.config = CTMConfig(solver_steps=5, solver_law="constant")
    assert {objective.solver_steps(step) for step in range(50)} == {5}


def test_costs_are_those_of_the_mean_stretch() -> None:
    probe = ProbeNetworkConfig(widths=(8, 12), strides=(1, 2))

    def cost(**changes: Any) -> float:
        return counting.phase_flops(small.NETWORK, probe, dataclasses.replace(PLAIN, **changes))

    one, weighted = cost(solver_steps=1), cost(solver_steps=2, solver_law="weighted")  # means 1 and 5/3, Heun's method
    assert weighted - one == pytest.approx(2 / 3 * 2 * counting.evaluation(small.NETWORK), rel=0.05)
    critic, state = counting.phase_bytes(small.NETWORK, probe, dataclasses.replace(PLAIN, solver_law="weighted"))
    assert critic == 0
    assert state == pytest.approx(counting.network_bytes(dataclasses.replace(small.NETWORK, second_level=True)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("classes", [0, small.CLASSES])
def test_it_trains_a_network(precision: Any, classes: int, probe: Probe) -> None:
    """The full loss falls, with and without labels, and the target follows the student."""
    network = dataclasses.replace(small.NETWORK, label_dim=classes, second_level=True)
    torch.manual_seed(0)
    teacher = build(dataclasses.replace(network, second_level=False)).requires_grad_(False)
    model = build(network)
    config = CTMConfig(solver_steps=2, target_decay=0.5, adversarial_weight=0.1, discriminator=CRITIC)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    features = {"probe": Frozen(probe)}
    objective = config.build(
        Context(image_shape=(1, 8, 8), num_classes=classes, models={"teacher": teacher}, features=features, average=average)
    )
    assert objective.critic is not None
    learner = Learner(model, OPTIMIZER, precision=precision)
    critic = Learner(objective.critic, OPTIMIZER, precision=precision)
    labels = torch.eye(classes)[torch.arange(8) % classes] if classes else None
    before, losses, figures = copy.deepcopy(objective.state()), [], {}
    for step in range(8):
        rows = batch(8, step=step, real=torch.randn(8, 1, 8, 8, generator=seeded(1)), real_labels=labels)
        figures = objective.backward(learner, critic, rows, seeded())
        losses.append(float(figures["denoising"]))
        learner.update(step, 8)
        critic.update(step, 8)
        objective.after_step(model)
    assert all(value.isfinite() and not value.requires_grad and value.ndim == 0 for value in figures.values())
    assert losses[-1] < losses[0]
    assert before is not None
    assert objective.target is not None
    for first, now, ours in zip(before.parameters(), objective.target.parameters(), model.parameters(), strict=True):
        if not torch.equal(first, ours):
            assert float((now - ours.detach()).norm()) < float((first - ours.detach()).norm())
            assert not now.requires_grad


def test_the_target_is_a_slow_average(student: Denoiser, others: dict[str, Denoiser]) -> None:
    objective = made(dataclasses.replace(PLAIN, target_decay=0.9), others)
    objective.after_step(student)
    state = objective.state()
    assert state is not None
    for now, start, ours in zip(state.parameters(), others["average"].parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * start + 0.1 * ours.detach(), rtol=1e-4, atol=1e-6)
        assert not now.requires_grad
    for without in ({"target_decay": 0.0}, {"compare": "jumps"}, {"zero": 1.0}):
        assert made(dataclasses.replace(PLAIN, **without), others).state() is None  # pyright: ignore[reportArgumentType]


def test_the_target_is_in_the_checkpoint(tmp_path: Path) -> None:
    """A training that continues from a checkpoint has the target of the one that wrote it."""
    place = small.workspace(tmp_path / "ws")
    phase = PhaseConfig(
        iterations=4, optimizer=OPTIMIZER, objective=dataclasses.replace(CTMConfig(), solver_steps=2, target_decay=0.8)
    )
    config = StudentConfig(name="ctm", phases={"trajectories": phase}, batch_size=4, ema_half_lives=(3.0,), checkpoint_every=9)

    def training() -> Any:
        session = loop.Session(folder=Folder(str(tmp_path / "student")))
        return student_training(session=session, workspace=place, recipe="digits", config=config, **small.plans(place))

    first, second = training(), training()
    for step in range(2):
        first.step(step)
    saved = first.state_dict()
    assert saved["objective"]
    assert any(not torch.equal(saved["objective"][name], weights) for name, weights in saved["averages"][0].items())
    second.load_state_dict(copy.deepcopy(saved))
    for task in (first, second):
        for step in range(2, 4):
            task.step(step)
    one, two = first.state_dict(), second.state_dict()
    assert all(torch.equal(one["objective"][name], weights) for name, weights in two["objective"].items())
    assert all(torch.equal(one["student"]["model"][name], weights) for name, weights in two["student"]["model"].items())


def test_settings() -> None:
    full = dataclasses.replace(CTMConfig(), adversarial_weight=1.0)
    assert full.needs() == Needs(images=True, models=("teacher",), features=("probe",), second_level=True)
    assert full.about() == "consistency trajectories, perceptual distance (probe), denoising, adversarial term"
    assert CHEAP.needs() == Needs(images=True, models=("teacher",), second_level=True)
    assert (CHEAP.sampling().rule, CHEAP.sampling().trained_steps) == ("line", None)
    with pytest.raises(SettingError, match="solver_steps is 19; expected at most num_steps, 18"):
        CTMConfig(solver_steps=19)
    with pytest.raises(SettingError, match="compare is 'jumps'; expected 'images' or zero 1"):
        dataclasses.replace(full, compare="jumps")
    dataclasses.replace(full, compare="jumps", zero=1.0)
    assert full.representative() == dataclasses.replace(full, zero=0.3, top=0.2, solver_law="mean").representative()
