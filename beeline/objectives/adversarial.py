"""The adversarial term: hinge losses and the adaptive weight that balances it against the line loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def hinge_discriminator(real_logits: Sequence[torch.Tensor], fake_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """max(0, 1 - D(real)) + max(0, 1 + D(fake)), averaged over each critic's logits (B, L_k) and over critics
    (Lim & Ye 2017). Logits of any precision; the loss is float32."""
    pairs = zip(real_logits, fake_logits, strict=True)
    losses = [F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean() for real, fake in pairs]
    return torch.stack(losses).mean()


def hinge_generator(fake_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """-D(fake), averaged over each critic's logits (B, L_k) and over critics. Logits of any precision; the loss is float32."""
    return -torch.stack([fake.float().mean() for fake in fake_logits]).mean()


def balanced_gradient(
    images: torch.Tensor,
    lines_loss: torch.Tensor,
    adversarial_loss: torch.Tensor,
    last_layer: torch.Tensor,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of L_lines + weight lambda L_adv by the generated `images` (B, C, H, W), and lambda.

        lambda = |grad L_lines| / (|grad L_adv| + 1e-4), by the weight of the last layer, clamped to [0.01, 10]

    (Esser et al. 2021, eq. 7; the clamp is CTM's.) Both losses are differentiated once, down to the images; from there to
    the last layer is one convolution. Continue with `images.backward(gradient)`: the graph up to the images is kept, those of
    the losses, which share nothing but the images, are not.
    """
    (of_lines,) = torch.autograd.grad(lines_loss, images)
    (of_adversarial,) = torch.autograd.grad(adversarial_loss, images)

    def norm(gradient: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(images, last_layer, gradient, retain_graph=True)[0].norm()

    balance = (norm(of_lines) / (norm(of_adversarial) + 1e-4)).clamp(0.01, 10.0)
    return of_lines + weight * balance * of_adversarial, balance
