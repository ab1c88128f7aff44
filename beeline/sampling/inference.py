"""Precision, memory layout and compilation of networks that are only evaluated. The mathematics stays the same.

In every precision, the state of a solver is float64 and preconditioning is float32. Only the convolutions, norms and
attention of the network inside run in `precision`; the embedding of noise level and labels stays float32.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, cast

import torch
from torch import nn

from beeline.denoiser import Denoiser
from beeline.networks.layers import NOTHING, Conv2d, Extra, GroupNorm

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare(
    model: Denoiser, *, precision: Precision = "fp32", compiled: bool = False, batch_size: int | None = None
) -> Denoiser:
    """Copy `model` for evaluation only: channels last, in `precision`, and compiled if `compiled`.

    With `batch_size`, smaller batches are padded to that size and the result is cut: a compiled network then sees one shape
    and is compiled once. On a GPU compilation includes CUDA graphs. Compiling costs one to three minutes at the first batch.
    """
    prepared = copy.deepcopy(model).eval().requires_grad_(False)
    network: nn.Module = prepared.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    dtype = DTYPES[precision]
    for module in network.modules():
        if isinstance(module, Conv2d | GroupNorm):
            module.to(dtype)
    if compiled:
        on_gpu = next(network.parameters()).is_cuda
        options: dict[str, Any] = {"triton.cudagraphs": True} if on_gpu else {"freezing": True}
        network = cast(nn.Module, torch.compile(network, dynamic=False, options=options))
    prepared.model = _Network(network, dtype, batch_size)
    if prepared.guess is not None:
        prepared.guess = prepare(prepared.guess, precision=precision, compiled=compiled, batch_size=batch_size)
    return prepared


class _Network(nn.Module):
    """Converts the network's inputs to its precision, and pads batches."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, batch_size: int | None) -> None:
        super().__init__()
        self.network, self.dtype, self.batch_size = network, dtype, batch_size

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
        extra: Extra = NOTHING,
    ) -> torch.Tensor:
        """Same arguments and result as the network, for any batch up to `batch_size`."""
        size = len(x)
        missing = (self.batch_size or size) - size
        if missing > 0:
            x, noise_labels = _filled(x, missing), _filled(noise_labels, missing)
            labels = None if labels is None else _filled(labels, missing)
            augment_labels = None if augment_labels is None else _filled(augment_labels, missing)
            extra = {name: _filled(value, missing) for name, value in extra.items()}
        x = x.to(self.dtype, memory_format=torch.channels_last)
        if "guess" in extra:
            extra = {**extra, "guess": extra["guess"].to(self.dtype, memory_format=torch.channels_last)}
        return self.network(x, noise_labels, labels, augment_labels, extra)[:size]


def _filled(tensor: torch.Tensor, missing: int) -> torch.Tensor:
    """Append `missing` copies of the first row."""
    return torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])])
