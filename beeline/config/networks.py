"""Settings of networks: denoisers and probes."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from beeline.settings import Channels, Classes, Divisible, Range, Seed, Settings, ShareBelow1, Side, Some, added


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig(Settings):
    """Network of a denoiser, in the terms of EDM's configs."""

    kind: Literal["ddpmpp", "ncsnpp", "adm"]
    img_resolution: Side
    img_channels: Channels
    label_dim: Classes = 0
    augment_dim: Annotated[int, Range(0, 1000)] = 0
    model_channels: Annotated[Channels, Divisible(4)] = 128
    channel_mult: Some[Annotated[int, Range(1, 64)]] = (2, 2, 2)
    channel_mult_emb: Annotated[int, Range(1, 64)] = 4
    num_blocks: Annotated[int, Range(1, 100)] = 4
    attn_resolutions: tuple[Side, ...] = (16,)
    dropout: ShareBelow1 = 0.0
    second_level: bool = False
    """Adds an input for a second noise level, where a jump ends; for flow maps."""
    guidance: bool = added(False)
    """Adds an input for a weight of guidance, for guided distillation."""
    guess: bool = added(False)
    """Adds an input for a first guess of the image, and the frozen network that makes it; for constant acceleration flow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        levels, halved = len(self.channel_mult), 2 ** (len(self.channel_mult) - 1)
        self.require(
            self.img_resolution % halved == 0,
            "img_resolution",
            f"a multiple of {halved}, because channel_mult {self.channel_mult} makes {levels} levels, each half as large",
        )


GROUPS = 4  # groups of a probe's normalisation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeNetworkConfig(Settings):
    """Network of a probe: one convolution per entry of `widths`."""

    widths: Some[Channels]
    strides: Some[Annotated[int, Range(1, 16)]]
    kernel: Annotated[int, Range(1, 31)] = 3
    activation: Literal["relu", "silu", "gelu"] = "relu"
    norm: bool = True
    """Group normalisation after each convolution. Without it, features grow with the errors of an image, so a distance in them
    does not saturate."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(len(self.strides) == len(self.widths), "strides", f"one for each of the widths {self.widths}")
        for width in self.widths:
            self.require(width % GROUPS == 0 or not self.norm, "widths", f"multiples of {GROUPS}, because norm is on")
