"""Between images as numbers in [-1, 1] and as the 8 bits that files hold."""

from __future__ import annotations

import numpy as np
import torch


def to_float(pixels: np.ndarray) -> np.ndarray:
    """uint8 pixels as float32 in [-1, 1]: EDM's u / 127.5 - 1."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def quantised(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as they would be saved, uint8: EDM's 127.5 x + 128, clipped to 0 ... 255 and cut off."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def rounded(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as the nearest uint8, the inverse of `to_float`; others are clipped."""
    return ((images + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
