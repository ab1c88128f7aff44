"""Straightness: 0 for a student that sees the end of every line, 1 for one that always answers with the mean image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from beeline.schedule import edm_sigmas
from beeline.straightness import straightness, trajectories

X1 = torch.rand(40, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
NOISE = torch.randn(40, 2, 4, 4, generator=torch.Generator().manual_seed(1))
SIGMAS = edm_sigmas(6)
LABELS = torch.arange(40)


class Answer(nn.Module):
    """A denoiser made of a function; keeps what it was asked."""

    def __init__(self, answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.answer, self.asked = answer, []

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        self.asked.append((x, sigma, labels))
        return self.answer(x, sigma[:, None, None, None])


def measure(answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[float]:
    return straightness(Answer(answer), X1, NOISE, LABELS, SIGMAS)


def test_perfect_denoiser_is_straight() -> None:
    assert measure(lambda x, sigma: X1) == [0] * 6


def test_the_mean_image_scores_one() -> None:
    assert measure(lambda x, sigma: X1.mean(dim=0).expand_as(X1)) == pytest.approx([1] * 6, rel=1e-5)


def test_levels_are_measured_each_for_itself() -> None:
    variance = float(X1.double().var(dim=0, correction=0).mean())
    values = measure(lambda x, sigma: X1 + sigma)
    assert values == pytest.approx((SIGMAS**2 / variance).tolist(), rel=1e-4, abs=1e-6)


def test_it_asks_at_points_of_the_line() -> None:
    denoiser = Answer(lambda x, sigma: x)
    straightness(denoiser, X1, NOISE, LABELS, SIGMAS)
    assert len(denoiser.asked) == 6
    for sigma, (x, level, labels) in zip(SIGMAS.float(), denoiser.asked, strict=True):
        torch.testing.assert_close(x, X1 + sigma * NOISE)
        assert torch.equal(level, sigma.expand(40))
        assert labels is LABELS


def test_a_flow_to_one_image_is_straight_and_even() -> None:
    straight, uneven = trajectories(Answer(lambda x, sigma: X1), NOISE, LABELS, num_steps=6)
    assert straight == pytest.approx([0] * 6, abs=1e-9)
    assert uneven == pytest.approx([0] * 6, abs=1e-3)


def test_a_gaussians_flow_is_as_curved_as_its_closed_form() -> None:
    """Of N(0, v), D = x v / (v + sigma^2) and x_sigma = x_max sqrt((v + sigma^2) / (v + sigma_max^2)): straight in direction,
    uneven in speed."""
    v, sigmas = 0.25, edm_sigmas(60)
    straight, uneven = trajectories(Answer(lambda x, sigma: x * v / (v + sigma**2)), NOISE, None, num_steps=60)
    end = v**0.5
    along = (v + sigmas**2).sqrt()
    expected = (v / along - end) ** 2 / end**2  # E|D - x_0|^2 / Var(x_0), x_0 being of variance v
    second = float(NOISE.double().square().mean() / NOISE.double().var(dim=0, correction=0).mean())
    assert straight == pytest.approx((expected * second).tolist(), rel=0.05, abs=2e-3)
    rest = (along - end) / sigmas
    assert uneven == pytest.approx((rest / rest[0] - 1).abs().tolist(), rel=0.05, abs=2e-2)
