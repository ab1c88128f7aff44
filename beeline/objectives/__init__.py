"""Objectives: what one step of training is. The seam between the trainer and a method.

An objective says what it needs (`needs`), owns what learns beside the student (`critic`), and adds gradients (`backward`);
the trainer around it owns data, optimisers, averages, checkpoints and ranks, and knows no loss. A new one is a file with a
class, and a recipe that names it: `objective="beeline.objectives.kd:Distillation"`, or a class of your own package.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from beeline.config import LmmConfig, PhaseConfig
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.features import FeatureNetwork
from beeline.learner import Learner
from beeline.samplers import FewStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective asks of the trainer, and what the trainer asks of the workspace before it starts."""

    pairs: bool = False
    """Noise-image pairs: `Batch.noise`, `x1`, `labels`."""
    images: bool = False
    """Real images: `Batch.real`, `real_labels`."""
    teacher: bool = False
    """The teacher, frozen: `Setting.teacher`."""
    average: bool = False
    """The student's own average as it stands, a target for others: `Setting.average`."""
    features: tuple[str, ...] = ()
    """Frozen feature networks by name, "probe" or a pretrained backbone: `Setting.features`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What the trainer provides to an objective, as it needs."""

    config: LmmConfig
    phase: PhaseConfig
    image_shape: tuple[int, int, int]
    num_classes: int
    features: Mapping[str, FeatureNetwork]
    teacher: Denoiser | None = None
    average: Denoiser | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A rank's rows of one step, or a part of them, on the device. What the objective did not ask for is None."""

    noise: torch.Tensor | None = None
    """Unit-variance x0 / sigma_max of the pairs, float32 (B, C, H, W)."""
    x1: torch.Tensor | None = None
    """Images of the pairs, float32 (B, C, H, W), nominally in [-1, 1]."""
    labels: torch.Tensor | None = None
    """Classes of the pairs, one-hot (B, K); None for unconditional students."""
    real: torch.Tensor | None = None
    """Real images, float32 (B, C, H, W) in [-1, 1]."""
    real_labels: torch.Tensor | None = None
    """Their classes, one-hot (B, K); None for unconditional students."""
    weight: float = 1.0
    """What the gradient of these rows' mean loss counts in the step: 1 / parts, and near it where shares differ in size."""


class Objective(Protocol):
    """Made anew for each phase of training, on each rank alike."""

    def __init__(self, setting: Setting) -> None: ...

    @staticmethod
    def needs(config: LmmConfig, phase: PhaseConfig) -> Needs:
        """What a phase asks for. Raises BeelineError for settings that do not go together."""
        ...

    @property
    def few_step(self) -> FewStep:
        """How a student of this phase may be sampled."""
        ...

    @property
    def critic(self) -> nn.Module | None:
        """What learns beside the student, by the optimiser of `config.discriminator`: a discriminator, a fake score."""
        ...

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of `batch` to the student's parameters, and to the critic's; return figures for the log.

        All randomness comes from `generator`, or torch's global one, which is seeded for the step.
        """
        ...


def load(path: str) -> type[Objective]:
    """The class that "package.module:Class" names. Raises BeelineError where there is none."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BeelineError(
            f"objective {path!r} cannot be loaded ({error}); expected package.module:Class, for example "
            "beeline.objectives.lmm:LinesMatching"
        ) from error
