"""One step of the ODE for training: the steps of `solve`, with a level of its own for each row."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch

from beeline.sampling.solvers import ode_step, solve
from beeline.schedule import edm_sigmas

SIGMA_D = 0.5
Solver = Literal["heun", "euler"]


class Gaussian:
    """The ideal denoiser of data N(0, SIGMA_D^2); records its levels."""

    def __init__(self) -> None:
        self.levels: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        self.levels.append(sigma)
        assert sigma.shape == (len(x),)
        assert bool((sigma > 0).all())
        return x * (SIGMA_D**2 / (SIGMA_D**2 + sigma**2)).to(x.dtype)[:, None, None, None]


def rows(count: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def exact(x: torch.Tensor, sigma: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    return x * ((SIGMA_D**2 + to**2) / (SIGMA_D**2 + sigma**2)).sqrt()[:, None, None, None]


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_steps_follow_each_other_as_in_solve(solver: Solver, num_steps: int) -> None:
    sigmas = [*edm_sigmas(num_steps).tolist(), 0.0]
    x = 80.0 * rows()
    for sigma, to in itertools.pairwise(sigmas):
        x = ode_step(Gaussian(), x, torch.full((5,), sigma), torch.full((5,), to), None, solver=solver)
    wanted = solve(Gaussian(), rows().float(), None, solver=solver, num_steps=num_steps)
    torch.testing.assert_close(x.float(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_each_row_has_its_levels(solver: Solver) -> None:
    """Rows do not see each other, and the end of a row may be 0, where Heun's method takes Euler's step."""
    sigma, to = torch.tensor([80.0, 5.0, 0.3, 2.0, 0.002]), torch.tensor([40.0, 0.5, 0.0, 2.0, 0.0])
    together = ode_step(Gaussian(), rows(), sigma, to, None, solver=solver)
    for k in range(5):
        (alone,) = ode_step(Gaussian(), rows()[k : k + 1], sigma[k : k + 1], to[k : k + 1], None, solver=solver)
        assert torch.equal(together[k], alone)
    euler = ode_step(Gaussian(), rows(), sigma, to, None, solver="euler")
    denoised = Gaussian()(rows(), sigma, None)
    ratio = (to / sigma)[:, None, None, None]
    torch.testing.assert_close(euler, ratio * rows() + (1 - ratio) * denoised)
    ended = to == 0
    assert torch.equal(together[ended], euler[ended])
    torch.testing.assert_close(together[ended], denoised[ended])
    torch.testing.assert_close(together[3], rows()[3])  # a step from a level to itself
    if solver == "heun":
        assert not torch.allclose(together[:2], euler[:2], atol=1e-2)


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_the_error_of_a_step_has_its_order(solver: Solver, order: int) -> None:
    """Halving a step divides its error by 4 (Euler) or 8 (Heun)."""

    def error(size: float) -> float:
        sigma = torch.tensor([2.0, 0.7, 0.4, 1.0, 3.0], dtype=torch.float64)
        to = sigma * (1 - size)
        return float((ode_step(Gaussian(), rows(), sigma, to, None, solver=solver) - exact(rows(), sigma, to)).norm())

    assert error(0.02) / error(0.01) == pytest.approx(2**order, rel=0.1)


def test_evaluations_and_gradients() -> None:
    """Euler's step costs one evaluation, Heun's two; no gradient passes, float32 stays, Heun is the default."""
    counts: dict[Solver, int] = {"euler": 1, "heun": 2}
    for solver, count in counts.items():
        denoiser, x = Gaussian(), rows(dtype=torch.float32).requires_grad_()
        moved = ode_step(denoiser, x, torch.full((5,), 2.0), torch.full((5,), 1.0), None, solver=solver)
        assert (len(denoiser.levels), moved.dtype, moved.requires_grad) == (count, torch.float32, False)
    sigma, to = torch.full((5,), 2.0), torch.full((5,), 1.0)
    heun = ode_step(Gaussian(), rows(), sigma, to, None, solver="heun")
    assert torch.equal(ode_step(Gaussian(), rows(), sigma, to, None), heun)
