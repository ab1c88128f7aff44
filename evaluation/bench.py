"""The bench: models, networks and data that the work items of an evaluation share in an actor's memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from beeline.config import EvaluateConfig
from beeline.denoiser import Denoiser
from beeline.features.measuring import PROBES, Eye, Looks, MeasuringProbe
from beeline.files.arrays import spread
from beeline.metrics.frechet import Gaussian
from beeline.sampling.inference import prepare
from evaluation.reference import arrays_in, reference
from pipeline.gen_pairs import calibrated_levels
from pipeline.model_folders import require_measuring, require_model, require_probe
from pipeline.reader import real_labels
from pipeline.storage import Folder

HELD_OUT = "evaluation/held-out"
HELD_OUT_PAIRS = "pairs.npz"
SAMPLING, LOOKING = "sampling_seconds", "looking_seconds"


def held_out_rows(pairs: dict[str, Any], count: int) -> list[int]:
    """Indices of `count` held-out pairs: they follow those of pairs/, with evenly spread classes (index mod classes)."""
    return [pairs["pairs"]["count"] + int(i) for i in spread(count, max(count, pairs["num_classes"]))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings that all work items share. `images` and `pairs` are the plans of those stages; `count` is samples per draw."""

    workspace: Folder
    recipe: str
    config: EvaluateConfig
    images: dict[str, Any]
    pairs: dict[str, Any] | None
    count: int
    moments: Gaussian | None = None
    """Moments of the real images in Inception's features, if a file gives them."""


def sampled_model(workspace: Folder, name: str, recipe: str, config: EvaluateConfig) -> tuple[Denoiser, str]:
    """`require_model`; a teacher also gets its levels if the solver is "calibrated"."""
    model, digest = require_model(workspace, name, recipe)
    if config.solver == "calibrated" and model.few_step is None:
        model.levels = calibrated_levels(workspace / name)
    return model, digest


class Job(Protocol):
    """A work item: `run` writes `file`. `evaluations` counts network evaluations, `samples` the measured samples."""

    @property
    def file(self) -> str: ...

    @property
    def evaluations(self) -> int: ...

    @property
    def samples(self) -> int: ...

    def run(self, bench: Bench) -> dict[str, float] | None: ...


class Bench:
    """The pool's worker: does work items on its device, and keeps shared models and data in memory."""

    def __init__(self, setup: Setup, jobs: Sequence[Job]) -> None:
        self.setup, self.jobs = setup, jobs
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.kind = torch.cuda.get_device_name() if self.device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        self.model = functools.lru_cache(maxsize=1)(self._model)  # items of a model follow each other
        self.eye = functools.cache(self._eye)
        self.reference = functools.cache(lambda name: reference(setup.workspace, name, setup.moments))

    def work(self, number: int) -> dict[str, Any]:
        """Do item `number`. Returns its network evaluations, its measured samples, and the seconds for drawing samples and
        for extracting features."""
        job = self.jobs[number]
        seconds = job.run(self) or {}
        counts = {"item": number, "evaluations": job.evaluations, "samples": job.samples}
        return counts | {SAMPLING: 0.0, LOOKING: 0.0} | seconds

    def place(self, *folders: str) -> Folder:
        """A folder of the workspace."""
        return self.setup.workspace / "/".join(folders)

    def look(self, images: torch.Tensor, names: tuple[str, ...] | None = None) -> dict[str, Looks]:
        """Features of uint8 images (n, C, H, W) in the measuring networks."""
        return {name: self.eye(name).look(images) for name in names or self.setup.config.features}

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Classes of the samples, int32 (count,): evenly spread over those of the real images."""
        labels = real_labels(self.place("images"), self.setup.images["images"])
        return labels[spread(self.setup.count, len(labels))]

    @functools.cached_property
    def held_out(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x1 and noise (n, C, H, W) and labels (n,) of pairs that no student was trained on, on the device."""
        x1, noise, labels = (torch.from_numpy(self.held_out_file[key]).to(self.device) for key in ("x1", "noise", "label"))
        return x1, noise, labels

    @functools.cached_property
    def held_out_file(self) -> dict[str, np.ndarray]:
        """The arrays of the held-out pairs; their noise is a function of "index"."""
        arrays = arrays_in(self.place(HELD_OUT), HELD_OUT_PAIRS, "x1", "noise", "label")
        assert self.setup.pairs is not None
        first = self.setup.pairs["pairs"]["count"]
        return {"index": np.arange(first, first + len(arrays["noise"]))} | arrays  # files of earlier versions lack it

    def _eye(self, name: str) -> Eye:
        setup = self.setup
        if name in PROBES:
            network = MeasuringProbe(require_probe(setup.workspace, PROBES[name], setup.recipe)[0])
        else:
            network = require_measuring(setup.workspace, name)[0]
        return Eye(network, self.device)

    def _model(self, name: str) -> Denoiser:
        config = self.setup.config
        model = sampled_model(self.setup.workspace, name, self.setup.recipe, config)[0].to(self.device)
        size = config.batch_size if config.compiled else None
        return prepare(model, precision=config.precision, compiled=config.compiled, batch_size=size)
