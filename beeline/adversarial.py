"""The adversarial term: hinge losses, DiffAugment and the adaptive weight that balances it against the line loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional as F

Augmentation = Literal["color", "translation", "cutout"]


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


def diff_augment(images: torch.Tensor, policy: Sequence[Augmentation], generator: torch.Generator) -> torch.Tensor:
    """Differentiable augmentation of (B, C, H, W) before the discriminator (Zhao et al. 2020).

    color: brightness +-0.5, saturation 0 to 2, contrast 0.5 to 1.5; translation: up to 12.5 % of each side, zeros move in;
    cutout: a square of 20 % of each side becomes zero. All draws come from `generator`.
    """
    batch, _, height, width = images.shape

    def uniform(low: float, high: float) -> torch.Tensor:
        draw = torch.rand(batch, 1, 1, 1, generator=generator, device=images.device)
        return low + (high - low) * draw

    if "color" in policy:
        images = images + uniform(-0.5, 0.5)
        grey = images.mean(dim=1, keepdim=True)
        images = (images - grey) * uniform(0.0, 2.0) + grey
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = (images - mean) * uniform(0.5, 1.5) + mean
    rows = torch.arange(height, device=images.device)[None, :, None]
    cols = torch.arange(width, device=images.device)[None, None, :]
    if "translation" in policy:
        reach_y, reach_x = int(height * 0.125 + 0.5), int(width * 0.125 + 0.5)
        dy = torch.randint(-reach_y, reach_y + 1, (batch, 1, 1), generator=generator, device=images.device)
        dx = torch.randint(-reach_x, reach_x + 1, (batch, 1, 1), generator=generator, device=images.device)
        # Products with matrices of zeros and ones, exact in float32: on a GPU the gradient of indexing is slow.
        down, across = ((rows.mT == rows + dy)[:, None].to(images.dtype), (cols.mT == cols + dx)[:, None].to(images.dtype))
        with torch.autocast(images.device.type, enabled=False):
            images = down @ images @ across
    if "cutout" in policy:
        side_y, side_x = int(height * 0.2 + 0.5), int(width * 0.2 + 0.5)
        top = torch.randint(0, height + 1 - side_y % 2, (batch, 1, 1), generator=generator, device=images.device)
        left = torch.randint(0, width + 1 - side_x % 2, (batch, 1, 1), generator=generator, device=images.device)
        top, left = top - side_y // 2, left - side_x // 2
        hole = (rows >= top) & (rows < top + side_y) & (cols >= left) & (cols < left + side_x)
        images = images * ~hole[:, None]
    return images
