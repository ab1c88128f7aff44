"""Straightness: 0 for a student that sees the end of every line, 1 for one that always answers with the mean image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from beeline.schedule import edm_sigmas
from beeline.straightness import straightness

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
