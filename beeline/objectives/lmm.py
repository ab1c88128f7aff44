"""Lines matching (Matityahu & Fattal 2024): the student sees the end of a line from any point on it.

    L = L_lines + weight lambda L_adv

L_lines is a distance in pixels or in features (eq. 3), L_adv the hinge loss of a discriminator that compares the student's
images with real ones. Each term is a switch of the phase: distance, levels or SOT steps, adversarial weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from beeline import adversarial, lines, perceptual
from beeline.augment import mirrored
from beeline.config import LmmConfig, PhaseConfig
from beeline.denoiser import Denoiser
from beeline.discriminator import SCRATCH, Discriminator
from beeline.errors import BeelineError
from beeline.learner import Learner
from beeline.objectives import Batch, Needs, Setting
from beeline.samplers import FewStep

# The feature network of each distance that has one.
NETWORK = {"probe": "probe", "lpips": "vgg16", "lpips_avg": "vgg16_avg", "johnson": "vgg16"}


class LinesMatching:
    """One phase of lines matching."""

    @staticmethod
    def needs(config: LmmConfig, phase: PhaseConfig) -> Needs:
        """Pairs; real images for the adversarial term; the networks of distance and discriminator.

        Raises BeelineError for a sampling rule that does not follow the line, and sizes that networks cannot take.
        """
        if (config.line, config.rule) in (("ve", "line"), ("lerp", "same_noise")):
            raise BeelineError(
                f"the sampling rule {config.rule!r} does not follow the line {config.line!r}: its points lie elsewhere. "
                "Use ve with same_noise, or lerp with line"
            )
        if NETWORK.get(phase.distance, "probe") != "probe" and 0 < phase.resize < 16:
            raise BeelineError(
                f"the distance {phase.distance!r} is asked for at {phase.resize} pixels; VGG16 halves images four times: "
                "resize to 16 or more"
            )
        names = [NETWORK[phase.distance]] if phase.distance in NETWORK else []
        if phase.adversarial_weight:
            names += [name for name in config.discriminator.networks if name != SCRATCH]
        return Needs(pairs=True, images=phase.adversarial_weight > 0, features=tuple(dict.fromkeys(names)))

    def __init__(self, setting: Setting) -> None:
        self.config, self.phase = setting.config, setting.phase
        self._distance = distance(setting)
        self.critic: Discriminator | None = None
        if self.phase.adversarial_weight:
            settings = self.config.discriminator
            self.critic = Discriminator(
                {name: None if name == SCRATCH else setting.features[name] for name in settings.networks},
                image_shape=setting.image_shape,
                num_classes=setting.num_classes,
                policy=settings.augment,
                side=settings.resize,
                width=settings.width,
            )

    @property
    def few_step(self) -> FewStep:
        config = self.config
        return FewStep(num_steps=config.num_steps, rule=config.rule, line=config.line, trained_steps=self.phase.steps)

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        assert batch.x1 is not None
        assert batch.noise is not None
        sigma = lines.draw_levels(
            len(batch.x1),
            num_steps=self.config.num_steps,
            law=self.phase.levels,
            steps=self.phase.steps,
            generator=generator,
        )
        images = student(lines.point(batch.x1, batch.noise, sigma, self.config.line), sigma, batch.labels)
        loss = self._distance(images, batch.x1).mean()
        if critic is None:
            (batch.weight * loss).backward()
            return {"lines": loss.detach()}

        assert self.critic is not None
        with critic.autocast():
            fake = self.critic.look(images, generator)
        fooling = adversarial.hinge_generator(critic.frozen(fake, batch.labels))
        gradient, balance = adversarial.balanced_gradient(
            images, loss, fooling, last_layer(student.model), self.phase.adversarial_weight
        )
        images.backward(batch.weight * gradient)

        assert batch.real is not None
        real_images = mirrored(batch.real, generator) if self.config.discriminator.mirror else batch.real
        with critic.autocast(), torch.no_grad():
            real = self.critic.look(real_images, generator)
        of_fake = critic([[part.detach() for part in look] for look in fake], batch.labels)
        of_real = critic(real, batch.real_labels)
        loss_of_critic = adversarial.hinge_discriminator(of_real, of_fake)
        (batch.weight * loss_of_critic).backward()
        figures = {"lines": loss, "adversarial": fooling, "lambda": balance, "critic": loss_of_critic}
        signs = {"real_positive": of_real, "fake_positive": of_fake}
        figures |= {name: torch.stack([(part > 0).float().mean() for part in of]).mean() for name, of in signs.items()}
        return {name: value.detach() for name, value in figures.items()}


def distance(setting: Setting) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The phase's distance d(images, targets), per image (B,)."""
    phase = setting.phase
    if phase.distance == "l2":
        return perceptual.l2
    if phase.distance == "huber":
        return perceptual.pseudo_huber
    network = setting.features[NETWORK[phase.distance]]
    features = perceptual.johnson if phase.distance == "johnson" else perceptual.perceptual
    return functools.partial(features, network, pixel_weight=phase.pixel_weight, side=phase.resize)


def last_layer(model: nn.Module) -> nn.Parameter:
    """The weight of the denoiser's output convolution."""
    assert isinstance(model, Denoiser)
    weight = model.model.last_layer
    assert isinstance(weight, nn.Parameter)
    return weight
