"""Adversarial term: hinge losses, and the adaptive weight that balances it against the line loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def hinge_discriminator(real_logits: Sequence[torch.Tensor], fake_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute max(0, 1 - D(real)) + max(0, 1 + D(fake)), averaged over each critic's logits (B, L_k) and over critics
    (Lim & Ye 2017). Logits may have any precision; the loss is float32."""
    pairs = zip(real_logits, fake_logits, strict=True)
    losses = [F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean() for real, fake in pairs]
    return torch.stack(losses).mean()


def hinge_generator(fake_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute -D(fake), averaged over each critic's logits (B, L_k) and over critics. Logits may have any precision; the loss
    is float32."""
    return -torch.stack([fake.float().mean() for fake in fake_logits]).mean()


def balanced_gradient(
    images: torch.Tensor,
    lines_loss: torch.Tensor,
    adversarial_loss: torch.Tensor,
    last_layer: torch.Tensor,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient of L_lines + weight lambda L_adv with respect to the generated `images` (B, C, H, W), and lambda.

        lambda = |grad L_lines| / (|grad L_adv| + 1e-4), with respect to the last layer's weight, clamped to [0.01, 10]

    (Esser et al. 2021, eq. 7; the clamp is CTM's.) Both losses are differentiated once, down to the images; from there the last
    layer is one convolution away. Continue with `images.backward(gradient)`: the graph up to the images is kept. The graphs of
    the losses, which share only the images, are freed.
    """
    (lines_gradient,) = torch.autograd.grad(lines_loss, images)
    (adversarial_gradient,) = torch.autograd.grad(adversarial_loss, images)

    def norm(gradient: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(images, last_layer, gradient, retain_graph=True)[0].norm()

    balance = (norm(lines_gradient) / (norm(adversarial_gradient) + 1e-4)).clamp(0.01, 10.0)
    return lines_gradient + weight * balance * adversarial_gradient, balance
