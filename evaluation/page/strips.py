"""Strips of samples: the sheets of a measurement cut into one picture for each way of sampling. The page shows the first lines
of a picture, and all of it after a click."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from beeline.errors import BeelineError, reading
from beeline.files.names import EVALUATION
from beeline.sampling import Sampling
from evaluation.models import Model
from evaluation.results import NEAREST, SAMPLES
from pipeline.sheet import GAP
from pipeline.storage import Folder

COLUMNS = 10  # images per line of a picture
BUDGET = 2_500_000  # bytes of all sheets; beyond it pictures are WebP instead of PNG, which keeps the page light
QUALITY = 82  # of WebP
MAX_PIXELS = 100_000_000  # of a sheet
FIX = "remove its folder and measure again with evaluation/evaluate.py"


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as data URI, its size in pixels, and the height of the part that the page shows at first."""

    src: str
    width: int
    height: int
    shown: int


@dataclasses.dataclass(frozen=True)
class Strip:
    """The picture of one way of sampling a model."""

    model: Model
    sampling: Sampling
    picture: Picture


@dataclasses.dataclass(frozen=True)
class Strips:
    """The strips of all models: samples of the same noise, and samples with the real images nearest to them. `lossless` says
    whether the pictures are as measured."""

    samples: tuple[Strip, ...]
    nearest: tuple[Strip, ...]
    lossless: bool

    def first_of(self, *names: str) -> list[Strip]:
        """The first strip with nearest real images of each of these models."""
        first = {strip.model.name: strip for strip in reversed(self.nearest)}
        return [first[name] for name in names if name in first]


def strips(place: Folder, models: Sequence[Model]) -> Strips:
    """The strips of every model that has sheets. Raises BeelineError for damaged sheets."""
    sheets = [
        (model, name, png)
        for model in models
        for name in (SAMPLES, NEAREST)
        if (png := _read(place / EVALUATION / model.name, name)) is not None
    ]
    lossless = sum(len(png) for _, _, png in sheets) <= BUDGET
    found: dict[str, list[Strip]] = {SAMPLES: [], NEAREST: []}
    for model, name, png in sheets:
        where = f"{place}/{EVALUATION}/{model.name}/{name}"
        sheet = Sheet(png, rows=len(model.samplings), lines=1 if name == SAMPLES else 2, where=where)
        pictures = sheet.pictures(lossless=lossless)
        found[name] += [Strip(model, *both) for both in zip(model.samplings, pictures, strict=True)]
    return Strips(tuple(found[SAMPLES]), tuple(found[NEAREST]), lossless)


def _read(folder: Folder, name: str) -> bytes | None:
    try:
        return folder.read(name)
    except FileNotFoundError:
        return None


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A sheet with `lines` lines of images for each of `rows` ways of sampling; errors name `where`."""

    png: bytes
    rows: int
    lines: int
    where: str

    def pictures(self, *, lossless: bool) -> list[Picture]:
        """A picture for each row: its first COLUMNS images, each above the images that belong to it, then the next ones."""
        cells = self._cells()
        return [_picture(cells[r * self.lines : (r + 1) * self.lines], lossless) for r in range(self.rows)]

    def _cells(self) -> np.ndarray:
        """The images (lines, columns, side, side, 3), uint8. Raises BeelineError for a sheet of another shape."""
        with reading(f"{self.where} is not a readable picture", FIX):
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
                f"{FIX}"
            )
        padded = np.zeros((height, width, 3), np.uint8)
        padded[:-GAP, :-GAP] = sheet
        cells = padded.reshape(lines, pitch, width // pitch, pitch, 3).swapaxes(1, 2)
        return cells[:, :, :-GAP, :-GAP]


def _picture(lines: np.ndarray, lossless: bool) -> Picture:
    """The picture of lines (L, n, side, side, 3), transparent between the images."""
    count, side = lines.shape[1], lines.shape[2]
    columns = min(COLUMNS, count)
    blocks = -(-count // columns)
    block_height = len(lines) * (side + GAP)
    block_gap = 2 * GAP if len(lines) > 1 else 0
    height = blocks * (block_height + block_gap) - GAP - block_gap
    pixels = np.zeros((height, columns * (side + GAP) - GAP, 4), np.uint8)
    for j in range(count):
        for k, line in enumerate(lines):
            top = j // columns * (block_height + block_gap) + k * (side + GAP)
            left = j % columns * (side + GAP)
            pixels[top : top + side, left : left + side, :3] = line[j]
            pixels[top : top + side, left : left + side, 3] = 255
    return Picture(_uri(pixels, lossless), pixels.shape[1], height, block_height - GAP)


def _uri(pixels: np.ndarray, lossless: bool) -> str:
    """RGBA pixels (H, W, 4) as data URI; grey images without colour channels, which is smaller."""
    image = Image.fromarray(pixels, "RGBA")
    if (pixels[..., :1] == pixels[..., :3]).all():
        image = Image.merge("LA", (image.getchannel("R"), image.getchannel("A")))
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.convert("RGBA").save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/{'png' if lossless else 'webp'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
