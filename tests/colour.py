"""Generated colour images: a zip in EDM's layout, with labels."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def colour_zip(path: Path, *, resolution: int, classes: int, count: int) -> Path:
    """Write `count` smooth PNGs of `resolution` pixels in folders with EDM's names; each class has its own colour."""
    chance = np.random.default_rng(0)
    colours = chance.integers(0, 256, (classes, 3))
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            label, name = number % classes, f"{number // 1000:05d}/img{number:08d}.png"
            coarse = np.clip(colours[label] + chance.integers(-60, 61, (4, 4, 3)), 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(coarse).resize((resolution, resolution), Image.Resampling.BICUBIC).save(buffer, "PNG")
            archive.writestr(name, buffer.getvalue())
            labels.append([name, label])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path
