"""DDPM++ and NCSN++ (Song et al. 2021), as EDM uses them for CIFAR-10 and AFHQv2: `SongUNet` in EDM's terms."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from beeline.networks.layers import (
    NOTHING,
    BlockStyle,
    Conv2d,
    Extra,
    ExtraEmbedding,
    FourierEmbedding,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    xavier,
    zeros,
)
from beeline.networks.unet import Shape, decoder, encoder


class SongUNet(nn.Module):
    """U-Net of DDPM++ (the defaults) or NCSN++ (embedding "fourier", encoder "residual", filter [1, 3, 3, 1],
    channel_mult_noise 2). The arguments are those of EDM's configs; `augment_dim` inputs are optional at run time."""

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        second_level: bool = False,
        guidance: bool = False,
        guess: bool = False,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        _check(embedding_type, encoder_type, decoder_type)
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        init, init_zero = xavier(), xavier(1e-5)
        style = BlockStyle(
            emb_channels=emb_channels,
            dropout=dropout,
            eps=1e-6,
            skip_scale=math.sqrt(0.5),
            adaptive_scale=False,
            resample_proj=True,
            resample_filter=tuple(resample_filter),
            channels_per_head=None,
            init=init,
            init_bias=None,
            init_zero=init_zero,
            init_attn=xavier(math.sqrt(0.2)),
        )
        self.map_noise = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = Linear(label_dim, noise_channels, init=init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, init=init, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)

        self.map_to = ExtraEmbedding(noise_channels, emb_channels, init=init) if second_level else None
        self.map_guidance = ExtraEmbedding(noise_channels, emb_channels, init=init) if guidance else None
        self.map_guess = Conv2d(in_channels, model_channels, 3, init=zeros) if guess else None

        shape = Shape(
            img_resolution=img_resolution, in_channels=in_channels, model_channels=model_channels, channel_mult=channel_mult,
            num_blocks=num_blocks, attn_resolutions=attn_resolutions,
        )  # fmt: skip
        residual = functools.partial(
            Conv2d, kernel=3, init=init, down=True, resample_filter=resample_filter, fused=True
        )  # fmt: skip
        self.enc, skips = encoder(
            shape,
            style,
            width=model_channels,
            weights={"init": init},
            residual=residual if encoder_type == "residual" else None,
        )
        self.dec, width = decoder(shape, style, skips, every_block=False), model_channels * channel_mult[0]
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = GroupNorm(width, eps=1e-6)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = Conv2d(width, out_channels, 3, init=init_zero)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the output convolution: where the adversarial phase compares its two gradients."""
        weight = self._last_conv.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def _last_conv(self) -> nn.Module:
        return list(self.dec.values())[-1]

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
        extra: Extra = NOTHING,
    ) -> torch.Tensor:
        """x (B, C, H, W), noise_labels (B,) = c_noise(sigma), labels one-hot (B, K) or None, to (B, C_out, H, W).

        `extra` holds the network's additional inputs by name; those that it lacks are ignored.
        """
        return self._last_conv(self.trunk(x, noise_labels, labels, augment_labels, extra))

    def trunk(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
        extra: Extra = NOTHING,
    ) -> torch.Tensor:
        """All but the output convolution, which two losses are compared at: what training compiles."""
        x, skips, emb = self.encode(x, noise_labels, labels, augment_labels, extra)
        for block in list(self.dec.values())[:-1]:
            if isinstance(block, UNetBlock):
                x = block(torch.cat([x, skips.pop()], dim=1) if x.shape[1] != block.in_channels else x, emb)
            else:
                x = block(x)
        return F.silu(x)

    def encode(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
        extra: Extra = NOTHING,
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """The encoder: the bottleneck (B, C', H', W'), the skip connections, the last of which is the bottleneck, and the
        embedding (B, E) of levels and labels."""
        emb = self.map_noise(noise_labels)
        emb = emb.reshape(len(emb), 2, -1).flip(1).reshape(emb.shape)  # released weights expect [sin, cos]
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        for name, embedding in (("to", self.map_to), ("guidance", self.map_guidance)):
            if embedding is not None and name in extra:
                emb = emb + embedding(extra[name])
        guess = 0 if self.map_guess is None or "guess" not in extra else self.map_guess(extra["guess"])
        emb = F.silu(emb)

        skips, aux = [], x
        for name, block in self.enc.items():
            if name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + block(aux)) * math.sqrt(0.5)
            else:
                x = block(x, emb) if isinstance(block, UNetBlock) else block(x) + guess
                skips.append(x)
        return x, skips, emb


def _check(embedding_type: str, encoder_type: str, decoder_type: str) -> None:
    """Raise ValueError for networks that EDM has not released."""
    if embedding_type not in ("positional", "fourier"):
        raise ValueError(f"embedding_type is {embedding_type!r}; expected 'positional' or 'fourier'")
    if encoder_type not in ("standard", "residual") or decoder_type != "standard":
        raise ValueError(
            f"encoder_type {encoder_type!r} with decoder_type {decoder_type!r} is not built; "
            "expected encoder 'standard' or 'residual' and decoder 'standard' (EDM's released networks)"
        )
