"""Layers shared by DDPM++ and ADM: resampling convolution, U-Net block with attention, embeddings of the noise level.

Parameter names follow EDM's state dicts (Karras et al. 2022, appendix F), so released weights need no renaming.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Init = Callable[[torch.Tensor, int, int], None]
Extra = Mapping[str, torch.Tensor]
"""Inputs that only some networks have, by name: "to" (B,), c_noise of a second noise level; "guidance" (B,), a weight;
"guess" (B, C, H, W), an image."""
NOTHING: Extra = {}


def xavier(gain: float = 1.0) -> Init:
    """Initialise uniformly in +-gain sqrt(6 / (fan_in + fan_out))."""

    def init(tensor: torch.Tensor, fan_in: int, fan_out: int) -> None:
        nn.init.uniform_(tensor, -1, 1).mul_(gain * (6 / (fan_in + fan_out)) ** 0.5)

    return init


def kaiming(gain: float = 1.0) -> Init:
    """Initialise uniformly in +-gain sqrt(3 / fan_in)."""

    def init(tensor: torch.Tensor, fan_in: int, fan_out: int) -> None:
        nn.init.uniform_(tensor, -1, 1).mul_(gain * (3 / fan_in) ** 0.5)

    return init


class Linear(nn.Linear):
    """A linear layer with an explicit initialiser for the weight and, if `init_bias` is given, the bias (otherwise 0)."""

    def __init__(
        self, in_features: int, out_features: int, *, init: Init, bias: bool = True, init_bias: Init | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        with torch.no_grad():
            init(self.weight, in_features, out_features)
            if bias:
                (init_bias or zeros)(self.bias, in_features, out_features)


def zeros(tensor: torch.Tensor, fan_in: int, fan_out: int) -> None:
    """Initialise with 0."""
    nn.init.zeros_(tensor)


class Conv2d(nn.Module):
    """Convolution of size `kernel` ("same" padding) after optional factor-two resampling, `up` or `down`, with a FIR filter.

    `kernel` 0 only resamples. The [1, 1] filter is nearest-neighbour up and 2x2 mean down; [1, 3, 3, 1] is NCSN++'s.
    `fused` runs the convolution before the down-sampling filter (NCSN++'s residual encoder).
    """

    resample_filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        init: Init,
        init_bias: Init | None = None,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused: bool = False,
    ) -> None:
        super().__init__()
        if up and down:
            raise ValueError("a convolution resamples up or down, not both")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.fused = up, down, fused
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(out_channels))
            fan_in, fan_out = in_channels * kernel**2, out_channels * kernel**2
            with torch.no_grad():
                init(self.weight, fan_in, fan_out)
                (init_bias or zeros)(self.bias, fan_in, fan_out)
        if up or down:
            taps = torch.as_tensor(resample_filter, dtype=torch.float32)
            self.register_buffer("resample_filter", (taps.outer(taps) / taps.sum() ** 2)[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in, H, W) to (B, out, H', W') with H' = 2H, H/2 or H."""
        if self.up:
            x = self._filter(x, up=True)
        elif self.down and not self.fused:
            x = self._filter(x, up=False)
        if self.weight is not None:
            assert self.bias is not None
            pad = self.weight.shape[-1] // 2
            if self.down and self.fused:
                pad += (self.resample_filter.shape[-1] - 1) // 2
                x = F.conv2d(x, self.weight.to(x.dtype), padding=pad)
                return self._filter(x, up=False, padding=0) + self.bias.to(x.dtype)[:, None, None]
            x = F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=pad)
        return x

    def _filter(self, x: torch.Tensor, *, up: bool, padding: int | None = None) -> torch.Tensor:
        channels, taps = x.shape[1], self.resample_filter.shape[-1]
        if taps == 2 and padding is None:
            return F.interpolate(x, scale_factor=2.0, mode="nearest") if up else F.avg_pool2d(x, 2)
        weight = self.resample_filter.to(x.dtype).expand(channels, 1, taps, taps)
        pad = (taps - 1) // 2 if padding is None else padding
        if up:
            return F.conv_transpose2d(x, weight * 4, stride=2, padding=pad, groups=channels)
        return F.conv2d(x, weight, stride=2, padding=pad, groups=channels)


class GroupNorm(nn.GroupNorm):
    """Group normalisation with EDM's number of groups: 32, or fewer so that each has at least 4 channels."""

    contiguous = False
    """Whether inputs are made contiguous first, as forward-mode differentiation requires (beeline/objectives/derivative.py)."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(min(32, channels // 4), channels, eps=eps)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        input = input.contiguous() if self.contiguous else input
        return F.group_norm(input, self.num_groups, self.weight.to(input.dtype), self.bias.to(input.dtype), self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockStyle:
    """Settings that distinguish the blocks of one architecture from those of another."""

    emb_channels: int
    dropout: float
    eps: float
    skip_scale: float
    adaptive_scale: bool  # the embedding scales and shifts (ADM), or only shifts (DDPM++)
    resample_proj: bool  # a resampling shortcut has a 1x1 convolution even if the width does not change
    resample_filter: tuple[float, ...]
    channels_per_head: int | None  # None: one attention head
    init: Init
    init_bias: Init | None
    init_zero: Init
    init_attn: Init


class UNetBlock(nn.Module):
    """Residual block: two normalised convolutions modulated by the embedding, then optional self-attention."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dropout, self.skip_scale, self.adaptive_scale = style.dropout, style.skip_scale, style.adaptive_scale
        self.num_heads = 0 if not attention else out_channels // style.channels_per_head if style.channels_per_head else 1
        weights: dict[str, Any] = {"init": style.init, "init_bias": style.init_bias}
        resample: dict[str, Any] = {"up": up, "down": down, "resample_filter": style.resample_filter}
        self.norm0 = GroupNorm(in_channels, style.eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **weights, **resample)
        self.affine = Linear(style.emb_channels, out_channels * (2 if style.adaptive_scale else 1), **weights)
        self.norm1 = GroupNorm(out_channels, style.eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init=style.init_zero)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if style.resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, **weights, **resample)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, style.eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, init=style.init_attn, init_bias=style.init_bias)
            self.proj = Conv2d(out_channels, out_channels, 1, init=style.init_zero)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Map (B, in, H, W) and an embedding (B, E) to (B, out, H', W')."""
        shortcut = x if self.skip is None else self.skip(x)
        x = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb).to(x.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = F.silu(self.norm1(x + params))
        x = self.conv1(F.dropout(x, self.dropout, self.training))
        x = (x + shortcut) * self.skip_scale
        if self.num_heads:
            x = (self.proj(self._attend(self.norm2(x))) + x) * self.skip_scale
        return x

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        # EDM orders the qkv channels as (head, channel, which), and so do the released weights.
        qkv = self.qkv(x).reshape(batch, self.num_heads, channels // self.num_heads, 3, height * width)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous().unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(batch, channels, height, width)


class PositionalEmbedding(nn.Module):
    """Sinusoids of the noise level at geometric frequencies from 1 to 1/10,000: (B,) to (B, channels), [cos, sin]."""

    def __init__(self, channels: int, *, endpoint: bool) -> None:
        super().__init__()
        self.frequencies = channels // 2
        self.denominator = self.frequencies - (1 if endpoint else 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exponent = torch.arange(self.frequencies, dtype=torch.float32, device=x.device) / self.denominator
        angles = x[:, None] * (1 / 10000) ** exponent
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class ExtraEmbedding(nn.Module):
    """Embedding of an additional number, added to that of the noise level: (B,) to (B, out_channels). It is 0 at the start of
    training, so that a network with it starts as the one without."""

    def __init__(self, channels: int, out_channels: int, *, init: Init) -> None:
        super().__init__()
        self.sinusoids = PositionalEmbedding(channels, endpoint=True)
        self.layer0 = Linear(channels, out_channels, init=init)
        self.layer1 = Linear(out_channels, out_channels, init=zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer1(F.silu(self.layer0(self.sinusoids(x))))


class FourierEmbedding(nn.Module):
    """Sinusoids of the noise level at random frequencies (NCSN++), stored as a buffer: (B,) to (B, channels), [cos, sin]."""

    freqs: torch.Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = x[:, None] * (2 * torch.pi * self.freqs.to(torch.float32))
        return torch.cat([angles.cos(), angles.sin()], dim=1)
