"""ADM (Dhariwal & Nichol 2021), as EDM uses it for ImageNet-64: `DhariwalUNet` in EDM's terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from beeline.networks.layers import (
    NOTHING,
    BlockStyle,
    Conv2d,
    Extra,
    ExtraEmbedding,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    kaiming,
)
from beeline.networks.unet import Shape, decoder, encoder


class DhariwalUNet(nn.Module):
    """U-Net of ADM: scale-and-shift modulation, attention heads of 64 channels. Arguments are those of EDM's configs."""

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        second_level: bool = False,
        guidance: bool = False,
        guess: bool = False,
    ) -> None:
        super().__init__()
        emb_channels = model_channels * channel_mult_emb
        third, zero = kaiming(math.sqrt(1 / 3)), kaiming(0.0)
        weights: dict[str, Any] = {"init": third, "init_bias": third}
        style = BlockStyle(
            emb_channels=emb_channels,
            dropout=dropout,
            eps=1e-5,
            skip_scale=1.0,
            adaptive_scale=True,
            resample_proj=False,
            resample_filter=(1, 1),
            channels_per_head=64,
            init=third,
            init_bias=third,
            init_zero=zero,
            init_attn=third,
        )
        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = Linear(augment_dim, model_channels, init=zero, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, **weights)
        self.map_layer1 = Linear(emb_channels, emb_channels, **weights)
        self.map_label = None
        if label_dim:
            self.map_label = Linear(label_dim, emb_channels, init=kaiming(0.0), bias=False)
            nn.init.normal_(self.map_label.weight)  # Kaiming-normal times sqrt(label_dim): unit variance

        self.map_to = ExtraEmbedding(model_channels, emb_channels, init=third) if second_level else None
        self.map_guidance = ExtraEmbedding(model_channels, emb_channels, init=third) if guidance else None
        width = model_channels * channel_mult[0]
        self.map_guess = Conv2d(in_channels, width, 3, init=zero) if guess else None

        shape = Shape(
            img_resolution=img_resolution, in_channels=in_channels, model_channels=model_channels, channel_mult=channel_mult,
            num_blocks=num_blocks, attn_resolutions=attn_resolutions,
        )  # fmt: skip
        self.enc, skips = encoder(shape, style, width=width, weights=weights)
        self.dec = decoder(shape, style, skips, every_block=True)
        self.out_norm = GroupNorm(width, eps=1e-5)
        self.out_conv = Conv2d(width, out_channels, 3, init=zero)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the output convolution, at which the adversarial phase compares its two gradients."""
        assert self.out_conv.weight is not None
        return self.out_conv.weight

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
        extra: Extra = NOTHING,
    ) -> torch.Tensor:
        """Map x (B, C, H, W), noise_labels (B,) = c_noise(sigma) and labels, one-hot (B, K) or None, to (B, C_out, H, W).

        `extra` holds the network's additional inputs by name; those that it lacks are ignored.
        """
        return self.out_conv(self.trunk(x, noise_labels, labels, augment_labels, extra))

    def trunk(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
        extra: Extra = NOTHING,
    ) -> torch.Tensor:
        """Compute everything before the output convolution, at which two losses are compared. Training compiles this part."""
        x, skips, emb = self.encode(x, noise_labels, labels, augment_labels, extra)
        for block in self.dec.values():
            assert isinstance(block, UNetBlock)
            x = block(torch.cat([x, skips.pop()], dim=1) if x.shape[1] != block.in_channels else x, emb)
        return F.silu(self.out_norm(x))

    def encode(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
        extra: Extra = NOTHING,
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Compute the encoder: the bottleneck (B, C', H', W'), the skip connections, the last of which is the bottleneck, and
        the embedding (B, E) of levels and labels."""
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels)
        for name, embedding in (("to", self.map_to), ("guidance", self.map_guidance)):
            if embedding is not None and name in extra:
                emb = emb + embedding(extra[name])
        guess = 0 if self.map_guess is None or "guess" not in extra else self.map_guess(extra["guess"])
        emb = F.silu(emb)

        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x) + guess
            skips.append(x)
        return x, skips, emb
