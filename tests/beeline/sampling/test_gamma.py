"""Gamma sampling: its ends are the rules "line" and "fresh_noise", and a perfect flow map samples its data at any gamma."""

from __future__ import annotations

import pytest
import torch

from beeline.denoiser import Denoiser
from beeline.sampling.few_step import FewStep, few_step
from beeline.schedule import SIGMA_MIN

SIGMA_D = 0.5


class ExactMap(Denoiser):
    """The flow map of data N(0, SIGMA_D^2): the jump from t to s ends at x sqrt((SIGMA_D^2 + s^2) / (SIGMA_D^2 + t^2))."""

    @property
    def takes_second_level(self) -> bool:
        return True

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity(), img_resolution=8, img_channels=1, label_dim=0)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: torch.Tensor, sigma: torch.Tensor, labels: None, to: torch.Tensor
    ) -> torch.Tensor:
        sigma, to = sigma.reshape(-1, 1, 1, 1), to.reshape(-1, 1, 1, 1)
        end = x * ((SIGMA_D**2 + to**2) / (SIGMA_D**2 + sigma**2)).sqrt()
        return ((end - to / sigma * x) / (1 - to / sigma)).float()


def noise(seed: int, count: int = 8) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def sampled(rule: str, steps: tuple[int, ...], count: int = 8) -> torch.Tensor:
    how = FewStep(num_steps=18, rule=rule)
    return few_step(ExactMap(), noise(0, count), None, steps=steps, how=how, fresh=lambda n: noise(10 + n, count))


def test_its_ends_are_line_and_fresh_noise() -> None:
    steps = (0, 5, 11)
    torch.testing.assert_close(sampled("gamma 0", steps), sampled("line", steps))
    torch.testing.assert_close(sampled("gamma 1", steps), sampled("fresh_noise", steps), rtol=0, atol=10 * SIGMA_MIN**2)
    assert not torch.allclose(sampled("gamma 0", steps), sampled("gamma 0.5", steps), atol=1e-2)


@pytest.mark.parametrize("gamma", ["0.2", "0.5", "0.9"])
def test_a_perfect_flow_map_samples_its_data(gamma: str) -> None:
    """The jump ends below the next level, and the new noise leads back to it: the variance stays right."""
    images = sampled(f"gamma {gamma}", (0, 4, 8, 11, 14), count=512)
    assert float(images.std()) == pytest.approx(SIGMA_D, rel=0.02)


def test_the_jump_leaves_room_for_the_new_noise() -> None:
    """From level 80 to 3.257 with gamma 0.6: the map is asked for 0.8 times that level."""
    asked: list[float] = []

    class Asked(ExactMap):
        def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, x: torch.Tensor, sigma: torch.Tensor, labels: None, to: torch.Tensor
        ) -> torch.Tensor:
            asked.append(float(to[0]))
            return super().forward(x, sigma, labels, to)

    how = FewStep(num_steps=18, rule="gamma 0.6")
    few_step(Asked(), noise(0), None, steps=(0, 8), how=how, fresh=lambda n: torch.zeros_like(noise(0)))
    assert asked == pytest.approx([0.8 * how.sigmas((8,))[0], 0.0])
