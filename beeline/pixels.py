"""Conversion of images between numbers in [-1, 1] and the 8 bits of files."""

from __future__ import annotations

import numpy as np
import torch


def to_float(pixels: np.ndarray) -> np.ndarray:
    """Convert uint8 pixels to float32 in [-1, 1]: EDM's u / 127.5 - 1."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def quantised(images: torch.Tensor) -> torch.Tensor:
    """Convert images in [-1, 1] to uint8 as EDM saves them: 127.5 x + 128, clipped to 0 ... 255 and truncated."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def rounded(images: np.ndarray) -> np.ndarray:
    """Convert images in [-1, 1] to the nearest uint8, the inverse of `to_float`; other values are clipped."""
    return ((images + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
