"""Score distillation: the student's images are compared with the teacher's by the scores of both, at all noise levels.

The student G maps noise to images, y = G(s0 z, s0) with z ~ N(0, I). The teacher T knows the score of noisy data at level s,
(T(x) - x) / s^2. The score of G's noisy images is not known, so a second denoiser learns it: the fake score f. It is the critic
of all methods of this family (DMD, DMD2, DI, SiD, SIM), starts as a copy of T and minimises the denoising loss on G's images
(Karras et al. 2022, eq. 2 and Table 1):

    L_f = E (1/s^2 + 1/sigma_data^2) |f(sg(y) + s n, s) - sg(y)|^2

sg stops gradients. The student learns in every K-th step, from a function of f - T. f learns in every step. Where both learn,
they see the same images (DMD2; Yin et al. 2024b, section 4.2 and released code).

Students of several steps train on the inputs that sampling gives them: their own images of the step before, with new noise
("backward simulation"; Yin et al. 2024b, section 4.4).
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch

from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.objectives import Batch, Context, Objective, Turns
from beeline.objectives.learner import Learner
from beeline.objectives.optimizer import OptimizerConfig
from beeline.objectives.perceptual import l2
from beeline.sampling.few_step import FewStep
from beeline.schedule import RHO, SIGMA_MAX, SIGMA_MIN
from beeline.settings import Positive, Settings, Share, Some, Steps

P_MEAN, P_STD = -1.2, 1.2
LevelLaw = Literal["karras", "lognormal"]
"""Distribution of noise levels: "karras" is the EDM schedule K(u) with u uniform, "lognormal" is ln s ~ N(-1.2, 1.2^2)."""
LEAST_SCALE = 1e-5  # of `error_scale` (Zhou et al. 2024, released code)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeScoreSettings(Settings):
    """Settings of the fake score and of the student's own levels. Configs of score distillation inherit them."""

    start_levels: Some[Positive] = (2.5,)
    """Noise levels of the student's evaluations, falling. The first one replaces 80: pure noise of that level is its input."""
    levels: LevelLaw = "karras"
    """Distribution of the levels s at which the student's images are compared."""
    span: tuple[Share, Share] = (0.0, 0.8)
    """Range of u in K(u), for levels "karras"."""
    fake_optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4, betas=(0.0, 0.999), clip=0.0)
    """Optimiser of the fake score."""
    fake_levels: LevelLaw = "lognormal"
    """Distribution of the levels at which the fake score learns."""
    fake_steps: Steps = 1
    """Steps K of the fake score per step of the student. A phase has K times as many iterations as the student has steps."""
    fake_start: Literal["teacher", "student"] = "teacher"
    """Weights that the fake score starts from: the teacher's, or the student's at the start of the phase."""

    def __post_init__(self) -> None:
        super().__post_init__()
        falling = all(a > b for a, b in itertools.pairwise(self.start_levels))
        self.require(falling, "start_levels", "falling noise levels, for example 2.5 or 80 2.5")
        self.require(self.span[0] < self.span[1], "span", "two rising numbers, for example 0 0.8")

    def sampling(self) -> FewStep:
        """Sampling at the student's own levels."""
        count = len(self.start_levels)
        rule = "line" if count == 1 else "fresh_noise"
        return FewStep(num_steps=count, levels=self.start_levels, rule=rule, trained_steps=tuple(range(count)))


S = TypeVar("S", bound=FakeScoreSettings)


def equally_costly(settings: S) -> S:
    """Replace the settings above that do not affect the cost of a step by defaults. For `representative`."""
    return dataclasses.replace(
        settings,
        start_levels=tuple(range(len(settings.start_levels), 0, -1)),
        levels="karras",
        span=(0.0, 0.8),
        fake_optimizer=OptimizerConfig(),
        fake_levels="lognormal",
        fake_start="student",
    )


class ScoreDistillation(Objective, abc.ABC):
    """Training step of methods with a fake score. Subclasses define the student's gradient, and may extend the critic."""

    def __init__(self, settings: FakeScoreSettings, context: Context) -> None:
        self.settings, self.teacher = settings, context.models["teacher"]
        self.critic = fake_score(context, start=settings.fake_start)
        self.critic_optimizer = settings.fake_optimizer

    @abc.abstractmethod
    def gradient(
        self, critic: Learner, images: torch.Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Gradient of the student's mean loss with respect to its `images`, both (B, C, H, W), and figures.

        `images` is a leaf that requires gradients. Its classes are `batch.labels`.
        """

    def draw(self, student: Learner, batch: Batch, generator: torch.Generator, *, gradients: bool) -> torch.Tensor:
        """Draw the student's images (B, C, H, W), with `gradients` to the student. Subclasses may add rows for `gradient`."""
        return generate(student, batch, self.settings.start_levels, generator, gradients=gradients)

    def teach(
        self, critic: Learner, images: torch.Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the critic on the student's `images` (B, C, H, W), without gradients to them, and figures."""
        x, sigma = noisy(images, self.settings.fake_levels, (0.0, 1.0), generator)
        loss = denoising_loss(critic(x, sigma, batch.labels), images, sigma)
        return loss, {"fake": loss}

    def turns(self, step: int) -> Turns:
        """The student learns in the last of K steps, the fake score in each."""
        settings = self.settings
        return Turns(student=(step + 1) % settings.fake_steps == 0, work=step % len(settings.start_levels))

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute gradients. Figures: "fake" (L_f), mean and standard deviation of the images, and those of `gradient`."""
        assert critic is not None
        learns = self.turns(batch.step).student
        images = self.draw(student, batch, generator, gradients=learns)
        fixed = images.detach()
        own = fixed[: batch.size]
        figures = {"image_mean": own.mean(), "image_std": own.std()}
        if learns:
            gradient, more = self.gradient(critic, fixed.clone().requires_grad_(), batch, generator)
            images.backward(batch.weight * gradient)
            figures |= more
        loss, more = self.teach(critic, own, batch, generator)
        (batch.weight * loss).backward()
        return {name: value.detach() for name, value in (figures | more).items()}


def fake_score(context: Context, *, start: Literal["teacher", "student"]) -> Denoiser:
    """Build the fake score: the student's network, trainable, with the weights of the teacher or of the student's average.

    Like the student, it has no input for augmentation labels. Raises BeelineError if the teacher has another network.
    """
    fake = copy.deepcopy(context.average).train().requires_grad_(True)
    if start == "teacher":
        weights = {
            name.replace("model.network.", "model."): value for name, value in context.models["teacher"].state_dict().items()
        }
        own = fake.state_dict()
        if misfit := next((name for name in own if name not in weights or weights[name].shape != own[name].shape), ""):
            raise BeelineError(
                f"the fake score cannot start as the teacher, whose network differs from the student's ({misfit}); "
                "set the objective's fake_start to student"
            )
        fake.load_state_dict({name: weights[name] for name in own})
    return fake


def generate(
    student: Learner, batch: Batch, levels: Sequence[float], generator: torch.Generator, *, gradients: bool
) -> torch.Tensor:
    """Draw the student's images (B, C, H, W) of classes `batch.labels` from the batch's noise, with `gradients` or without."""
    x, sigma = simulated_inputs(student, batch, levels, generator)
    with torch.set_grad_enabled(gradients):
        return student(x, sigma, batch.labels)


def simulated_inputs(
    student: Learner, batch: Batch, levels: Sequence[float], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (B, C, H, W) of the student and their `levels` (B,), each for an equal share of the rows.

    For later levels the student first runs through those before, without gradients, as the sampling rule "fresh_noise" does.
    A row's level depends on the row and the step only: random ones would make the host wait for the device.
    """
    noise, labels, count = batch.noise, batch.labels, len(levels)
    assert noise is not None
    last = sorted(((row * count // batch.size + batch.step) % count for row in range(batch.size)), reverse=True)
    x, sigma = levels[0] * noise, torch.full((batch.size,), levels[0], device=noise.device)
    for step, following in enumerate(levels[1:]):
        rows = sum(level > step for level in last)  # the first rows go on
        if rows:
            images = student.target(x[:rows], sigma[:rows], None if labels is None else labels[:rows])
            fresh = torch.randn(images.shape, generator=generator, device=images.device)
            x = torch.cat([images + max(following**2 - SIGMA_MIN**2, 0.0) ** 0.5 * fresh, x[rows:]])
            sigma = torch.cat([torch.full_like(sigma[:rows], following), sigma[rows:]])
    return x, sigma


def draw_levels(count: int, law: LevelLaw, span: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    """Draw noise levels, float32 (count,), on the generator's device. `span` is the range of u in K(u), where K(0) is 0.002 and
    K(1) is 80."""
    if law == "lognormal":
        return (P_MEAN + P_STD * torch.randn(count, generator=generator, device=generator.device)).exp()
    u = span[0] + (span[1] - span[0]) * torch.rand(count, generator=generator, device=generator.device)
    lo, hi = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return (lo + u * (hi - lo)) ** RHO


def noisy(
    images: torch.Tensor, law: LevelLaw, span: tuple[float, float], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add noise of random levels to `images` (B, C, H, W). Returns the noisy images and the levels (B,)."""
    sigma = draw_levels(len(images), law, span, generator)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return images + sigma.reshape(-1, 1, 1, 1) * noise, sigma


def denoising_loss(denoised: torch.Tensor, images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """L_f: mean squared error of `denoised` against `images`, both (B, C, H, W), with EDM's weight at levels `sigma` (B,)."""
    return ((1 / sigma**2 + 1 / Denoiser.sigma_data**2) * l2(denoised, images)).mean()


@torch.no_grad()
def error_scale(images: torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
    """The scale a of a row's gradient, (B, 1, 1, 1): mean |y - T(x)| of `images` y and `denoised` T(x), both (B, C, H, W)."""
    return (images - denoised).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(LEAST_SCALE)
