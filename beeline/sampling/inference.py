"""How a network runs when it is only evaluated: precision, memory layout, compilation. The mathematics stays the same.

The state of a solver is float64 and preconditioning is float32 in every policy; only the network inside runs in
`precision`, and of it only convolutions, norms and attention: the embedding of noise level and labels stays float32.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, cast

import torch
from torch import nn

from beeline.denoiser import Denoiser
from beeline.networks.layers import Conv2d, GroupNorm

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare(
    model: Denoiser, *, precision: Precision = "fp32", compiled: bool = False, batch_size: int | None = None
) -> Denoiser:
    """A copy of `model` for evaluation alone, channels last, in `precision`, compiled if asked.

    With `batch_size`, smaller batches are filled up to it and cut again: a compiled network then sees one shape and is
    compiled once. On a GPU compilation includes CUDA graphs. Compiling costs one to three minutes at the first batch.
    """
    made = copy.deepcopy(model).eval().requires_grad_(False)
    network: nn.Module = made.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    dtype = DTYPES[precision]
    for module in network.modules():
        if isinstance(module, Conv2d | GroupNorm):
            module.to(dtype)
    if compiled:
        on_gpu = next(network.parameters()).is_cuda
        options: dict[str, Any] = {"triton.cudagraphs": True} if on_gpu else {"freezing": True}
        network = cast(nn.Module, torch.compile(network, dynamic=False, options=options))
    made.model = _Network(network, dtype, batch_size)
    return made


class _Network(nn.Module):
    """The network between the precision outside, float32, and its own."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, batch_size: int | None) -> None:
        super().__init__()
        self.network, self.dtype, self.batch_size = network, dtype, batch_size

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
        to_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the network's own, for any batch up to `batch_size`."""
        size = len(x)
        missing = (self.batch_size or size) - size
        if missing > 0:
            x, noise_labels = _filled(x, missing), _filled(noise_labels, missing)
            labels = None if labels is None else _filled(labels, missing)
            augment_labels = None if augment_labels is None else _filled(augment_labels, missing)
            to_labels = None if to_labels is None else _filled(to_labels, missing)
        x = x.to(self.dtype, memory_format=torch.channels_last)
        return self.network(x, noise_labels, labels, augment_labels, to_labels)[:size]


def _filled(tensor: torch.Tensor, missing: int) -> torch.Tensor:
    """`missing` more rows, copies of the first."""
    return torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])])
