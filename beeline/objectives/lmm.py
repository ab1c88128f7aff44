"""Lines matching (Matityahu & Fattal 2024): the student predicts the end of a line from any point on it.

    L = L_lines + weight lambda L_adv

L_lines is a distance in pixels or in features (eq. 3). L_adv is the hinge loss of a discriminator that compares the student's
images with real ones. The distance, the levels or SOT steps, and the adversarial weight are settings.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from torch import nn

from beeline.augmentation import mirrored
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, adversarial, lines, perceptual
from beeline.objectives.discriminator import SCRATCH, Discriminator, DiscriminatorConfig
from beeline.objectives.learner import Learner
from beeline.objectives.optimizer import OptimizerConfig
from beeline.sampling.few_step import FewStep
from beeline.settings import MAX_SIDE, Amount, Index, Range, Some, Steps

SMALLEST_VGG16 = 16  # pixels: VGG16 halves images four times
NETWORK = {"probe": "probe", "lpips": "vgg16", "lpips_avg": "vgg16_avg", "johnson": "vgg16"}
"""The feature network of each distance that needs one."""
DISTANCES = {
    "l2": "pixel distance (L2)",
    "huber": "pixel distance (Huber)",
    "probe": "perceptual distance (probe)",
    "lpips": "perceptual distance (LPIPS, VGG16)",
    "lpips_avg": "perceptual distance (LPIPS, VGG16 with average pooling)",
    "johnson": "perceptual distance (Johnson et al., VGG16)",
}
LOSS = "lines"
"""The figure of the distance in a log."""


def loss_label(settings: Mapping[str, Any]) -> str:
    """The loss of an objective with these settings (of a JSON file), so that losses of other kinds are told apart."""
    distance, resize = settings["distance"], settings.get("resize")
    return f"lines: {DISTANCES.get(distance, distance)}{f' at {resize}' if resize else ''}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinesMatchingConfig(ObjectiveConfig):
    """Lines matching. Training levels follow `levels`, or, with `steps` (SOT), only those steps are drawn."""

    num_steps: Steps = 18
    """Levels of the EDM schedule."""
    line: Literal["ve", "lerp"] = "lerp"
    """Line between image and x0. "lerp" is the segment: at sigma_max the student trains on exactly what it samples from. "ve"
    adds noise to the image: at sigma_max the input still holds the image, which is missing when the student samples."""
    rule: Literal["same_noise", "line", "fresh_noise"] = "line"
    """Sampling rule: "line" for the line "lerp", "same_noise" for "ve"."""
    levels: Literal["schedule", "sigma"] = "schedule"
    """Distribution of the training levels: uniform over the schedule, or uniform in sigma."""
    steps: Some[Index] | None = None
    """SOT: schedule indices to train, starting with 0."""
    distance: Literal["l2", "huber", "probe", "lpips", "lpips_avg", "johnson"] = "probe"
    """In pixels: "l2" (squared) or "huber" (pseudo-Huber). In features: "probe" (the losses' probe), "lpips" (VGG16),
    "lpips_avg" (VGG16 with average pooling, as in CTM), or "johnson" (unnormalised VGG16 features; Johnson et al. 2016, cited
    in the LMM paper)."""
    resize: Annotated[int, Range(0, MAX_SIDE)] = 0
    """Side in pixels at which features are computed; 0 keeps the images' own size."""
    pixel_weight: Amount = 0.0
    """Weight of a squared pixel distance, added to a distance in features."""
    adversarial_weight: Amount = 0.0
    """Weight of the adversarial term, multiplied by its adaptive weight; 0 means no discriminator."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig(optimizer=OptimizerConfig())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None:
            rising = self.steps[0] == 0 and all(a < b for a, b in itertools.pairwise(self.steps))
            self.require(rising, "steps", "increasing indices from 0, the level of pure noise, for example 0 or 0 8")
            self.require(self.steps[-1] < self.num_steps, "steps", f"indices below num_steps, {self.num_steps}")
        follows = (self.line, self.rule) not in (("ve", "line"), ("lerp", "same_noise"))
        self.require(follows, "rule", f"a rule that follows the line {self.line!r}: same_noise with ve, line with lerp")
        self.require(not self._too_small(self.resize or MAX_SIDE), "resize", f"{SMALLEST_VGG16} or more, for VGG16")

    def needs(self) -> Needs:
        """Pairs; real images for the adversarial term; feature networks of the distance and the discriminator."""
        names = [NETWORK[self.distance]] if self.distance in NETWORK else []
        if self.adversarial_weight:
            names += [name for name in self.discriminator.networks if name != SCRATCH]
        return Needs(pairs=True, images=self.adversarial_weight > 0, features=tuple(dict.fromkeys(names)))

    def sampling(self) -> FewStep:
        """Sampling at any levels, or only at the steps of SOT."""
        return FewStep(num_steps=self.num_steps, rule=self.rule, line=self.line, trained_steps=self.steps)

    def about(self) -> str:
        """Describe the objective, like "lines, perceptual distance (probe), adversarial term, SOT at steps 0"."""
        parts = ["lines", DISTANCES[self.distance], *["adversarial term"] * (self.adversarial_weight > 0)]
        return ", ".join([*parts, *([] if self.steps is None else [f"SOT at steps {','.join(map(str, self.steps))}"])])

    def build(self, context: Context) -> LinesMatching:
        """Build the objective, with a discriminator if there is an adversarial term."""
        return LinesMatching(self, context)

    def check(self, resolution: int) -> None:
        """Raise BeelineError if images are too small for the feature network of the distance."""
        if self._too_small(self.resize or resolution):
            raise BeelineError(
                f"the distance {self.distance!r} would run at {self.resize or resolution} pixels, but VGG16 halves images four "
                f"times; set the objective's resize to {SMALLEST_VGG16} or more, or choose another distance"
            )

    def representative(self) -> LinesMatchingConfig:
        """Replace weights, levels and the discriminator's learning rate by defaults that do not affect the cost."""
        return dataclasses.replace(
            self,
            steps=None,
            pixel_weight=0.0,
            adversarial_weight=float(self.adversarial_weight > 0),
            discriminator=dataclasses.replace(self.discriminator, optimizer=OptimizerConfig()),
        )

    def _too_small(self, side: int) -> bool:
        return NETWORK.get(self.distance, "probe") != "probe" and side < SMALLEST_VGG16


class LinesMatching(Objective):
    """Training step of lines matching."""

    def __init__(self, config: LinesMatchingConfig, context: Context) -> None:
        self.config = config
        self._distance = distance(config, context)
        self.discriminator: Discriminator | None = None
        if config.adversarial_weight:
            settings = config.discriminator
            self.critic_optimizer = settings.optimizer
            self.discriminator = Discriminator(
                {name: None if name == SCRATCH else context.features[name] for name in settings.networks},
                image_shape=context.image_shape,
                num_classes=context.num_classes,
                policy=settings.augment,
                side=settings.resize,
                width=settings.width,
            )
        self.critic = self.discriminator

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute gradients. Figures: "lines" and, with a discriminator, its losses and the shares of positive logits."""
        assert batch.x1 is not None
        assert batch.noise is not None
        config = self.config
        sigma = lines.draw_levels(
            batch.size, num_steps=config.num_steps, law=config.levels, steps=config.steps, generator=generator
        )
        images = student(lines.point(batch.x1, batch.noise, sigma, config.line), sigma, batch.labels)
        loss = self._distance(images, batch.x1).mean()
        if critic is None:
            (batch.weight * loss).backward()
            return {LOSS: loss.detach()}

        assert self.discriminator is not None
        with critic.autocast():
            fake = self.discriminator.look(images, generator)
        fooling = adversarial.hinge_generator(critic.frozen(fake, batch.labels))
        gradient, balance = adversarial.balanced_gradient(
            images, loss, fooling, last_layer(student.model), config.adversarial_weight
        )
        images.backward(batch.weight * gradient)

        assert batch.real is not None
        real_images = mirrored(batch.real, generator) if config.discriminator.mirror else batch.real
        with critic.autocast(), torch.no_grad():
            real = self.discriminator.look(real_images, generator)
        fake_logits = critic([[part.detach() for part in look] for look in fake], batch.labels)
        real_logits = critic(real, batch.real_labels)
        loss_of_critic = adversarial.hinge_discriminator(real_logits, fake_logits)
        (batch.weight * loss_of_critic).backward()
        figures = {LOSS: loss, "adversarial": fooling, "lambda": balance, "critic": loss_of_critic}
        signs = {"real_positive": real_logits, "fake_positive": fake_logits}
        figures |= {name: torch.stack([(part > 0).float().mean() for part in logits]).mean() for name, logits in signs.items()}
        return {name: value.detach() for name, value in figures.items()}


def distance(config: LinesMatchingConfig, context: Context) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the distance d(images, targets), per image (B,)."""
    if config.distance == "l2":
        return perceptual.l2
    if config.distance == "huber":
        return perceptual.pseudo_huber
    network = context.features[NETWORK[config.distance]]
    features = perceptual.johnson if config.distance == "johnson" else perceptual.perceptual
    return functools.partial(features, network, pixel_weight=config.pixel_weight, side=config.resize)


def last_layer(model: nn.Module) -> nn.Parameter:
    """Return the weight of the denoiser's output convolution."""
    assert isinstance(model, Denoiser)
    weight = model.model.last_layer
    assert isinstance(weight, nn.Parameter)
    return weight
