"""Distances of the line loss: values, zero at equality, and where their gradients go."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from beeline.features.probe import Probe
from beeline.objectives.perceptual import johnson, l2, perceptual, pseudo_huber


def images(seed: int, channels: int = 1) -> torch.Tensor:
    return torch.rand(3, channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Pixels:
    """A feature network whose taps are the image, and the image at twice its size."""

    tap_channels, tap_strides, tap_weights = (2, 2), (1, 1), None

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
    torch.testing.assert_close(perceptual(Pixels(), a, b, pixel_weight=pixel_weight), wanted, rtol=1e-4, atol=1e-5)


class Weighted(Pixels):
    """Pixels with learned channel weights."""

    tap_weights = (torch.tensor([0.5, 2.0]), torch.tensor([0.0, 1.0]))


def test_learned_weights_count_channels() -> None:
    a, b = images(0, 2), images(1, 2)
    difference = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().mean(dim=(2, 3))
    wanted = 0.5 * difference[:, 0] + 3.0 * difference[:, 1]
    torch.testing.assert_close(perceptual(Weighted(), a, b), wanted, rtol=1e-4, atol=1e-5)


def test_features_are_taken_at_the_side_asked_for() -> None:
    a, b = images(0, 2), images(1, 2)
    sides = []

    class Watched(Pixels):
        def taps(self, images: torch.Tensor) -> list[torch.Tensor]:
            sides.append(tuple(images.shape[2:]))
            return super().taps(images)

    large = perceptual(Watched(), a, b, side=24)
    assert sides == [(24, 24), (24, 24)]
    enlarged = [F.interpolate(x, (24, 24), mode="bilinear", align_corners=False) for x in (a, b)]
    torch.testing.assert_close(large, perceptual(Pixels(), *enlarged))


def test_pseudo_huber_is_between_the_distance_and_its_square() -> None:
    a = images(0)
    c = 0.00054 * 8
    for size in (1e-6, 1e-3, 10.0):
        b = a + size / 8  # |a - b| = size, over 64 pixels
        wanted = (size**2 + c**2) ** 0.5 - c
        torch.testing.assert_close(pseudo_huber(a.double(), b.double()), torch.full((3,), wanted).double(), rtol=0.2, atol=1e-9)
    assert pseudo_huber(a, a).tolist() == [0, 0, 0]


def test_perceptual_of_equal_images_is_zero(probe: Probe) -> None:
    assert perceptual(probe, images(0), images(0), pixel_weight=0.1).tolist() == [0, 0, 0]
    assert (perceptual(probe, images(0), images(1), pixel_weight=0.0) > 1e-3).all()


def test_features_without_signal_have_finite_gradients() -> None:
    a = torch.zeros(1, 2, 4, 4, requires_grad=True)
    perceptual(Pixels(), a, torch.zeros(1, 2, 4, 4), pixel_weight=0.0).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_gradient_reaches_the_images_and_nothing_else(probe: Probe) -> None:
    ours, targets = images(0).requires_grad_(), images(1)
    perceptual(probe, ours, targets, pixel_weight=0.0).sum().backward()
    assert ours.grad is not None
    assert (ours.grad.abs().amax(dim=(1, 2, 3)) > 1e-5).all()
    assert all(parameter.grad is None for parameter in probe.parameters())


def test_gradient_descent_approaches_the_target(probe: Probe) -> None:
    ours, targets = images(0).requires_grad_(), images(1)
    before = perceptual(probe, ours, targets, pixel_weight=0.1).sum().item()
    optimizer = torch.optim.Adam([ours], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        loss = perceptual(probe, ours, targets, pixel_weight=0.1).sum()
        loss.backward()
        optimizer.step()
    assert float(perceptual(probe, ours.detach(), targets, pixel_weight=0.1).sum()) < before / 3


class Five:
    """A feature network with five taps, like VGG16."""

    tap_channels, tap_strides, tap_weights = (2,) * 5, (1,) * 5, None

    def taps(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [scale * images for scale in (1.0, 2.0, 3.0, 4.0, 100.0)]


def test_johnson_is_the_mean_squared_difference_of_the_first_four_taps() -> None:
    a, b = images(0, 2), images(1, 2)
    wanted = (1 + 4 + 9 + 16 + 0.3) * l2(a, b)
    torch.testing.assert_close(johnson(Five(), a, b, pixel_weight=0.3), wanted, rtol=1e-5, atol=0)
