"""Objectives: their gradients equal those of the formulas, written out independently here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch

from beeline.config import OptimizerConfig, ProbeNetworkConfig
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError, SettingError
from beeline.features import Frozen
from beeline.features.probe import Probe
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, Turns
from beeline.objectives.adversarial import last_layer
from beeline.objectives.discriminator import DiscriminatorConfig
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.learner import Learner
from beeline.objectives.lines import draw_levels
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.objectives.perceptual import perceptual
from beeline.objectives.rectified_flow import RectifiedFlowConfig

OPTIMIZER = OptimizerConfig(lr=1e-3)
LINES = LinesMatchingConfig(num_steps=6, distance="l2")
ADVERSARIAL = replace(
    LINES, adversarial_weight=0.5, discriminator=DiscriminatorConfig(optimizer=OPTIMIZER, width=8, augment=())
)


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
    return Batch(size=count, step=0, total=10, noise=noise, x1=x1, real=real, weight=weight)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def context(average: Denoiser, **features: Probe) -> Context:
    torch.manual_seed(0)
    frozen = {name: Frozen(network) for name, network in features.items()}
    return Context(image_shape=(2, 8, 8), num_classes=0, models={}, features=frozen, average=average)


def gradients(model: torch.nn.Module) -> torch.Tensor:
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in found])


def segment(x1: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return points of the segment from x1 to 80 z."""
    sigma = sigma[:, None, None, None]
    return (1 - sigma / 80) * x1 + sigma * z


def formula(name: str, model: Denoiser, rows: Batch) -> torch.Tensor:
    """Compute the loss of an objective from its definition."""
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


@pytest.mark.parametrize(("name", "config"), [("lmm", LINES), ("kd", DistillationConfig()), ("rf", RectifiedFlowConfig())])
def test_gradients_are_those_of_the_formula(name: str, config: ObjectiveConfig, student: Denoiser) -> None:
    twin, rows = copy.deepcopy(student), batch()
    loss = formula(name, twin, rows)
    loss.backward()
    objective = config.build(context(student))
    assert (objective.critic, objective.state(), objective.turns(0)) == (None, None, Turns(student=True, critic=True))
    learner = Learner(student, OPTIMIZER)
    (figure,) = objective.backward(learner, None, rows, seeded()).values()
    assert float(figure) == pytest.approx(float(loss.detach()), rel=1e-4)
    wanted = gradients(twin)
    torch.testing.assert_close(gradients(student), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    objective.backward(learner, None, replace(rows, weight=0.5), seeded())  # adds, at the weight of the rows
    torch.testing.assert_close(gradients(student), 1.5 * wanted, rtol=1e-3, atol=2e-4 * float(wanted.abs().max()))


def test_the_adversarial_phase_leaves_both_gradients(student: Denoiser, colour_probe: Probe) -> None:
    """The student's gradient is that of L_lines + weight lambda L_adv, the critic's that of the hinge loss; neither leaks."""
    config = replace(ADVERSARIAL, distance="probe", pixel_weight=0.1)
    objective = config.build(context(student, probe=colour_probe))
    assert objective.adversary is not None
    assert objective.critic_optimizer == OPTIMIZER
    objective.adversary.discriminator.eval()  # spectral norms stand still, so that both sides see the same
    critic, rows, twin = Learner(objective.adversary.discriminator, OPTIMIZER), batch(), copy.deepcopy(student)
    judge = copy.deepcopy(objective.adversary.discriminator)
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
    torch.testing.assert_close(
        gradients(objective.adversary.discriminator), wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max())
    )
    assert float(figures["real_positive"]) == pytest.approx(float((real > 0).float().mean()))


def test_frozen_networks_see_the_generated_images_once(student: Denoiser, colour_probe: Probe) -> None:
    """Per step, the distance sees both images, the discriminator the generated and the real ones, and nothing more."""
    where = context(student, probe=colour_probe)
    seen: list[bool] = []
    frozen = where.features["probe"]
    taps = frozen.taps
    frozen.taps = lambda images: (seen.append(torch.is_grad_enabled()), taps(images))[1]  # pyright: ignore[reportAttributeAccessIssue]
    objective = replace(ADVERSARIAL, distance="probe").build(where)
    assert objective.adversary is not None
    objective.backward(Learner(student, OPTIMIZER), Learner(objective.adversary.discriminator, OPTIMIZER), batch(), seeded())
    assert sorted(seen) == [False, False, True, True]  # x1 and real images without gradients, the generated ones twice with


def test_real_images_are_mirrored_where_asked(student: Denoiser, colour_probe: Probe) -> None:
    seen: list[torch.Tensor] = []
    for mirror in (False, True):
        config = replace(ADVERSARIAL, discriminator=replace(ADVERSARIAL.discriminator, mirror=mirror))
        objective = config.build(context(student, probe=colour_probe))
        assert objective.adversary is not None
        look = objective.adversary.discriminator.look
        objective.adversary.discriminator.look = lambda images, generator, look=look: (
            seen.append(images),
            look(images, generator),
        )[1]
        rows = batch(16)
        objective.backward(Learner(student, OPTIMIZER), Learner(objective.adversary.discriminator, OPTIMIZER), rows, seeded())
        assert rows.real is not None
        kept = (seen[-1] == rows.real).flatten(1).all(dim=1)
        flipped = (seen[-1] == rows.real.flip(-1)).flatten(1).all(dim=1)
        assert bool((kept ^ flipped).all())
        assert 0 < int(flipped.sum()) < 16 if mirror else not bool(flipped.any())


@pytest.mark.parametrize(("distance", "network"), [("johnson", "vgg16"), ("lpips_avg", "vgg16_avg")])
def test_distances_name_their_network(distance: Literal["johnson", "lpips_avg"], network: str) -> None:
    assert replace(LINES, distance=distance).needs().features == (network,)


def test_needs_follow_the_switches() -> None:
    def needs(config: LinesMatchingConfig, *networks: str) -> Needs:
        critics = replace(ADVERSARIAL.discriminator, networks=networks or ("probe",))  # pyright: ignore[reportArgumentType]
        return replace(config, discriminator=critics).needs()

    assert needs(LINES) == Needs(pairs=True)
    assert needs(replace(LINES, distance="lpips")).features == ("vgg16",)
    adversarial = replace(ADVERSARIAL, distance="probe")
    found = needs(adversarial, "tf_efficientnet_lite0", "probe", "scratch")
    assert found == Needs(pairs=True, images=True, features=("probe", "tf_efficientnet_lite0"))
    with pytest.raises(SettingError, match="expected a rule that follows the line 've'"):
        replace(LINES, line="ve")
    with pytest.raises(SettingError, match="resize is 8; expected 16 or more"):
        replace(LINES, distance="lpips", resize=8)


@pytest.mark.parametrize("distance", ["lpips", "lpips_avg", "johnson"])
def test_images_too_small_for_a_distance_are_refused(distance: Literal["lpips", "lpips_avg", "johnson"]) -> None:
    config = replace(LINES, distance=distance)
    with pytest.raises(BeelineError, match=f"the distance '{distance}' would run at 8 pixels"):
        config.check(8)
    config.check(16)
    replace(config, resize=16).check(8)
    for fine in (LINES, replace(LINES, distance="probe"), DistillationConfig(), RectifiedFlowConfig()):
        fine.check(1)


def test_needs_of_two_phases() -> None:
    """Each need is listed once, in the order of its first use."""
    first = Needs(pairs=True, models=("teacher",), features=("vgg16", "probe"))
    second = Needs(images=True, models=("students/lmm", "teacher"), features=("probe", "vgg16_avg"), second_level=True)
    both = Needs(
        pairs=True, images=True, models=("teacher", "students/lmm"), features=("vgg16", "probe", "vgg16_avg"), second_level=True
    )
    assert first | second == both
    assert (second | first).features == ("probe", "vgg16_avg", "vgg16")
    assert (Needs() | Needs(noise=True)) == (Needs(noise=True) | Needs()) == Needs(noise=True)
    assert both | both == both


class Alternating(Objective):
    """An objective whose critic learns four times per step of the student."""

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return {}

    def turns(self, step: int) -> Turns:
        return Turns(student=step % 5 == 4, critic=step % 5 != 4)


class Plain(Objective):
    """The minimum that an objective must define."""

    backward = Alternating.backward


def test_turns(student: Denoiser) -> None:
    """All networks learn in every step, unless the objective says otherwise."""
    plain = Plain()
    assert [plain.turns(step) for step in range(3)] == [Turns(student=True, critic=True)] * 3
    assert (plain.critic, plain.critic_optimizer, plain.state(), plain.after_step(student)) == (None, None, None, None)
    found = [Alternating().turns(step) for step in range(10)]
    assert [turns.student for turns in found] == [False, False, False, False, True] * 2
    assert [turns.critic for turns in found] == [True, True, True, True, False] * 2
    with pytest.raises(TypeError, match="abstract"):
        Objective()  # pyright: ignore[reportAbstractUsage]
    with pytest.raises(TypeError, match="abstract"):
        ObjectiveConfig()  # pyright: ignore[reportAbstractUsage]


def test_how_students_are_sampled() -> None:
    assert (DistillationConfig(num_steps=6).sampling().num_steps, DistillationConfig().sampling().trained_steps) == (6, (0,))
    flow = RectifiedFlowConfig(num_steps=6).sampling()
    assert (flow.num_steps, flow.rule, flow.line, flow.trained_steps) == (6, "line", "ve", None)
    sot = replace(LINES, line="ve", rule="same_noise", steps=(0, 3)).sampling()
    assert (sot.num_steps, sot.rule, sot.line, sot.trained_steps) == (6, "same_noise", "ve", (0, 3))
    assert LINES.sampling().trained_steps is None


def test_methods_in_words() -> None:
    assert LINES.about() == "lines, pixel distance (L2)"
    full = replace(ADVERSARIAL, distance="lpips", steps=(0, 3))
    assert full.about() == "lines, perceptual distance (LPIPS, VGG16), adversarial term, SOT at steps 0,3"
    assert DistillationConfig().about() == "end points alone: knowledge distillation, L2"
    assert RectifiedFlowConfig().about() == "rectified flow on the same pairs"


def test_like_steps_are_counted_once() -> None:
    """The representative leaves out settings that do not affect the cost of a step, and keeps the others."""
    rate = replace(ADVERSARIAL.discriminator, optimizer=replace(OPTIMIZER, lr=0.5))
    for alike in (
        replace(ADVERSARIAL, adversarial_weight=0.1),
        replace(ADVERSARIAL, pixel_weight=0.3),
        replace(ADVERSARIAL, steps=(0, 3)),
        replace(ADVERSARIAL, discriminator=rate),
    ):
        assert alike.representative() == ADVERSARIAL.representative()
    wide = replace(ADVERSARIAL.discriminator, width=16)
    for other in (LINES, replace(ADVERSARIAL, distance="probe"), replace(ADVERSARIAL, discriminator=wide)):
        assert other.representative() != ADVERSARIAL.representative()
    assert DistillationConfig().representative() == DistillationConfig()
