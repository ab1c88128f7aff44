"""Sheets of sample images, enlarged so that the eye reads them."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

GAP = 4  # pixels between images


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images (n, C, H, W) in [-1, 1] as uint8: EDM's (127.5 x + 128), clipped."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy()


def sheet_png(images: torch.Tensor, columns: int, min_side: int = 40) -> bytes:
    """A PNG of the images (n, C, H, W), 1 or 3 channels, in rows of `columns`; small ones are enlarged bicubically."""
    pixels = to_uint8(images)
    _, channels, height, width = pixels.shape
    scale = max(1, -(-min_side // height))
    size = (width * scale + GAP, height * scale + GAP)
    rows = -(-len(pixels) // columns)
    sheet = Image.new("RGB", (size[0] * columns - GAP, size[1] * rows - GAP), "white")
    for i, image in enumerate(pixels):
        picture = Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0))
        picture = picture.convert("RGB").resize((width * scale, height * scale), Image.Resampling.BICUBIC)
        sheet.paste(picture, (i % columns * size[0], i // columns * size[1]))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
