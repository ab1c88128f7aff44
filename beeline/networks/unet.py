"""Encoder and decoder of EDM's U-Nets, built block by block in the order of EDM's own networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from beeline.networks.layers import BlockStyle, Conv2d, UNetBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Resolutions and widths of a U-Net, in the terms of EDM's configs."""

    img_resolution: int
    in_channels: int
    model_channels: int
    channel_mult: Sequence[int]
    num_blocks: int
    attn_resolutions: Sequence[int]

    @property
    def levels(self) -> list[tuple[int, int]]:
        """(resolution, channels) of each level, from fine to coarse."""
        return [(self.img_resolution >> k, self.model_channels * mult) for k, mult in enumerate(self.channel_mult)]


def encoder(
    shape: Shape,
    style: BlockStyle,
    *,
    width: int,
    weights: dict[str, Any],
    residual: Callable[[int, int], nn.Module] | None = None,
) -> tuple[nn.ModuleDict, list[int]]:
    """The encoder's blocks by name, and the channels of each output, which the decoder takes as skip connections.

    `width`: channels of the first convolution; `weights`: its initialisation. `residual(channels_in, channels_out)` makes
    the layers of NCSN++ that add the downsampled image to each level.
    """
    blocks, skips, image_width = nn.ModuleDict(), [], shape.in_channels
    for level, (res, channels) in enumerate(shape.levels):
        if level == 0:
            blocks[f"{res}x{res}_conv"] = Conv2d(shape.in_channels, width, 3, **weights)
        else:
            blocks[f"{res}x{res}_down"] = UNetBlock(width, width, style, down=True)
            if residual is not None:
                blocks[f"{res}x{res}_aux_residual"] = residual(image_width, width)
                image_width = width
        skips.append(width)
        for block in range(shape.num_blocks):
            attention = res in shape.attn_resolutions
            blocks[f"{res}x{res}_block{block}"] = UNetBlock(width, channels, style, attention=attention)
            width = channels
            skips.append(width)
    return blocks, skips


def decoder(shape: Shape, style: BlockStyle, skips: Sequence[int], *, every_block: bool) -> nn.ModuleDict:
    """The decoder's blocks by name, for the encoder's `skips`. At `shape.attn_resolutions` attention is in every block of a
    level (ADM), or in its last one alone (DDPM++)."""
    blocks, left, width = nn.ModuleDict(), list(skips), skips[-1]
    for level, (res, channels) in reversed(list(enumerate(shape.levels))):
        if level == len(shape.levels) - 1:
            blocks[f"{res}x{res}_in0"] = UNetBlock(width, width, style, attention=True)
            blocks[f"{res}x{res}_in1"] = UNetBlock(width, width, style)
        else:
            blocks[f"{res}x{res}_up"] = UNetBlock(width, width, style, up=True)
        for block in range(shape.num_blocks + 1):
            attention = res in shape.attn_resolutions and (every_block or block == shape.num_blocks)
            blocks[f"{res}x{res}_block{block}"] = UNetBlock(width + left.pop(), channels, style, attention=attention)
            width = channels
    return blocks
