"""Sheets of samples cut into the pictures of a page: for each way of sampling one image, its first lines in sight and all of
it to be had by a click."""

from __future__ import annotations

import base64
import dataclasses
import io

import numpy as np
from PIL import Image

from beeline.errors import BeelineError, reading
from pipeline.sheet import GAP

COLUMNS = 10  # images in a line of a picture
BUDGET = 2_500_000  # bytes of all sheets up to which pictures are PNG; above, WebP keeps the page light
QUALITY = 82
MAX_PIXELS = 100_000_000  # of a sheet


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as data URI, its size in pixels, and the height of that part of it which is seen at first."""

    src: str
    width: int
    height: int
    shown: int


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A sheet with `lines` lines of images for each of `rows` rows; `where` is named in errors."""

    png: bytes
    rows: int
    lines: int
    where: str

    def pictures(self, *, lossless: bool) -> list[Picture]:
        """One for each row: its first COLUMNS images with what belongs to them below, then the next ones."""
        cells = self._cells()
        return [_picture(cells[r * self.lines : (r + 1) * self.lines], lossless) for r in range(self.rows)]

    def _cells(self) -> np.ndarray:
        """The images (lines, columns, side, side, 3), uint8. Raises BeelineError where the sheet has another shape."""
        with reading(f"{self.where} is not a readable picture", self._mend):
            picture = Image.open(io.BytesIO(self.png), formats=("PNG",))
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} by {picture.height} pixels, more than {MAX_PIXELS:,}")
            sheet = np.asarray(picture.convert("RGB"))
        lines = max(1, self.rows * self.lines)
        height, width = sheet.shape[0] + GAP, sheet.shape[1] + GAP
        pitch = height // lines
        if height % lines or pitch <= GAP or width % pitch:
            raise BeelineError(
                f"{self.where} is {width - GAP} by {height - GAP} pixels, which does not hold {lines} lines of square images; "
                f"{self._mend}"
            )
        padded = np.zeros((height, width, 3), np.uint8)
        padded[:-GAP, :-GAP] = sheet
        cells = padded.reshape(lines, pitch, width // pitch, pitch, 3).swapaxes(1, 2)
        return cells[:, :, :-GAP, :-GAP]

    @property
    def _mend(self) -> str:
        return "remove its folder and measure again with evaluation/evaluate.py"


def _picture(lines: np.ndarray, lossless: bool) -> Picture:
    """Lines (L, n, side, side, 3), transparent between the images."""
    count, side = lines.shape[1], lines.shape[2]
    columns = min(COLUMNS, count)
    blocks = -(-count // columns)
    together = len(lines) * (side + GAP)
    apart = 2 * GAP if len(lines) > 1 else 0
    height = blocks * (together + apart) - GAP - apart
    made = np.zeros((height, columns * (side + GAP) - GAP, 4), np.uint8)
    for j in range(count):
        for k, line in enumerate(lines):
            top, left = j // columns * (together + apart) + k * (side + GAP), j % columns * (side + GAP)
            made[top : top + side, left : left + side, :3] = line[j]
            made[top : top + side, left : left + side, 3] = 255
    return Picture(_uri(made, lossless), made.shape[1], height, together - GAP)


def _uri(pixels: np.ndarray, lossless: bool) -> str:
    """RGBA pixels (H, W, 4) as data URI; without colour where there is none, which is smaller."""
    image = Image.fromarray(pixels, "RGBA")
    if (pixels[..., :1] == pixels[..., :3]).all():
        image = Image.merge("LA", (image.getchannel("R"), image.getchannel("A")))
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.convert("RGBA").save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/{'png' if lossless else 'webp'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
