"""Consistency models: laws of the levels, training of the network, adversarial term, settings and cost."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from beeline import counting
from beeline.config import NetworkConfig, OptimizerConfig, ProbeNetworkConfig
from beeline.denoiser import Denoiser
from beeline.errors import SettingError
from beeline.features import Frozen
from beeline.features.probe import Probe
from beeline.objectives import Batch, Context, Needs
from beeline.objectives.discriminator import DiscriminatorConfig
from beeline.objectives.learner import Learner
from beeline.objectives.maps.consistency import ConsistencyConfig, draw_indices, ect_following, lognormal_law
from beeline.objectives.perceptual import pseudo_huber
from beeline.schedule import edm_sigmas

OPTIMIZER = OptimizerConfig(lr=1e-3)
ECT = ConsistencyConfig()
CD = ConsistencyConfig(teacher="teacher", levels="schedule", num_steps=6, weighting="none", distance="l2")
CT = ConsistencyConfig(levels="ct", weighting="none", distance="l2", target_decay=0.9)
ICT = ConsistencyConfig(levels="ict", neighbours="lognormal", huber_c=None)
ADVERSARIAL = replace(CD, adversarial_weight=0.5, discriminator=DiscriminatorConfig(optimizer=OPTIMIZER, width=8, augment=()))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def context(average: nn.Module, teacher: nn.Module | None = None, probe: Probe | None = None) -> Context:
    torch.manual_seed(0)
    return Context(
        image_shape=getattr(average, "image_shape", (1, 1, 2)),
        num_classes=getattr(average, "label_dim", 0),
        models={} if teacher is None else {"teacher": teacher},  # pyright: ignore[reportArgumentType]
        features={} if probe is None else {"probe": Frozen(probe)},
        average=average,  # pyright: ignore[reportArgumentType]
    )


def images(count: int, channels: int = 2) -> torch.Tensor:
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def test_equal_images_have_a_finite_gradient() -> None:
    """The plain norm would have the gradient of sqrt(0)."""
    x = torch.ones(2, 1, 2, 2, requires_grad=True)
    pseudo_huber(x, torch.ones(2, 1, 2, 2), c=1e-8).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) == 0
    zeros, threes = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0)
    assert float(ECT.build_distance(context(nn.Identity()))(zeros, threes)) == pytest.approx(6.0, abs=1e-6)
    for c in (0.00108, 2.0):  # None stands for 0.00054 sqrt(4)
        config = replace(ECT, huber_c=None if c < 1 else c)
        distance = config.build_distance(context(nn.Identity()))(zeros, threes)
        assert float(distance) == pytest.approx(math.sqrt(36 + c * c) - c, abs=1e-6)


# Laws of the levels


def test_sizes_and_decays_of_growing_schedules() -> None:
    """Against values by hand: CT with s0 2, s1 150, mu0 .9; iCT with K' = floor(K / (log2(128) + 1))."""
    assert [CT.size(k, 800_000) for k in (0, 1, 200_000, 400_000, 800_000)] == [2, 3, 76, 107, 151]
    assert CT.decay(0, 800_000) == pytest.approx(0.9)
    assert CT.decay(800_000, 800_000) == pytest.approx(math.exp(2 * math.log(0.9) / 151))
    sizes = [ICT.size(k, 400_000) for k in (0, 49_999, 50_000, 100_000, 349_999, 350_000, 400_000)]
    assert sizes == [11, 11, 21, 41, 641, 1281, 1281]
    assert [replace(ICT, sizes=(4, 16)).size(k, 2) for k in (0, 1)] == [5, 9]
    assert (CD.size(0, 10), CD.size(9, 10)) == (6, 6)
    assert replace(CD, target_decay=0.95).decay(7, 10) == 0.95
    assert replace(ECT, target_decay=0.95).decay(7, 10) == 0.95


def test_levels_of_ect() -> None:
    """r(t) by hand at t = 1, where n(t) = 1 + 8 / (1 + e) = 3.15153; stages of equal length."""
    t = torch.ones(1)
    wanted = [0.0, 1 - 3.15153 / 4, 1 - 3.15153 / 8, 1 - 3.15153 / 256]
    assert [float(ect_following(t, stage, 2.0)) for stage in (0, 1, 2, 7)] == pytest.approx(wanted, abs=1e-5)
    assert float(ect_following(torch.tensor([80.0]), 0, 2.0)) == pytest.approx(40.0)
    for step, stage in ((0, 0), (9, 0), (10, 1), (79, 7)):  # 80 steps, 8 stages of 10
        batch = Batch(size=50_000, step=step, total=80)
        t, u = ECT.draw(batch, seeded())
        torch.testing.assert_close(u, ect_following(t, stage, 2.0))
    assert float(t.log().mean()) == pytest.approx(-1.1, abs=0.05)
    assert float(t.log().std()) == pytest.approx(2.0, abs=0.05)
    assert bool((u < t).all())


def test_law_of_ict() -> None:
    """p(i) is the mass of N(-1.1, 2^2) between neighbours in ln t, by numerical integration, and draws follow it."""
    levels = edm_sigmas(11)
    grid = np.linspace(-40, math.log(80), 400_001)
    density = np.exp(-((grid + 1.1) ** 2) / 8)
    which = np.searchsorted(-np.log(levels.numpy()), -grid, side="right") - 1
    mass = np.bincount(which.clip(0, 10), weights=density, minlength=11)
    law = lognormal_law(torch.cat([levels, torch.zeros(1, dtype=torch.float64)]), -1.1, 2.0)
    np.testing.assert_allclose(law.numpy(), mass / mass.sum(), atol=2e-5)
    shares = torch.bincount(draw_indices(200_000, 11, law, seeded()), minlength=11) / 200_000
    torch.testing.assert_close(shares.double(), law, rtol=0, atol=0.005)
    t, u = ICT.draw(Batch(size=200_000, step=0, total=10), seeded())
    counts = torch.stack([(t == level).double().mean() for level in levels.float()])
    torch.testing.assert_close(counts, law, rtol=0, atol=0.005)
    following = torch.cat([levels[1:], torch.zeros(1)]).float()
    assert {*zip(t.tolist(), u.tolist(), strict=True)} == {*zip(levels.float().tolist(), following.tolist(), strict=True)}


def test_uniform_neighbours() -> None:
    t, _ = CD.draw(Batch(size=60_000, step=0, total=10), seeded())
    shares = torch.stack([(t == level).double().mean() for level in edm_sigmas(6).float()])
    torch.testing.assert_close(shares, torch.full((6,), 1 / 6, dtype=torch.float64), rtol=0, atol=0.01)


# Adversarial term, settings, cost


def test_the_discriminator_warms_up_first(make_denoiser: Callable[..., Denoiser], probe: Probe) -> None:
    """Until `adversarial_start` the student's gradient is that of the distance alone, while the discriminator learns."""
    teacher, found = make_denoiser(num_blocks=2, img_channels=1), {}
    for name, config in (("plain", CD), ("late", replace(ADVERSARIAL, adversarial_start=0.5)), ("now", ADVERSARIAL)):
        student = copy.deepcopy(make_denoiser(img_channels=1)).requires_grad_(True).train()
        objective = config.build(context(student, teacher, probe))
        critic = None if objective.critic is None else Learner(objective.critic, OPTIMIZER)
        learner = Learner(student, OPTIMIZER)
        for step in (4, 5):
            student.zero_grad()
            batch = Batch(size=4, step=step, total=10, real=images(4, 1))
            objective.backward(learner, critic, batch, seeded())
            found[name, step] = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
            if critic is not None:
                assert any(p.grad is not None and bool(p.grad.any()) for p in critic.parameters)
    scale = float(found["plain", 4].abs().max())
    torch.testing.assert_close(found["late", 4], found["plain", 4], rtol=1e-3, atol=1e-4 * scale)
    assert float((found["late", 5] - found["plain", 5]).abs().max()) > 0.01 * scale
    assert float((found["now", 4] - found["plain", 4]).abs().max()) > 0.01 * scale


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [ECT, ICT, replace(ADVERSARIAL, target_decay=0.9), replace(CT, distance="probe")])
def test_trains_the_network(
    config: ConsistencyConfig,
    precision: Literal["fp32", "bf16"],
    labels: bool,
    make_denoiser: Callable[..., Denoiser],
    probe: Probe,
) -> None:
    network = make_denoiser(img_channels=1, label_dim=4 if labels else 0, dropout=0.1)
    student = copy.deepcopy(network).requires_grad_(True).train()
    where = context(network, copy.deepcopy(network), probe)
    objective = config.build(where)
    learner = Learner(student, OPTIMIZER, precision=precision)
    critic = None if objective.critic is None else Learner(objective.critic, OPTIMIZER, precision=precision)
    classes = torch.eye(4)[torch.arange(8) % 4] if labels else None
    for step in range(3):
        batch = Batch(size=8, step=step, total=3, real=images(8, 1), real_labels=classes)
        figures = objective.backward(learner, critic, batch, seeded())
        assert all(value.ndim == 0 and bool(value.isfinite()) and not value.requires_grad for value in figures.values())
        assert learner.update(step, 3)["skipped"] == 0
        if critic is not None:
            assert critic.update(step, 3)["skipped"] == 0
        objective.after_step(student)
    changed = [not torch.equal(a, b) for a, b in zip(student.parameters(), network.parameters(), strict=True)]
    assert all(changed)
    if objective.target is not None:
        assert all(not torch.equal(a, b) for a, b in zip(objective.target.parameters(), network.parameters(), strict=True))


def test_needs_and_words() -> None:
    assert ECT.needs() == Needs(images=True)
    assert CD.needs() == Needs(images=True, models=("teacher",))
    assert replace(ADVERSARIAL, distance="lpips").needs().features == ("vgg16", "probe")
    assert ECT.about() == "consistency training with ECT's levels, pixel distance (Huber)"
    assert ADVERSARIAL.about() == "consistency distillation, pixel distance (L2), adversarial term"
    how = CD.sampling()
    assert (how.num_steps, how.rule, how.line, how.trained_steps) == (6, "fresh_noise", "ve", None)


def test_settings_without_a_meaning_are_refused() -> None:
    with pytest.raises(SettingError, match="neighbours is 'lognormal'; expected uniform with levels 'ect'"):
        replace(ECT, neighbours="lognormal")
    with pytest.raises(SettingError, match="sizes is"):
        replace(ECT, sizes=(2, 10))
    with pytest.raises(SettingError, match="sizes is"):
        replace(CT, sizes=(10, 2))
    for change in ({"q": 1.0}, {"target_decay": 1.0}, {"stages": 0}, {"huber_c": 0.0}, {"teacher": "../teacher"}):
        with pytest.raises(SettingError, match=next(iter(change))):
            replace(ECT, **change)


def test_cost_of_a_step() -> None:
    """In evaluations: student 3 (forward and backward), target 1, teacher 1 or 2. Settings of equal cost are counted once."""
    network = NetworkConfig(
        kind="ddpmpp", img_resolution=8, img_channels=1, label_dim=4, model_channels=16, channel_mult=(1,), num_blocks=1,
        attn_resolutions=(8,),
    )  # fmt: skip
    probe = ProbeNetworkConfig(widths=(8, 12), strides=(1, 2))
    one = counting.evaluation(network)
    for config, cost in ((ECT, 4), (CD, 6)):
        assert counting.phase_flops(network, probe, config) / one == pytest.approx(cost, abs=0.1)
    assert counting.phase_flops(network, probe, ADVERSARIAL) > counting.phase_flops(network, probe, CD)
    assert counting.phase_bytes(network, probe, replace(CD, target_decay=0.5))[1] == counting.network_bytes(network)
    assert counting.phase_bytes(network, probe, CD)[1] == 0
    for same in (replace(CD, num_steps=9), replace(CD, levels="ect"), replace(CD, weighting="inverse", pixel_weight=0.3)):
        assert same.representative() == CD.representative()
    for other in (ECT, replace(CD, solver="euler"), replace(CD, target_decay=0.5), replace(CD, distance="probe"), ADVERSARIAL):
        assert other.representative() != CD.representative()
