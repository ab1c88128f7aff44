"""Quick validation of a student in training: a few samples to look at, and a distance in the features of the losses' probe.

The losses may use the same probe, the reported metrics do not. Selection by this distance (the best student, the winner of a
sweep) is therefore not selection by a reported metric. Without probes in the workspace, only samples are drawn.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from beeline.denoiser import Denoiser
from beeline.features.measuring import LOSSES_PROBE, Eye, MeasuringProbe
from beeline.files.names import IMAGES, PROBE
from beeline.metrics.frechet import Statistics, frechet_distance
from beeline.metrics.measures import NEAREST_DC, VALIDATION, neighbourhoods
from beeline.noise import stream_seed
from beeline.pixels import quantised
from beeline.sampling import Sampling
from beeline.sampling.few_step import FewStep, Step
from evaluation.samplings import draw
from pipeline.model_folders import require_probe
from pipeline.reader import ShardReader
from pipeline.sheet import sheet_png
from pipeline.storage import Folder

SHOWN, COLUMNS = 40, 10
BATCH = 256


def sampling_of(few_step: FewStep | None) -> Sampling:
    """The sampling of a model in training: the levels that a student is trained on, or one step; Heun's 18 for a teacher."""
    return Sampling() if few_step is None else Sampling(steps=few_step.trained_steps or (0,), guess=few_step.guess)


class Validation:
    """Compares `count` samples with as many real images of the same classes.

    `images` is the plan of images/; `classes` as `ShardReader` takes them. All students are sampled from the same noise,
    which no pair and no reported draw uses.
    """

    def __init__(
        self,
        workspace: Folder,
        recipe: str,
        images: dict[str, Any],
        *,
        count: int,
        seed: int,
        device: torch.device,
        classes: range | None = None,
    ) -> None:
        reader = ShardReader(workspace / IMAGES, images["images"], 0, classes)
        rows = reader.batch(0, min(count, reader.count))
        self.labels: np.ndarray = rows["label"]
        self.seed = stream_seed(seed, "validation")
        self._eye: Eye | None = None
        if not (workspace / PROBE / "losses").sizes():
            return
        self._eye = Eye(MeasuringProbe(require_probe(workspace, "losses", recipe)[0]), device)
        self._real = self._eye.look(torch.from_numpy(rows["image"])).features

    def judge(self, model: Denoiser, steps: tuple[Step, ...] | None = None) -> tuple[dict[str, float], bytes]:
        """The figures `fd_probe_losses` (NaN for samples that are not finite), `precision_probe_losses` and
        `recall_probe_losses`, and a PNG of the first samples.

        Recall shows what the distance alone may hide: a student that has collapsed to a few images of each class. There are
        no figures without a probe. `steps` is the schedule to sample at, by default the steps that the student was
        trained on, or one step.
        """
        sampling = Sampling(steps=steps) if steps else sampling_of(model.few_step)
        count = len(self.labels) if self._eye is not None else min(SHOWN, len(self.labels))
        images = draw(model, sampling, range(count), self.labels[:count], seed=self.seed, batch_size=BATCH)
        sheet = sheet_png(images[:SHOWN], columns=COLUMNS)
        if self._eye is None:
            return {}, sheet
        if not bool(images.isfinite().all()):
            return {VALIDATION: math.nan}, sheet
        seen = self._eye.look(quantised(images)).features
        figures = {VALIDATION: frechet_distance(Statistics.of(seen), Statistics.of(self._real))}
        if len(seen) > NEAREST_DC:
            near = neighbourhoods(seen, self._real)
            figures |= {f"{name}_{LOSSES_PROBE}": near[name] for name in ("precision", "recall")}
        return figures, sheet
