"""Sheets of sample images, enlarged for viewing."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from beeline.pixels import quantised

GAP = 4  # pixels between images


def sheet_png(images: torch.Tensor | np.ndarray, columns: int, min_side: int = 40) -> bytes:
    """Return a PNG of the images (n, C, H, W), uint8 or in [-1, 1], 1 or 3 channels, in rows of `columns`.

    Images smaller than `min_side` pixels are enlarged bicubically.
    """
    pixels = images if isinstance(images, np.ndarray) else quantised(images).cpu().numpy()
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
