"""Points on the line from image to noise, and the distributions of noise levels."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from beeline.objectives.lines import Line, draw_levels, point
from beeline.sampling.few_step import FewStep, RuleName, few_step
from beeline.schedule import SIGMA_MAX, SIGMA_MIN, edm_sigmas

X1 = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
NOISE = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def test_points_of_both_lines() -> None:
    sigma = torch.tensor([0.002, 10.0, 79.0])
    for i, s in enumerate(sigma.tolist()):
        torch.testing.assert_close(point(X1, NOISE, sigma, "ve")[i], X1[i] + s * NOISE[i])
        torch.testing.assert_close(point(X1, NOISE, sigma, "lerp")[i], (1 - s / 80) * X1[i] + s * NOISE[i])


def test_lerp_at_sigma_max_is_exactly_the_sampling_input() -> None:
    sigma = torch.full((3,), SIGMA_MAX)
    assert torch.equal(point(X1, NOISE, sigma, "lerp"), SIGMA_MAX * NOISE)
    assert not torch.equal(point(X1, NOISE, sigma, "ve"), SIGMA_MAX * NOISE)


@pytest.mark.parametrize("line", ["ve", "lerp"])
def test_lines_end_at_the_image(line: Literal["ve", "lerp"]) -> None:
    assert torch.equal(point(X1, NOISE, torch.zeros(3), line), X1)


def draw(law: Literal["schedule", "sigma"], steps: tuple[int, ...] | None, seed: int = 0, count: int = 3600) -> torch.Tensor:
    return draw_levels(count, num_steps=18, law=law, steps=steps, generator=torch.Generator().manual_seed(seed))


def test_schedule_law_is_uniform_over_the_levels() -> None:
    values, counts = draw("schedule", None).unique(return_counts=True)
    assert torch.equal(values, edm_sigmas(18).float().flip(0))
    assert counts.sum() == 3600
    assert ((counts > 140) & (counts < 260)).all()  # 200 expected, standard deviation 14


@pytest.mark.parametrize("law", ["schedule", "sigma"])
@pytest.mark.parametrize("steps", [(0,), (0, 1), (0, 5, 17)])
def test_sot_draws_only_its_steps(law: Literal["schedule", "sigma"], steps: tuple[int, ...]) -> None:
    values, counts = draw(law, steps).unique(return_counts=True)
    assert torch.equal(values, edm_sigmas(18).float()[list(steps)].flip(0))
    assert (counts > 3600 / len(steps) * 0.85).all()


def test_sigma_law_is_uniform_in_sigma() -> None:
    levels = draw("sigma", None)
    assert levels.min() >= SIGMA_MIN
    assert levels.max() <= SIGMA_MAX
    deciles = torch.histc(levels, 10, SIGMA_MIN, SIGMA_MAX)
    assert ((deciles > 280) & (deciles < 440)).all()  # 360 expected, standard deviation 18


@pytest.mark.parametrize(("law", "steps"), [("schedule", None), ("sigma", None), ("schedule", (0, 1))])
def test_levels_are_a_function_of_the_generator(law: Literal["schedule", "sigma"], steps: tuple[int, ...] | None) -> None:
    assert draw(law, steps, seed=3).dtype == torch.float32
    assert torch.equal(draw(law, steps, seed=3), draw(law, steps, seed=3))
    assert not torch.equal(draw(law, steps, seed=3), draw(law, steps, seed=4))


class Linear(torch.nn.Module):
    """The best L2 denoiser of Gaussian pairs: at each level the regression of x1 on the points of the line."""

    def __init__(self, x1: torch.Tensor, noise: torch.Tensor, line: Line) -> None:
        super().__init__()
        self.x1, self.noise = x1, noise
        self.line: Line = line

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        seen = point(self.x1, self.noise, sigma[:1].expand(len(self.x1)), self.line).double()
        return (x * float((self.x1 * seen).sum() / seen.square().sum())).to(x.dtype)


@pytest.mark.parametrize("std", [0.25 * 32 * 3**0.5, 0.25 * 64 * 3**0.5])  # of mean luminance times pixels, 32x32 and 64x64
@pytest.mark.parametrize("steps", [(0,), (0, 1), (0, 3, 5)])
def test_gaussian_data_keep_their_spread_on_the_segment(std: float, steps: tuple[int, ...]) -> None:
    """For data ~ N(0, std^2), the teacher's ODE maps x0 to k x0 with k = std / sqrt(std^2 + 80^2). A perfect student's images
    should have the same spread.

    With `lerp` and `line` they do, for any steps. With `ve`, one step gives 1 / (1 + k) of the spread, because the student has
    learned from x1 + x0 but samples from x0; each further step brings it closer.
    """
    noise = torch.randn(200, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = std / (std**2 + SIGMA_MAX**2) ** 0.5
    x1 = k * SIGMA_MAX * noise

    def spread(line: Line, rule: RuleName) -> float:
        how = FewStep(num_steps=18, rule=rule, line=line)
        return float(few_step(Linear(x1, noise, line), noise, None, steps=steps, how=how).std() / x1.std())

    assert spread("lerp", "line") == pytest.approx(1, rel=1e-5)
    levels = [float(edm_sigmas(18)[i]) / SIGMA_MAX for i in steps]
    image = k / (1 + k)  # in units of x0
    for level in levels[1:]:
        image = (image + level) * k / (k + level)
    assert spread("ve", "same_noise") == pytest.approx(image / k, rel=1e-5)
    if steps == (0,):
        assert image / k == pytest.approx(1 / (1 + k))
        assert image / k < 0.86
