"""The fake score: what it learns, what it starts from, when it learns, and the student's inputs at several levels."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import small
import torch
from closed_form import Gaussian

from beeline.checkpoint import build
from beeline.config import OptimizerConfig
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError, SettingError
from beeline.objectives import Batch, Context
from beeline.objectives.learner import Learner
from beeline.objectives.scores.dmd import DMDConfig
from beeline.objectives.scores.fake_score import denoising_loss, draw_levels, error_scale, fake_score, noisy, simulated_inputs
from beeline.sampling.few_step import few_step
from beeline.sampling.inference import prepare

ADAM = OptimizerConfig(lr=1e-3)
SD = 0.5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_of(count: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, 1, 1, 1, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("law", ["karras", "lognormal"])
def test_the_minimiser_is_the_denoiser_of_the_images(law: Any) -> None:
    """Its loss has no gradient at the law of the images, and a descent direction towards it elsewhere."""
    images = 0.3 * noise_of(200_000) + 0.2
    x, sigma = noisy(images, law, (0.2, 0.8), seeded())

    def slopes(std: float, mean: float) -> torch.Tensor:
        fake = Gaussian(std, mean)
        denoising_loss(fake(x, sigma), images, sigma).backward()
        assert fake.std.grad is not None
        assert fake.mean.grad is not None
        return torch.stack([fake.std.grad, fake.mean.grad])

    exact, above, below = slopes(0.3, 0.2), slopes(0.36, 0.26), slopes(0.24, 0.14)
    assert (above > 0).all()
    assert (below < 0).all()
    assert (exact.abs() < 0.06 * above).all()  # 200,000 images


def test_the_loss_is_that_of_teachers() -> None:
    """Weight (s^2 + sd^2) / (s sd)^2, by hand."""
    images, denoised, sigma = torch.zeros(2, 1, 1, 2), torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1), torch.tensor([0.5, 2.0])
    wanted = (1 * (0.25 + 0.25) / 0.0625 + 4 * (4 + 0.25) / 1.0) / 2
    assert float(denoising_loss(denoised.expand(2, 1, 1, 2), images, sigma)) == pytest.approx(wanted)


def test_levels_follow_their_laws() -> None:
    levels = draw_levels(100_000, "karras", (0.0, 1.0), seeded())
    assert [float(levels.quantile(u)) for u in (0.02, 0.5, 0.8, 0.98)] == pytest.approx([0.0032, 2.5, 24.4, 71.7], rel=0.05)
    some = draw_levels(100_000, "karras", (0.5, 0.8), seeded())
    assert float(some.min()) == pytest.approx(2.5, rel=0.02)
    assert float(some.max()) == pytest.approx(24.4, rel=0.02)
    logs = draw_levels(100_000, "lognormal", (0.0, 1.0), seeded()).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.02)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.02)


def test_the_scale_has_a_floor() -> None:
    images = torch.tensor([[1.0, -3.0], [0.0, 0.0]]).reshape(2, 1, 1, 2)
    assert error_scale(images, torch.zeros_like(images)).flatten().tolist() == pytest.approx([2.0, 1e-5])


def context_of(teacher: Denoiser, average: Denoiser) -> Context:
    return Context(
        image_shape=average.image_shape,
        num_classes=average.label_dim,
        models={"teacher": teacher},
        features={},
        average=average,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_starts_as_the_teacher_or_as_the_student(precision: Any) -> None:
    network = replace(small.NETWORK, augment_dim=9)
    student, original = build(small.NETWORK).requires_grad_(False).eval(), build(network)
    teacher = prepare(original, precision=precision)
    fake = fake_score(context_of(teacher, student), start="teacher")
    assert fake.training
    assert all(parameter.requires_grad for parameter in fake.parameters())
    for name, tensor in fake.state_dict().items():
        torch.testing.assert_close(tensor, original.state_dict()[name], rtol=1e-2 if precision == "bf16" else 0, atol=0)
        assert tensor.dtype == torch.float32
    copied = fake_score(context_of(teacher, student), start="student")
    assert all(torch.equal(tensor, student.state_dict()[name]) for name, tensor in copied.state_dict().items())
    next(copied.parameters()).data.add_(1)  # not those of the student's average
    assert not torch.equal(next(copied.parameters()), next(student.parameters()))


def test_a_teacher_of_another_network_is_refused() -> None:
    student, teacher = build(small.NETWORK), build(replace(small.NETWORK, model_channels=32))
    with pytest.raises(BeelineError, match="set the objective's fake_start to student"):
        fake_score(context_of(teacher, student), start="teacher")
    fake_score(context_of(teacher, student), start="student")


@pytest.mark.parametrize(
    ("changes", "setting"),
    [({"start_levels": (1.0, 2.5)}, "start_levels"), ({"span": (0.8, 0.2)}, "span"), ({"fake_steps": 0}, "fake_steps")],
)
def test_settings_are_checked(changes: dict[str, Any], setting: str) -> None:
    with pytest.raises(SettingError, match=f"{setting} is "):
        DMDConfig(**changes)


def test_the_student_is_sampled_at_its_own_levels() -> None:
    one, two = DMDConfig().sampling(), DMDConfig(start_levels=(80.0, 2.5)).sampling()
    assert (one.num_steps, one.levels, one.trained_steps) == (1, (2.5,), (0,))
    assert (two.levels, two.rule, two.trained_steps) == ((80.0, 2.5), "fresh_noise", (0, 1))


def test_several_levels_train_on_what_sampling_gives() -> None:
    """The inputs of each row are those of the sampler with the rule "fresh_noise" and the same noise."""
    levels, student = (40.0, 5.0, 0.7), Learner(Gaussian(0.5, 0.3), ADAM)
    batch = Batch(size=6, step=3, total=10, noise=noise_of(6))
    assert batch.noise is not None
    x, sigma = simulated_inputs(student, batch, levels, seeded())
    assert sigma.tolist() == pytest.approx([0.7, 0.7, 5.0, 5.0, 40.0, 40.0])
    source = seeded()
    fresh = [torch.randn(rows, 1, 1, 1, generator=source) for rows in (4, 2)]
    seen: list[torch.Tensor] = []

    def recording(x: torch.Tensor, sigma: torch.Tensor, labels: Any) -> torch.Tensor:
        seen.append(x)
        return student.model(x, sigma)

    how = DMDConfig(start_levels=levels).sampling()
    few_step(recording, batch.noise[:2], None, steps=(0, 1, 2), how=how, fresh=lambda n: fresh[n][:2])
    torch.testing.assert_close(x[:2].float(), seen[2].float(), rtol=1e-5, atol=1e-6)
    few_step(
        recording, batch.noise[2:4], None, steps=(0, 1), how=replace(how, trained_steps=(0, 1)), fresh=lambda n: fresh[n][2:]
    )
    torch.testing.assert_close(x[2:4].float(), seen[4].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x[4:], 40 * batch.noise[4:])
    assert not x.requires_grad


def test_every_level_has_its_turn() -> None:
    """Also for micro-batches smaller than the number of levels."""
    student, levels, config = Learner(Gaussian(0.5), ADAM), (40.0, 10.0, 5.0, 0.7), DMDConfig(start_levels=(4.0, 3.0, 2.0, 1.0))
    for size in (1, 3, 8):
        rows = [
            simulated_inputs(student, Batch(size=size, step=step, total=9, noise=noise_of(size)), levels, seeded())[1]
            for step in range(4)
        ]
        counts = [int((torch.cat(rows) == torch.tensor(level)).sum()) for level in levels]
        assert counts == [size] * 4
    turns = replace(config, fake_start="student", fake_steps=5).build(context_of(Gaussian(0.5), Gaussian(0.5))).turns
    assert [turns(step).student for step in range(10)] == [False] * 4 + [True] + [False] * 4 + [True]
    assert all(turns(step).critic for step in range(10))
    assert [turns(step).work for step in range(5)] == [0, 1, 2, 3, 0]


def test_equal_costs_are_counted_once() -> None:
    """`representative` keeps the number of levels, and makes equally costly settings equal."""
    config = DMDConfig(start_levels=(80.0, 2.5), span=(0.1, 0.3), levels="lognormal", fake_start="student")
    other = dataclasses.replace(config, start_levels=(7.0, 0.5), span=(0.0, 1.0), levels="karras", fake_start="teacher")
    assert config.representative() == other.representative()
    assert config.representative() != replace(config, start_levels=(2.5,)).representative()
    assert config.representative() != replace(config, fake_steps=2).representative()
