"""The projected discriminator: shapes, what it trains, and spectral norms."""

from __future__ import annotations

import pytest
import torch

from beeline.discriminator import ProjectedDiscriminator
from beeline.features import Probe

IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
PLACES = 8 * 8 + 4 * 4 + 4 * 4  # the probe's taps have strides 1, 2, 2


def test_logits_of_every_place_of_every_tap(probe: Probe) -> None:
    assert ProjectedDiscriminator(probe, width=8, num_classes=0)(IMAGES, None).shape == (4, PLACES)


def test_classes_change_the_logits(probe: Probe) -> None:
    critic = ProjectedDiscriminator(probe, width=8, num_classes=3).eval()
    logits = [critic(IMAGES, torch.eye(3)[[k] * 4]) for k in (0, 1)]
    assert logits[0].shape == (4, PLACES)
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_frozen_network_is_no_part_of_it(probe: Probe, num_classes: int) -> None:
    critic = ProjectedDiscriminator(probe, width=8, num_classes=num_classes)
    frozen = {id(parameter) for parameter in probe.parameters()}
    assert not frozen & {id(parameter) for parameter in critic.parameters()}
    assert all(name.startswith("heads.") for name in critic.state_dict())
    critic.train()
    assert not probe.training


def test_gradients_reach_images_and_heads_but_not_the_network(probe: Probe) -> None:
    critic = ProjectedDiscriminator(probe, width=8, num_classes=3)
    images = IMAGES.clone().requires_grad_()
    critic(images, torch.eye(3)[[0, 1, 2, 0]]).square().mean().backward()
    assert images.grad is not None
    assert (images.grad != 0).any()
    assert all(parameter.grad is not None for parameter in critic.parameters())
    assert all(parameter.grad is None for parameter in probe.parameters())


def test_spectral_norms_become_one(probe: Probe) -> None:
    torch.manual_seed(0)
    critic = ProjectedDiscriminator(probe, width=8, num_classes=3).train()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.mul_(7)
    for _ in range(40):
        critic(IMAGES, torch.eye(3)[[0, 1, 2, 0]])
    layers = [layer for head in critic.heads for layer in (head.conv0, head.conv1, head.out, head.embed)]
    assert len(layers) == 12
    for layer in layers:
        assert isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, rel=0.03)
