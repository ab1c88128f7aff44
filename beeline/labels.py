"""Class labels: one-hot encoding for networks, the classes of pairs, and subsets of consecutive classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class Subset(NamedTuple):
    """One of several subsets of consecutive classes."""

    number: int
    classes: range


def subset(number: int, count: int, num_classes: int) -> Subset:
    """Return subset `number` of `count`. Class c belongs to subset c * count // num_classes."""
    first, last = (-(-k * num_classes // count) for k in (number, number + 1))
    return Subset(number, range(first, last))


def subset_of(one_hot: torch.Tensor, count: int) -> torch.Tensor:
    """Return the number of the subset of each row's class, int64 (B,), for one-hot labels (B, K).

    Raises ValueError for rows that do not name exactly one class.
    """
    unclear = int((one_hot.count_nonzero(dim=1) != 1).sum())
    if unclear:
        raise ValueError(
            f"{unclear} of {len(one_hot)} rows of labels do not name one class; a set of students needs one per row"
        )
    return one_hot.argmax(dim=1) * count // one_hot.shape[1]


def pair_labels(indices: Sequence[int], num_classes: int) -> np.ndarray:
    """Return the class of each pair, int32 (n,): index mod num_classes, so that classes are balanced; -1 for no classes."""
    return np.asarray(indices, np.int64).astype(np.int32) % num_classes if num_classes else np.full(len(indices), -1, np.int32)
