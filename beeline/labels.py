"""Class labels: one-hot encoding for networks, and the classes of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F


def as_one_hot(labels: torch.Tensor | None, num_classes: int, batch: int, device: torch.device) -> torch.Tensor | None:
    """Convert labels to float32 one-hot (B, K): class indices (B,) are expanded, one-hot passes, None stays None.

    Raises ValueError for a conditional model without labels, an unconditional one with labels, or a wrong class count.
    """
    if num_classes == 0:
        if labels is not None:
            raise ValueError("labels were given to an unconditional model; pass labels=None")
        return None
    if labels is None:
        raise ValueError(f"the model is conditional on {num_classes} classes; pass labels of shape (B,) or (B, K)")
    if labels.ndim == 1:
        labels = F.one_hot(labels.to(device=device, dtype=torch.int64), num_classes)
    if labels.shape != (batch, num_classes):
        raise ValueError(f"labels have shape {tuple(labels.shape)}; expected ({batch},) or ({batch}, {num_classes})")
    return labels.to(device=device, dtype=torch.float32)


def pair_labels(indices: Sequence[int], num_classes: int) -> np.ndarray:
    """Return the class of each pair, int32 (n,): index mod num_classes, so that classes are balanced; -1 for no classes."""
    return np.asarray(indices, np.int64).astype(np.int32) % num_classes if num_classes else np.full(len(indices), -1, np.int32)
