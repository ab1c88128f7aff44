"""Hinge losses, the adaptive weight against plain autograd, and DiffAugment's ranges, draws and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from beeline.augmentation import Augmentation, diff_augment
from beeline.objectives.adversarial import balanced_gradient, hinge_discriminator, hinge_generator

ALL: tuple[Augmentation, ...] = ("color", "translation", "cutout")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_hinge_values() -> None:
    real, fake = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor([-2.0, -1.0, 0.5])
    of_first = (0 + 0 + 1 + 2) / 4 + (0 + 0 + 1.5) / 3
    assert float(hinge_discriminator([real], [fake])) == pytest.approx(of_first)
    assert float(hinge_generator([fake])) == pytest.approx(2.5 / 3)
    # Critics count alike, however many logits they have.
    assert float(hinge_discriminator([real, fake], [fake, real])) == pytest.approx((of_first + (5.5 / 3 + 6 / 4)) / 2)
    assert float(hinge_generator([fake, real])) == pytest.approx((2.5 / 3 - 2 / 4) / 2)


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize(("scale", "regime"), [(1.0, "free"), (1e4, "high"), (1e-5, "low")])
def test_balanced_gradient_is_that_of_the_weighted_sum(scale: float, regime: str, weight: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 2, 3, padding=1, bias=True))
    critic = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 1, 3)).requires_grad_(False)
    x, targets = torch.randn(5, 2, 6, 6), torch.randn(5, 2, 6, 6)

    def losses(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return scale * (images - targets).square().mean(), hinge_generator([critic(images)])

    twin = copy.deepcopy(net)
    last = twin[2].weight
    assert isinstance(last, nn.Parameter)
    lines, adversarial = losses(twin(x))
    norms = [float(torch.autograd.grad(loss, last, retain_graph=True)[0].norm()) for loss in (lines, adversarial)]
    free = norms[0] / (norms[1] + 1e-4)
    wanted = {"free": free, "high": 10.0, "low": 0.01}[regime]
    assert (0.01 < free < 10) == (regime == "free")
    (lines + weight * wanted * adversarial).backward()

    images = net(x)
    trained = net[2].weight
    assert isinstance(trained, nn.Parameter)
    gradient, balance = balanced_gradient(images, *losses(images), trained, weight)
    assert float(balance) == pytest.approx(wanted, rel=1e-5)
    assert not balance.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    images.backward(gradient)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * float(theirs.grad.abs().max()))


def test_balance_survives_a_critic_without_gradient() -> None:
    last = nn.Parameter(torch.ones(1, 1, 1, 1))
    images = F.conv2d(torch.ones(1, 1, 2, 2), last)
    gradient, balance = balanced_gradient(images, images.sum(), (0 * images).sum(), last, 1.0)
    assert float(balance) == 10.0
    assert torch.equal(gradient, torch.ones(1, 1, 2, 2))


def test_empty_policy_is_the_identity() -> None:
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(diff_augment(images, (), seeded()), images)


@pytest.mark.parametrize("policy", [("color",), ("translation",), ("cutout",), ALL])
def test_augmentation_is_a_function_of_the_generator(policy: tuple[Augmentation, ...]) -> None:
    images = torch.randn(16, 3, 8, 8)
    first = diff_augment(images, policy, seeded(1))
    assert first.shape == images.shape
    assert torch.equal(diff_augment(images, policy, seeded(1)), first)
    assert not torch.equal(diff_augment(images, policy, seeded(2)), first)
    assert not torch.equal(first, images)


@pytest.mark.parametrize("policy", [("color",), ("translation",), ("cutout",), ALL])
def test_augmentation_is_differentiable(policy: tuple[Augmentation, ...]) -> None:
    images = torch.randn(2, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, policy, seeded()), (images,), fast_mode=True)
    (gradient,) = torch.autograd.grad(diff_augment(images, policy, seeded()).square().sum(), images)
    assert (gradient != 0).float().mean() > 0.3


def test_brightness_shifts_each_image_by_at_most_a_half() -> None:
    shifted = diff_augment(torch.zeros(2000, 2, 4, 4), ("color",), seeded())
    torch.testing.assert_close(shifted.amax(dim=(1, 2, 3)), shifted.amin(dim=(1, 2, 3)))
    shift = shifted[:, 0, 0, 0]
    assert shift.abs().max() <= 0.5
    assert shift.min() < -0.49
    assert shift.max() > 0.49
    assert float(shift.std()) == pytest.approx(1 / 12**0.5, abs=0.02)


def test_contrast_and_saturation_scale_within_their_ranges() -> None:
    """Grey differences between positions measure contrast; colour differences within a position measure saturation times
    contrast."""
    grey = torch.randn(1, 1, 4, 4, generator=seeded(5))
    colour = torch.randn(1, 3, 4, 4, generator=seeded(6))
    colour = colour - colour.mean(dim=1, keepdim=True)
    out = diff_augment((grey + colour).expand(2000, -1, -1, -1), ("color",), seeded())
    out_grey = out.mean(dim=1, keepdim=True)
    contrast = out_grey.flatten(1).std(dim=1) / grey.std()
    saturation = (out - out_grey).flatten(1).norm(dim=1) / colour.norm() / contrast
    for factor, low, high in [(contrast, 0.5, 1.5), (saturation, 0.0, 2.0)]:
        assert low - 1e-4 <= factor.min() < low + 0.02
        assert high - 0.02 < factor.max() <= high + 1e-4
        assert float(factor.mean()) == pytest.approx(1, abs=0.05)
    assert abs(torch.corrcoef(torch.stack([contrast, saturation]))[0, 1]) < 0.1  # drawn apart


@pytest.mark.parametrize(("height", "width", "reach_y", "reach_x"), [(8, 8, 1, 1), (16, 8, 2, 1), (12, 24, 2, 3)])
def test_translation_shifts_and_zeros_move_in(height: int, width: int, reach_y: int, reach_x: int) -> None:
    image = torch.rand(1, 2, height, width) + 1
    padded = F.pad(image, (reach_x, reach_x, reach_y, reach_y))[0]
    shifts = [padded[:, y : y + height, x : x + width] for y in range(2 * reach_y + 1) for x in range(2 * reach_x + 1)]
    out = diff_augment(image.expand(600, -1, -1, -1), ("translation",), seeded())
    match = torch.stack([(out == shift).flatten(1).all(dim=1) for shift in shifts], dim=1)
    assert (match.sum(dim=1) == 1).all()
    assert (match.sum(dim=0) > 0).all()


def test_translation_moves_each_image_for_itself() -> None:
    images = torch.rand(64, 1, 8, 8) + 1
    alone = {float(image.sum()): image for image in images}
    out = diff_augment(images, ("translation",), seeded())
    for image, moved in zip(images, out, strict=True):
        padded = F.pad(alone[float(image.sum())], (1, 1, 1, 1))
        assert any(torch.equal(padded[:, y : y + 8, x : x + 8], moved) for y in range(3) for x in range(3))


@pytest.mark.parametrize(
    ("height", "width", "side_y", "side_x"), [(8, 8, 2, 2), (16, 16, 3, 3), (10, 20, 2, 4), (32, 32, 6, 6)]
)
def test_cutout_is_one_rectangle_of_a_fifth(height: int, width: int, side_y: int, side_x: int) -> None:
    out = diff_augment(torch.ones(800, 2, height, width), ("cutout",), seeded())
    assert ((out == 0) | (out == 1)).all()
    assert torch.equal(out[:, 0], out[:, 1])
    hole = out[:, 0] == 0
    rows, cols = hole.any(dim=2), hole.any(dim=1)
    assert torch.equal(hole, rows[:, :, None] & cols[:, None, :])
    for line, side in [(rows, side_y), (cols, side_x)]:
        lengths = line.sum(dim=1)
        assert lengths.max() == side
        assert lengths.min() >= side // 2  # a hole over the edge is cut off there
        assert ((line[:, 1:].int() - line[:, :-1].int()).abs().sum(dim=1) <= 2).all()  # in one piece
        inside = ~line[:, 0] & ~line[:, -1]
        assert (lengths[inside] == side).all()
    assert hole.any(dim=0).all()  # it falls anywhere


def test_losses_are_float32_for_logits_of_half_precision() -> None:
    real, fake = (torch.randn(64, 30, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    halves = [logits.to(torch.bfloat16) for logits in (real, fake)]
    exact = [logits.to(torch.float64) for logits in halves]
    for loss, wanted in (
        (hinge_discriminator([halves[0]], [halves[1]]), hinge_discriminator([exact[0]], [exact[1]])),
        (hinge_generator([halves[1]]), hinge_generator([exact[1]])),
    ):
        assert loss.dtype == torch.float32
        assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
