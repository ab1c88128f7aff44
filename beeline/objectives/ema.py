"""Exponential moving averages of weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, half_life: float, step: int, ramp: float) -> None:
    """Move the exponential moving average `average` one step towards `model`; buffers are copied.

    `half_life` is in steps. With `ramp` above 0 it is limited to `ramp` times `step`, the steps so far, so that the average
    forgets its start (Karras et al. 2022, appendix F.2). With `ramp` 0 the decay is constant.
    """
    limited = min(half_life, step * ramp) if ramp else half_life
    beta = 0.5 ** (1 / max(limited, 1e-8))
    # Updates all parameters in a few kernels: one kernel per parameter would cost a GPU more in launches than in arithmetic.
    get_ema_multi_avg_fn(beta)(list(average.parameters()), list(model.parameters()), step)
    for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)
