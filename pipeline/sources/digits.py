"""scikit-learn's digits, built in."""

from __future__ import annotations

import numpy as np

from beeline.config import ImagesConfig
from beeline.errors import BeelineError
from pipeline.sources.labels import Classes
from pipeline.sources.pixels import Pixels


class Digits:
    """1,797 images, 8x8, 16 grey levels, stretched to 0 ... 255."""

    sequential = False

    def __init__(self, config: ImagesConfig) -> None:
        from sklearn.datasets import load_digits

        if (config.resolution, config.channels) != (8, 1):
            raise BeelineError(
                f"the digits are 8x8 with 1 channel; images.resolution {config.resolution} and images.channels "
                f"{config.channels} were asked for"
            )
        pixels, target = load_digits(return_X_y=True)
        self.pixels, self.classes, self.notes = Pixels(config), Classes(np.asarray(target, np.int32)), []
        self.names = [f"digit {i}" for i in range(len(target))]
        self._images = np.rint(np.asarray(pixels).reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)

    def image(self, index: int) -> np.ndarray:
        return self._images[index]
