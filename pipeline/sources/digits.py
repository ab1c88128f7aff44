"""scikit-learn's digits, a built-in source."""

from __future__ import annotations

import numpy as np

from beeline.config import ImagesConfig
from beeline.errors import BeelineError
from pipeline.sources.labels import Classes
from pipeline.sources.pixels import Pixels


class Digits:
    """1,797 images, 8x8, 16 grey levels scaled to 0 ... 255."""

    sequential = False

    def __init__(self, config: ImagesConfig) -> None:
        from sklearn.datasets import load_digits

        if (config.resolution, config.channels) != (8, 1):
            raise BeelineError(
                f"images.resolution is {config.resolution} and images.channels is {config.channels}, but the digits are 8x8 "
                "with 1 channel; set 8 and 1, or choose another images.source"
            )
        pixels, target = load_digits(return_X_y=True)
        self.pixels, self.classes, self.notes = Pixels(config), Classes(np.asarray(target, np.int32)), []
        self.names = [f"digit {i}" for i in range(len(target))]
        self._images = np.rint(np.asarray(pixels).reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)

    def image(self, index: int) -> np.ndarray:
        return self._images[index]
