"""Values of all ranks, for losses that are a function of the whole batch rather than a mean over its rows."""

from __future__ import annotations

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of ranks; 1 without distributed training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(own: torch.Tensor) -> list[torch.Tensor]:
    """Gather the tensors of all ranks, of the same shape, in the order of the ranks. This rank's own entry is `own` itself.

    Gradients flow to the own entry only. If every rank computes the same loss of all entries, the gradients of the ranks add
    up to the loss's gradient. DDP averages them, so multiply the loss by `world_size()`.
    """
    if world_size() == 1:
        return [own]
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own.detach().contiguous())
    parts[dist.get_rank()] = own
    return parts
