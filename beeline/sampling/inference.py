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
from beeline.networks.routed import Routed

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
    if isinstance(network, Routed):  # its parts share the batch, so each of them sees a smaller one
        share = -(-batch_size // len(network.parts)) if batch_size else None
        prepared.model = Routed(_prepared(part, dtype, share, compiled=compiled) for part in network.parts)
    else:
        prepared.model = _prepared(network, dtype, batch_size, compiled=compiled)
    if prepared.guess is not None:
        prepared.guess = prepare(prepared.guess, precision=precision, compiled=compiled, batch_size=batch_size)
    return prepared


def _prepared(network: nn.Module, dtype: torch.dtype, batch_size: int | None, *, compiled: bool) -> nn.Module:
    if compiled:
        on_gpu = next(network.parameters()).is_cuda
        options: dict[str, Any] = {"triton.cudagraphs": True} if on_gpu else {"freezing": True}
        network = cast(nn.Module, torch.compile(network, dynamic=False, options=options))
    return _Network(network, dtype, batch_size)


class _Network(nn.Module):
    """Converts the network's inputs to its precision, and divides and pads batches to `batch_size`."""

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
        """Same arguments and result as the network."""
        size = len(x)
        if self.batch_size and size > self.batch_size:
            return self._divided(x, noise_labels, labels, augment_labels, extra)
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

    def _divided(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None,
        extra: Extra,
    ) -> torch.Tensor:
        """The result for a batch of more than `batch_size` rows, copied part by part: CUDA graphs reuse their memory."""
        assert self.batch_size
        outputs = []
        for start in range(0, len(x), self.batch_size):
            rows = slice(start, start + self.batch_size)
            more = [None if tensor is None else tensor[rows] for tensor in (labels, augment_labels)]
            named = {name: value[rows] for name, value in extra.items()}
            outputs.append(self(x[rows], noise_labels[rows], *more, named).clone())
        return torch.cat(outputs)


def _filled(tensor: torch.Tensor, missing: int) -> torch.Tensor:
    """Append `missing` copies of the first row."""
    return torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])])
