"""Straightness is 0 for a student that predicts the end of every line, and 1 for one that always predicts the mean image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from beeline.metrics.straightness import straightness, trajectories
from beeline.objectives.lines import Line
from beeline.schedule import SIGMA_MAX, edm_sigmas

X1 = torch.rand(40, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
NOISE = torch.randn(40, 2, 4, 4, generator=torch.Generator().manual_seed(1))
SIGMAS = edm_sigmas(6)
LABELS = torch.arange(40)


class Answer(nn.Module):
    """A denoiser made from a function; records its inputs."""

    def __init__(self, answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.answer, self.asked = answer, []

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        self.asked.append((x, sigma, labels))
        return self.answer(x, sigma[:, None, None, None])


def measure(answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[float]:
    return straightness(Answer(answer), X1, NOISE, LABELS, SIGMAS, line="ve")


def test_perfect_denoiser_is_straight() -> None:
    assert measure(lambda x, sigma: X1) == [0] * 6


def test_the_mean_image_scores_one() -> None:
    assert measure(lambda x, sigma: X1.mean(dim=0).expand_as(X1)) == pytest.approx([1] * 6, rel=1e-5)


def test_levels_are_measured_each_for_itself() -> None:
    variance = float(X1.double().var(dim=0, correction=0).mean())
    values = measure(lambda x, sigma: X1 + sigma)
    assert values == pytest.approx((SIGMAS**2 / variance).tolist(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("line", ["ve", "lerp"])
def test_it_asks_at_points_of_the_line(line: Line) -> None:
    denoiser = Answer(lambda x, sigma: x)
    straightness(denoiser, X1, NOISE, LABELS, SIGMAS, line=line)
    assert len(denoiser.asked) == 6
    for sigma, (x, level, labels) in zip(SIGMAS.float(), denoiser.asked, strict=True):
        torch.testing.assert_close(x, (X1 if line == "ve" else (1 - sigma / SIGMA_MAX) * X1) + sigma * NOISE)
        assert torch.equal(level, sigma.expand(40))
        assert labels is LABELS


@pytest.mark.parametrize("line", ["ve", "lerp"])
def test_the_best_student_of_gaussian_pairs_scores_as_its_closed_form(line: Line) -> None:
    """For independent x1 ~ N(0, v) and noise ~ N(0, 1), the best prediction at a x1 + sigma noise is a v x / (a^2 v + sigma^2).
    Its error is sigma^2 / (a^2 v + sigma^2) of the variance. v is large, so that the two lines differ by half at sigma_max."""
    v, count = SIGMA_MAX**2, 20_000
    draw = torch.Generator().manual_seed(2)
    x1, noise = (scale * torch.randn(count, 1, 2, 2, generator=draw) for scale in (SIGMA_MAX, 1.0))

    def share(sigma: torch.Tensor, line: Line) -> torch.Tensor:
        return torch.ones_like(sigma) if line == "ve" else 1 - sigma / SIGMA_MAX

    def best(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        a = share(sigma, line)
        return a * v * x / (a**2 * v + sigma**2)

    a = share(SIGMAS, line)
    expected = (SIGMAS**2 / (a**2 * v + SIGMAS**2)).tolist()
    assert expected[0] == pytest.approx(0.5 if line == "ve" else 1.0)
    found = straightness(Answer(best), x1, noise, None, SIGMAS, line=line)
    assert found == pytest.approx(expected, rel=0.03)
    other = straightness(Answer(best), x1, noise, None, SIGMAS, line="lerp" if line == "ve" else "ve")
    # a student of "lerp" answers 0 at sigma_max, whatever it sees; elsewhere points of the other line only look worse
    assert all(there >= here * 0.99 for here, there in zip(found[1:], other[1:], strict=True))
    assert other[1] > 1.05 * found[1]


def test_a_flow_to_one_image_is_straight_and_even() -> None:
    straight, uneven = trajectories(Answer(lambda x, sigma: X1), NOISE, LABELS, num_steps=6)
    assert straight == pytest.approx([0] * 6, abs=1e-9)
    assert uneven == pytest.approx([0] * 6, abs=1e-3)


def test_a_gaussians_flow_is_as_curved_as_its_closed_form() -> None:
    """For N(0, v), D = x v / (v + sigma^2) and x_sigma = x_max sqrt((v + sigma^2) / (v + sigma_max^2)): straight in direction,
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
