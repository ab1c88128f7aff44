"""The distances of the line loss: values, zero at equality, and where their gradients go."""

from __future__ import annotations

import pytest
import torch

from beeline.features import Probe
from beeline.perceptual import l2, perceptual


def images(seed: int, channels: int = 1) -> torch.Tensor:
    return torch.rand(3, channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Pixels:
    """A feature network that sees the image, and the image at twice its size."""

    tap_channels = (2, 2)

    def taps(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images, images.repeat_interleave(2, dim=2)]


def test_l2_is_the_mean_squared_difference_of_each_image() -> None:
    a = torch.zeros(2, 1, 2, 2)
    b = torch.stack([torch.full((1, 2, 2), 0.5), torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])])
    assert l2(a, b).tolist() == [0.25, 1.0]


@pytest.mark.parametrize("pixel_weight", [0.0, 0.3])
def test_perceptual_value(pixel_weight: float) -> None:
    a, b = images(0, 2), images(1, 2)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).mean(dim=(1, 2))
    wanted = 2 * (2 - 2 * cosine) + pixel_weight * l2(a, b)  # |u - v|^2 = 2 - 2 cos for unit vectors, two equal taps
    torch.testing.assert_close(perceptual(Pixels(), a, b, pixel_weight), wanted, rtol=1e-4, atol=1e-5)


def test_perceptual_of_equal_images_is_zero(probe: Probe) -> None:
    assert perceptual(probe, images(0), images(0), 0.1).tolist() == [0, 0, 0]
    assert (perceptual(probe, images(0), images(1), 0.0) > 1e-3).all()


def test_features_without_signal_have_finite_gradients() -> None:
    a = torch.zeros(1, 2, 4, 4, requires_grad=True)
    perceptual(Pixels(), a, torch.zeros(1, 2, 4, 4), 0.0).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_gradient_reaches_the_images_and_nothing_else(probe: Probe) -> None:
    ours, targets = images(0).requires_grad_(), images(1)
    perceptual(probe, ours, targets, 0.0).sum().backward()
    assert ours.grad is not None
    assert (ours.grad.abs().amax(dim=(1, 2, 3)) > 1e-5).all()
    assert all(parameter.grad is None for parameter in probe.parameters())


def test_gradient_descent_approaches_the_target(probe: Probe) -> None:
    ours, targets = images(0).requires_grad_(), images(1)
    before = perceptual(probe, ours, targets, 0.1).sum().item()
    optimizer = torch.optim.Adam([ours], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        loss = perceptual(probe, ours, targets, 0.1).sum()
        loss.backward()
        optimizer.step()
    assert float(perceptual(probe, ours.detach(), targets, 0.1).sum()) < before / 3
