"""Objectives: what a training step computes. The interface between the trainer and a method.

A method is one file with two parts. Its settings are an `ObjectiveConfig`, which a recipe puts into a phase. They say what the
method needs and how its students may be sampled, without building anything. Its `Objective` computes the gradients of a batch.
The trainer owns data, optimisers, averages, checkpoints and ranks; it contains no loss.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from beeline.settings import Settings

if TYPE_CHECKING:
    from beeline.denoiser import Denoiser
    from beeline.features import FeatureNetwork
    from beeline.objectives.learner import Learner
    from beeline.objectives.optimizer import OptimizerConfig
    from beeline.sampling.few_step import FewStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """Inputs that an objective needs. The trainer checks that the workspace has them before it starts."""

    pairs: bool = False
    """Noise-image pairs: `Batch.noise`, `x1`, `labels`."""
    images: bool = False
    """Real images: `Batch.real`, `real_labels`."""
    all_images: bool = False
    """All real images, for statistics: `Context.images`."""
    noise: bool = False
    """Fresh noise and labels, for methods without pairs: `Batch.noise`, `labels`."""
    models: tuple[str, ...] = ()
    """Frozen denoisers by their folder in the workspace, "teacher" or "students/<name>": `Context.models`."""
    features: tuple[str, ...] = ()
    """Frozen feature networks by name, "probe" or a pretrained backbone: `Context.features`."""
    second_level: bool = False
    """A student whose network takes a second noise level, `to`."""
    guidance: bool = False
    """A student whose network takes a weight of guidance, `guidance`."""
    guess: bool = False
    """A student whose network takes a first guess. The network that makes it is `init`, frozen."""

    @property
    def inputs(self) -> dict[str, bool]:
        """The additional inputs of the student's network, as settings of NetworkConfig."""
        return {"second_level": self.second_level, "guidance": self.guidance, "guess": self.guess}

    @property
    def image_folder(self) -> bool:
        """Whether training reads images/."""
        return self.images or self.all_images

    def __or__(self, other: Needs) -> Needs:
        """The combined needs of two phases."""
        return Needs(
            pairs=self.pairs or other.pairs,
            images=self.images or other.images,
            all_images=self.all_images or other.all_images,
            noise=self.noise or other.noise,
            models=tuple(dict.fromkeys((*self.models, *other.models))),
            features=tuple(dict.fromkeys((*self.features, *other.features))),
            **{name: needed or other.inputs[name] for name, needed in self.inputs.items()},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Networks and facts that the trainer provides to an objective."""

    image_shape: tuple[int, int, int]
    """(C, H, W)"""
    num_classes: int
    """0 for unconditional students."""
    models: Mapping[str, Denoiser]
    """The models of `Needs.models`, in the run's precision. Gradients flow to their inputs, not to their weights."""
    features: Mapping[str, FeatureNetwork]
    """The networks of `Needs.features`, in the run's precision. Gradients flow to their inputs, not to their weights."""
    average: Denoiser
    """The student's first average. The trainer updates it after each step: use it as a target, or copy it to make a target
    with another decay."""
    images: Callable[[], Iterable[torch.Tensor]] = tuple
    """With `Needs.all_images`, reads this rank's share of the real images, each once: float32 (n, C, H, W) in [-1, 1], on the
    device. Ranks must merge what they compute. No images where only shapes or FLOPs are computed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch: one rank's rows of one step, or a part of them, on the device. Unneeded tensors are None."""

    size: int
    """B"""
    step: int
    """Step of the phase, from 0."""
    total: int
    """Steps of the phase."""
    weight: float = 1.0
    """Weight of this micro-batch in the step: the objective multiplies its mean loss by it. It is 1 / micro-batches, or close
    to that if they differ in size."""
    noise: torch.Tensor | None = None
    """Unit-variance noise x0 / sigma_max, float32 (B, C, H, W): the noise of the pairs, or fresh noise."""
    x1: torch.Tensor | None = None
    """Images of the pairs, float32 (B, C, H, W), nominally in [-1, 1]."""
    labels: torch.Tensor | None = None
    """Classes of `noise`, one-hot (B, K); None for unconditional students."""
    real: torch.Tensor | None = None
    """Real images, float32 (B, C, H, W) in [-1, 1]."""
    real_labels: torch.Tensor | None = None
    """Classes of `real`, one-hot (B, K); None for unconditional students."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turns:
    """The networks that learn in a step, and the step's kind."""

    student: bool = True
    critic: bool = True
    work: int = 0
    """Amount of work, for methods whose steps differ in it. Planning counts one step of each kind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Settings, abc.ABC):
    """Settings of a method. Subclasses are frozen dataclasses with `kw_only=True`."""

    @abc.abstractmethod
    def needs(self) -> Needs:
        """Inputs that training needs."""

    @abc.abstractmethod
    def sampling(self) -> FewStep | None:
        """Few-step sampling that fits a student of this objective; None for ODE solvers, as for teachers."""

    @abc.abstractmethod
    def about(self) -> str:
        """The method in a few words, for logs and report: "lines, perceptual distance (probe), SOT at steps 0"."""

    @abc.abstractmethod
    def build(self, context: Context) -> Objective:
        """Build the objective. Called once per rank at the start of the phase, with torch's global generator seeded equally."""

    def check(self, resolution: int) -> None:
        """Raise BeelineError for images of `resolution` pixels that the method cannot take."""

    def representative(self) -> ObjectiveConfig:
        """Settings whose training step costs the same. Planning counts settings with equal representatives once."""
        return self


class Objective(abc.ABC):
    """The computation of a method's training steps."""

    critic: nn.Module | None = None
    """A second network that learns with the student: a discriminator or a fake score."""
    critic_optimizer: OptimizerConfig | None = None
    """Optimiser settings of the critic."""

    @abc.abstractmethod
    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of `batch` to the parameters that learn in this step. Returns scalar figures for the log.

        All randomness comes from `generator`, or from torch's global generator, which is seeded for the step.
        """

    def turns(self, step: int) -> Turns:
        """The networks that learn in `step` of the phase."""
        return Turns()

    def after_step(self, student: nn.Module) -> None:  # noqa: B027 (most methods have nothing to do)
        """Update networks that follow the student, for example targets. Called after each step in which the student learned."""

    def state(self) -> nn.Module | None:
        """The objective's own part of a checkpoint: target networks, learned weightings.

        Parameters that require gradients are trained with the student, by an optimiser with the same settings.
        """
        return None
