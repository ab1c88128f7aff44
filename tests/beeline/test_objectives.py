"""Objectives: the gradients they leave are those of their formulas, written out anew here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch

from beeline import objectives
from beeline.config import DiscriminatorConfig, LmmConfig, OptimizerConfig, PhaseConfig, ProbeNetworkConfig
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.features import Frozen, Probe
from beeline.learner import Learner
from beeline.lines import draw_levels
from beeline.objectives import Batch, Setting
from beeline.objectives.lmm import LinesMatching, last_layer
from beeline.perceptual import perceptual

OPTIMIZER = OptimizerConfig(lr=1e-3)
PHASE = PhaseConfig(iterations=10, optimizer=OPTIMIZER, distance="l2")
CONFIG = LmmConfig(
    num_steps=6, reconstruction=PHASE, adversarial=replace(PHASE, adversarial_weight=0.5),
    discriminator=DiscriminatorConfig(optimizer=OPTIMIZER, width=8, augment=()),
)  # fmt: skip


@pytest.fixture
def student(make_denoiser: Callable[..., Denoiser]) -> Denoiser:
    return copy.deepcopy(make_denoiser()).requires_grad_(True).train()


@pytest.fixture
def colour_probe() -> Probe:
    torch.manual_seed(0)
    config = ProbeNetworkConfig(widths=(8, 12), strides=(1, 2))
    return Probe(config, channels=2, num_classes=3).eval().requires_grad_(False)


def batch(count: int = 4, weight: float = 1.0) -> Batch:
    rows = torch.Generator().manual_seed(1)
    noise, x1, real = (torch.randn(count, 2, 8, 8, generator=rows) for _ in range(3))
    return Batch(noise=noise, x1=x1, real=real, weight=weight)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def setting(config: LmmConfig, phase: PhaseConfig, **features: Probe) -> Setting:
    torch.manual_seed(0)
    frozen = {name: Frozen(network) for name, network in features.items()}
    return Setting(config=config, phase=phase, image_shape=(2, 8, 8), num_classes=0, features=frozen)


def gradients(model: torch.nn.Module) -> torch.Tensor:
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in found])


def segment(x1: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Points of the segment from x1 to 80 z."""
    sigma = sigma[:, None, None, None]
    return (1 - sigma / 80) * x1 + sigma * z


def formula(name: str, model: Denoiser, rows: Batch) -> torch.Tensor:
    """The loss of an objective, by its definition."""
    x1, z, generator = rows.x1, rows.noise, seeded()
    assert x1 is not None
    assert z is not None
    if name == "kd":
        return (model(80.0 * z, torch.full((len(x1),), 80.0)) - x1).square().mean()
    if name == "rf":
        t = torch.rand(len(x1), generator=generator)
        t = (0.002 / 1.002 + (80 / 81 - 0.002 / 1.002) * t).double()[:, None, None, None]
        x_t = (1 - t) * x1 + t * z
        denoised = model((x_t / (1 - t)).float(), (t / (1 - t)).flatten().float())
        return ((x_t - denoised) / t - (z - x1)).square().mean()
    sigma = draw_levels(len(x1), num_steps=6, law="schedule", steps=None, generator=generator)
    return (model(segment(x1, z, sigma), sigma) - x1).square().mean()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("lmm", "beeline.objectives.lmm:LinesMatching"),
        ("kd", "beeline.objectives.kd:Distillation"),
        ("rf", "beeline.objectives.rectified_flow:RectifiedFlow"),
    ],
)
def test_gradients_are_those_of_the_formula(name: str, path: str, student: Denoiser) -> None:
    twin, rows = copy.deepcopy(student), batch()
    loss = formula(name, twin, rows)
    loss.backward()
    objective = objectives.load(path)(setting(CONFIG, PHASE))
    learner = Learner(student, OPTIMIZER)
    (figure,) = objective.backward(learner, None, rows, seeded()).values()
    assert float(figure) == pytest.approx(float(loss.detach()), rel=1e-4)
    wanted = gradients(twin)
    torch.testing.assert_close(gradients(student), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    objective.backward(learner, None, replace(rows, weight=0.5), seeded())  # adds, at the weight of the rows
    torch.testing.assert_close(gradients(student), 1.5 * wanted, rtol=1e-3, atol=2e-4 * float(wanted.abs().max()))


def test_the_adversarial_phase_leaves_both_gradients(student: Denoiser, colour_probe: Probe) -> None:
    """The student's is that of L_lines + weight lambda L_adv, the critic's that of the hinge loss; neither leaks."""
    phase = replace(CONFIG.adversarial, distance="probe", pixel_weight=0.1)
    objective = LinesMatching(setting(CONFIG, phase, probe=colour_probe))
    assert objective.critic is not None
    objective.critic.eval()  # spectral norms stand still, so that both sides see the same
    critic, rows, twin = Learner(objective.critic, OPTIMIZER), batch(), copy.deepcopy(student)
    judge = copy.deepcopy(objective.critic)
    figures = objective.backward(Learner(student, OPTIMIZER), critic, rows, seeded())

    assert rows.x1 is not None
    assert rows.noise is not None
    assert rows.real is not None
    sigma = draw_levels(4, num_steps=6, law="schedule", steps=None, generator=seeded())
    images = twin(segment(rows.x1, rows.noise, sigma), sigma)
    lines = perceptual(colour_probe, images, rows.x1, pixel_weight=0.1).mean()
    fooling = -judge(judge.look(images, seeded()), None)[0].mean()
    norms = [torch.autograd.grad(loss, last_layer(twin), retain_graph=True)[0].norm() for loss in (lines, fooling)]
    balance = float(norms[0] / (norms[1] + 1e-4))
    assert 0.01 < balance < 10
    assert float(figures["lambda"]) == pytest.approx(balance, rel=1e-3)
    (lines + 0.5 * balance * fooling).backward()
    wanted = gradients(twin)
    torch.testing.assert_close(gradients(student), wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max()))

    judge.zero_grad()
    real, fake = (judge(judge.look(x.detach(), seeded()), None)[0] for x in (rows.real, images))
    loss = torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()
    loss.backward()
    assert float(figures["critic"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    wanted = gradients(judge)
    torch.testing.assert_close(gradients(objective.critic), wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max()))
    assert float(figures["real_positive"]) == pytest.approx(float((real > 0).float().mean()))


def test_frozen_networks_see_the_generated_images_once(student: Denoiser, colour_probe: Probe) -> None:
    """Per step: the distance looks at both images, the discriminator at the generated and the real ones, and that is all."""
    phase = replace(CONFIG.adversarial, distance="probe")
    where = setting(CONFIG, phase, probe=colour_probe)
    seen: list[bool] = []
    frozen = where.features["probe"]
    taps = frozen.taps
    frozen.taps = lambda images: (seen.append(torch.is_grad_enabled()), taps(images))[1]  # pyright: ignore[reportAttributeAccessIssue]
    objective = LinesMatching(where)
    assert objective.critic is not None
    objective.backward(Learner(student, OPTIMIZER), Learner(objective.critic, OPTIMIZER), batch(), seeded())
    assert sorted(seen) == [False, False, True, True]  # x1 and real images without gradients, the generated ones twice with


def test_real_images_are_mirrored_where_asked(student: Denoiser, colour_probe: Probe) -> None:
    seen: list[torch.Tensor] = []
    for mirror in (False, True):
        config = replace(CONFIG, discriminator=replace(CONFIG.discriminator, mirror=mirror))
        objective = LinesMatching(setting(config, CONFIG.adversarial, probe=colour_probe))
        assert objective.critic is not None
        look = objective.critic.look
        objective.critic.look = lambda images, generator, look=look: (seen.append(images), look(images, generator))[1]
        rows = batch(16)
        objective.backward(Learner(student, OPTIMIZER), Learner(objective.critic, OPTIMIZER), rows, seeded())
        assert rows.real is not None
        kept = (seen[-1] == rows.real).flatten(1).all(dim=1)
        flipped = (seen[-1] == rows.real.flip(-1)).flatten(1).all(dim=1)
        assert bool((kept ^ flipped).all())
        assert 0 < int(flipped.sum()) < 16 if mirror else not bool(flipped.any())


@pytest.mark.parametrize(("distance", "network"), [("johnson", "vgg16"), ("lpips_avg", "vgg16_avg")])
def test_distances_name_their_network(distance: Literal["johnson", "lpips_avg"], network: str) -> None:
    assert LinesMatching.needs(CONFIG, replace(PHASE, distance=distance)).features == (network,)


def test_needs_follow_the_switches() -> None:
    def needs(phase: PhaseConfig, *networks: str) -> objectives.Needs:
        critics = replace(CONFIG.discriminator, networks=networks or ("probe",))  # pyright: ignore[reportArgumentType]
        return LinesMatching.needs(replace(CONFIG, discriminator=critics), phase)

    assert needs(PHASE) == objectives.Needs(pairs=True)
    assert needs(replace(PHASE, distance="lpips")).features == ("vgg16",)
    adversarial = needs(replace(PHASE, distance="probe", adversarial_weight=1.0), "tf_efficientnet_lite0", "probe", "scratch")
    assert adversarial == objectives.Needs(pairs=True, images=True, features=("probe", "tf_efficientnet_lite0"))
    with pytest.raises(BeelineError, match="does not follow the line"):
        LinesMatching.needs(replace(CONFIG, line="ve"), PHASE)
    with pytest.raises(BeelineError, match="the distance 'lpips' is asked for at 8 pixels"):
        LinesMatching.needs(CONFIG, replace(PHASE, distance="lpips", resize=8))


@pytest.mark.parametrize("path", ["nonsense", "beeline.objectives.lmm:Nothing", "no.such.module:Class", ""])
def test_an_objective_that_is_not_there(path: str) -> None:
    with pytest.raises(BeelineError, match="cannot be loaded"):
        objectives.load(path)
