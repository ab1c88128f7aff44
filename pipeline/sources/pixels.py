"""Convert one encoded picture to uint8 pixels: decode, rotate upright, reduce to 8 bits, compose on white, resize."""

from __future__ import annotations

import collections
import functools
import io
import os.path
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image

from beeline.config import ImagesConfig
from beeline.errors import reason

MAX_BYTES = 128 * 2**20  # of one encoded picture; Pillow limits its pixels to 89 million
# EPS is a program that Ghostscript would run; Pillow only recognises the others and cannot decode them.
NOT_DECODED = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
COMMON = {"PNG", "JPEG", "WEBP"}  # tried first
STILL = {"MPO", "PSD", "ICNS"}  # later frames are previews, layers or other sizes of the first
UPRIGHT = {  # EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112
TURNED = "were rotated upright according to their EXIF orientation"
REDUCED = "had 16 bits per channel and were scaled to 8"
COMPOSED = "had transparent parts and were composed on white"
FIRST_FRAME = "had several frames; the first was used"


class CorruptImage(Exception):
    """Raised for an image that cannot be used; the message names it and says why."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that are decoded, in the order in which they are tried."""
    Image.init()
    return tuple(sorted(set(Image.ID) - NOT_DECODED, key=lambda name: (name not in COMMON, name)))


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the lower-case file suffixes of these formats."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats())


def is_image(name: str) -> bool:
    """Return whether the name is that of a picture."""
    return os.path.splitext(name)[1].lower() in suffixes()


def kind_of(data: bytes) -> str:
    """Describe the actual kind of a file from its first bytes."""
    if not data:
        return "it is empty"
    if data.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file itself with: git lfs pull"
    if data[:100].lstrip().lower().startswith((b"<html", b"<!doctype html")):
        return "it is a web page"
    return f"unknown format, or a damaged start: {data[:8]!r}"


class Pixels:
    """Decodes pictures to the resolution and channels of `config`; `changes` counts the conversions they needed."""

    def __init__(self, config: ImagesConfig) -> None:
        self.config = config
        self.changes: collections.Counter[str] = collections.Counter()

    def decoded(self, read: Callable[[], bytes], name: str) -> np.ndarray:
        """Decode the picture whose encoded bytes `read` returns to uint8 (C, H, W). Raises CorruptImage naming it."""
        data = b""
        try:
            data = read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                return self.fitted(self._upright(Image.open(io.BytesIO(data), formats=formats())))
        except Image.UnidentifiedImageError as error:
            raise CorruptImage(f"{name} ({kind_of(data)})") from error
        except Exception as error:  # on damaged data, decoders can raise anything
            raise CorruptImage(f"{name} ({reason(error)})") from error

    def _upright(self, picture: Image.Image) -> Image.Image:
        """Convert the picture to 8 bits, opaque and upright."""
        if getattr(picture, "is_animated", False) and picture.format not in STILL:
            self.changes[FIRST_FRAME] += 1
        picture.load()
        turn = UPRIGHT.get(_orientation(picture))
        if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PPM", "PNG")):
            self.changes[REDUCED] += 1
            picture = Image.fromarray(np.rint(np.asarray(picture) / 257).astype(np.uint8))
        elif picture.mode in ("I", "F"):
            raise ValueError(f"32-bit pixels (mode {picture.mode}), whose white level is unknown; expected 8 or 16 bits")
        elif picture.has_transparency_data:
            picture = picture.convert("RGBA")
            if picture.getchannel("A").getextrema() != (255, 255):
                self.changes[COMPOSED] += 1
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        if turn is None:
            return picture
        self.changes[TURNED] += 1
        return picture.transpose(turn)

    def fitted(self, picture: Image.Image) -> np.ndarray:
        """Convert to uint8 (C, H, W) of the configured resolution and channels, by `config.fit`."""
        picture = picture.convert("L" if self.config.channels == 1 else "RGB")
        side_wanted = self.config.resolution
        if picture.size != (side_wanted, side_wanted):
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            if self.config.fit == "stretch":
                picture = picture.resize((side_wanted, side_wanted), Image.Resampling.LANCZOS)
            elif self.config.fit == "crop":
                box = (left, top, left + side, top + side)
                picture = picture.resize((side_wanted, side_wanted), Image.Resampling.LANCZOS, box=box)
            else:
                picture = _adm(picture, side_wanted)
        pixels = np.asarray(picture, np.uint8)
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF in an intact picture is ignored
        return 1


def _adm(picture: Image.Image, want: int) -> Image.Image:
    """Resize as ADM prepared ImageNet (Dhariwal & Nichol 2021): halve with a box filter while twice too large, then resize
    bicubically, then crop."""
    while min(picture.size) >= 2 * want:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = want / min(picture.size)
    size = (max(want, round(picture.width * scale)), max(want, round(picture.height * scale)))
    if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or 0):
        raise ValueError(f"{picture.width} x {picture.height} pixels, too elongated to be enlarged")
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (picture.width - want) // 2, (picture.height - want) // 2
    return picture.crop((left, top, left + want, top + want))
