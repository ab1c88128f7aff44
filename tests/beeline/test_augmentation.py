"""Augmentation: labels describe the movement of pixels, and label 0 means an unchanged image."""

from __future__ import annotations

import math

import pytest
import torch

from beeline.augmentation import ANISOTROPY_STD, LABELS, SCALE_STD, TRANSLATION_STD, augment, mirrored


def blobs(count: int, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw images with one round spot each, off the centre; return them with its position (n, 2) in [-1, 1]."""
    places = (torch.rand(count, 2, generator=torch.Generator().manual_seed(1)) - 0.5) * 0.7
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = (x - places[:, 0, None, None]) ** 2 + (y - places[:, 1, None, None]) ** 2
    return (-distance / 0.005).exp()[:, None], places


def centres(images: torch.Tensor) -> torch.Tensor:
    """Compute the brightness-weighted centre (n, 2) of images (n, 1, H, W), in [-1, 1]."""
    size = images.shape[-1]
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    mass = images[:, 0].clamp(min=0.05) - 0.05
    total = mass.sum((1, 2))
    return torch.stack([(mass.sum(1) * axis).sum(1) / total, (mass.sum(2) * axis).sum(1) / total], dim=1)


def expected(places: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the position of a spot according to the labels: flips, scale, rotation, anisotropy, translation, in this
    order."""
    moved = []
    for (x, y), row in zip(places.tolist(), labels.tolist(), strict=True):
        flip_x, flip_y, scale, cos, sin, stretch_cos, stretch_sin, shift_x, shift_y = row
        point = torch.tensor([x * (1 - 2 * flip_x), y * (1 - 2 * flip_y)]) * 2 ** (scale * SCALE_STD)
        turn = torch.tensor([[cos + 1, -sin], [sin, cos + 1]])
        factor = 2 ** (math.hypot(stretch_cos, stretch_sin) * ANISOTROPY_STD)
        angle = math.atan2(stretch_sin, stretch_cos) / 2
        along = torch.tensor([math.cos(angle), math.sin(angle)])
        across = torch.tensor([-math.sin(angle), math.cos(angle)])
        point = turn @ point
        point = along * (along @ point) * factor + across * (across @ point) / factor
        moved.append(point + torch.tensor([shift_x, shift_y]) * 2 * TRANSLATION_STD)
    return torch.stack(moved)


def test_the_labels_say_where_everything_went() -> None:
    images, places = blobs(64)
    moved, labels = augment(images, 0.5, torch.Generator().manual_seed(0))
    assert labels.shape == (64, LABELS)
    assert (labels.abs().sum(0) > 0).all()
    where = expected(places, labels)
    # near the border its mirror image comes into view
    inside = (where.abs() < 0.7).all(1) & (labels[:, 7:].abs() < 1.2).all(1)
    assert inside.sum() > 40
    torch.testing.assert_close(centres(moved)[inside], where[inside], atol=0.03, rtol=0)


def test_without_probability_only_mirror_images_are_left() -> None:
    images = torch.randn(64, 3, 8, 8)
    moved, labels = augment(images, 0.0, torch.Generator().manual_seed(0))
    mirrored = labels[:, 0].bool()
    assert torch.equal(moved[mirrored], images[mirrored].flip(-1))
    assert torch.equal(moved[~mirrored], images[~mirrored])
    assert not labels[:, 1:].any()
    assert 20 < mirrored.sum() < 44


@pytest.mark.parametrize("probability", [0.12, 1.0])
def test_each_kind_happens_as_often_as_asked(probability: float) -> None:
    _, labels = augment(torch.zeros(4000, 1, 4, 4), probability, torch.Generator().manual_seed(0))
    for columns in ([2], [3, 4], [5, 6], [7, 8]):
        share = (labels[:, columns].abs().sum(1) > 0).float().mean()
        assert share == pytest.approx(probability, abs=0.03)
    assert labels[:, 1].mean() == pytest.approx(probability / 2, abs=0.03)


def test_it_depends_on_the_generator_alone() -> None:
    images = torch.randn(8, 3, 16, 16)
    first, second = (augment(images, 0.5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_half_of_the_stretches_are_along_an_axis() -> None:
    _, labels = augment(torch.zeros(4000, 1, 4, 4), 1.0, torch.Generator().manual_seed(0))
    along_axis = (labels[:, 6] == 0).float().mean()  # the sine of the doubled angle
    assert float(along_axis) == pytest.approx(0.5, abs=0.03)


def test_half_of_the_images_are_mirrored() -> None:
    images = torch.rand(1000, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    made = mirrored(images, torch.Generator().manual_seed(0))
    flipped = (made == images.flip(-1)).flatten(1).all(dim=1)
    assert bool(((made == images).flatten(1).all(dim=1) ^ flipped).all())
    assert float(flipped.float().mean()) == pytest.approx(0.5, abs=0.05)
