"""Rectified flow (Liu et al. 2023): the student learns the velocity of straight lines between noise and images.

Between image x1 and unit-variance noise z, x_t = (1 - t) x1 + t z has the velocity z - x1, which the network predicts for t in
(0, 1) (their eq. 1). Divided by 1 - t, x_t is x1 + sigma z with sigma = t / (1 - t). That is a denoiser's input, whose output N
implies the velocity v = (x_t - N) / t. So

    E |v(x_t, t) - (z - x1)|^2 = E |N(x1 + sigma z, sigma) - x1|^2 / t^2

and Euler's method on the velocity is the sampling rule "line". t ends where sigma is sigma_max. The minimiser's ODE carries the
noise to the images. What z and x1 are paired makes the members of the family:

    data "pairs"     a model's own pairs: reflow, which straightens that model's ODE (2-rectified flow)
    data "images"    real images with independent noise (1-rectified flow, flow matching; Lipman et al. 2023)
    coupling "ot"    real images with the noise of their batch, in the pairing of the least total |z - x1|^2 (OT-CFM; Tong et
                     al. 2024, section 3.2; Pooladian et al. 2023)

2-RF++ (Lee et al. 2024) draws t more often near both ends, times "u_shaped", and replaces the square by the pseudo-Huber
distance h, or by a distance d in features: (1 - t) h(v, z - x1) + d(N, x1) / t (their section 4).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch._subclasses.fake_tensor import is_fake

from beeline.augmentation import mirrored
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig, lines
from beeline.objectives.distances import DISTANCES, DistanceSettings, Kind
from beeline.objectives.learner import Learner
from beeline.objectives.perceptual import l2
from beeline.sampling.few_step import FewStep
from beeline.schedule import SIGMA_MAX, SIGMA_MIN
from beeline.settings import MAX_SIDE, Amount, Range, Steps, added

FIRST, LAST = (sigma / (1 + sigma) for sigma in (SIGMA_MIN, SIGMA_MAX))  # the range of t
STEEPNESS = 4.0  # of the U-shaped law (Lee et al. 2024, section 4.1)
HUBER = 0.00054  # c per pixel and channel (Lee et al. 2024, section 4.2)
NAMES = {"independent": "independent noise", "ot": "noise by minibatch optimal transport"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RectifiedFlowConfig(DistanceSettings, ObjectiveConfig):
    """Rectified flow."""

    num_steps: Steps = 18
    """Levels of the schedule to which the indices of few-step schedules refer."""
    data: Literal["pairs", "images"] = added("pairs")
    """Noise-image pairs (`StudentConfig.pairs` says whose), or real images with random noise."""
    coupling: Literal["independent", "ot"] = added("independent")
    """Noise of real images. "ot" pairs each rank's micro-batch by optimal transport, for a conditional student within classes.
    The assignment runs on the CPU of each rank, in milliseconds for some hundred images."""
    flip: bool = added(False)
    """Mirror real images at random, for data without a preferred side."""
    times: Literal["uniform", "u_shaped"] = added("uniform")
    """Distribution of t. "u_shaped": density proportional to e^(4 t) + e^(4 (1 - t))."""
    distance: Kind = added("l2")
    """"l2" and "huber" compare velocities. The others compare images, divided by t, and add 1 - t times "huber"."""
    resize: Annotated[int, Range(0, MAX_SIDE)] = added(0)
    pixel_weight: Amount = added(0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.data == "images" or self.coupling == "independent"
        self.require(fits, "coupling", "'independent', because pairs are coupled already")
        self.require(not self.flip or self.data == "images", "flip", "False, because the noise of a pair fits its image alone")

    def needs(self) -> Needs:
        """Pairs or real images; the feature network of the distance."""
        return Needs(pairs=self.data == "pairs", images=self.data == "images", features=self.distance_features)

    def sampling(self) -> FewStep:
        """Sampling by Euler's method, at any levels."""
        return FewStep(num_steps=self.num_steps, rule="line", line="ve", trained_steps=None)

    def about(self) -> str:
        """Describe the objective, like "rectified flow on real images, noise by minibatch optimal transport"."""
        parts = [f"rectified flow on {'the same pairs' if self.data == 'pairs' else 'real images'}"]
        parts += [NAMES[self.coupling]] * (self.data == "images") + ["U-shaped times"] * (self.times == "u_shaped")
        return ", ".join([*parts, *([DISTANCES[self.distance]] if self.distance != "l2" else [])])

    def build(self, context: Context) -> RectifiedFlow:
        """Build the objective."""
        return RectifiedFlow(self, context)

    def representative(self) -> RectifiedFlowConfig:
        """Replace settings that do not affect the cost by defaults."""
        return dataclasses.replace(self, num_steps=18, coupling="independent", flip=False, times="uniform", pixel_weight=0.0)


class RectifiedFlow(Objective):
    """Training step of velocity matching on straight lines."""

    def __init__(self, config: RectifiedFlowConfig, context: Context) -> None:
        self.config = config
        self._distance = config.build_distance(context)

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute gradients. Figure: "velocity"."""
        noise, x1, labels = self._ends(batch, generator)
        t = draw_times(batch.size, self.config.times, generator)
        sigma = t / (1 - t)
        images = student(lines.point(x1, noise, sigma, "ve"), sigma, labels)
        loss = self._losses(images, x1, t).mean()
        (batch.weight * loss).backward()
        return {"velocity": loss.detach()}

    def _ends(self, batch: Batch, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Both ends of the lines, unit-variance noise and images (B, C, H, W), and the images' labels."""
        if self.config.data == "pairs":
            assert batch.noise is not None
            assert batch.x1 is not None
            return batch.noise, batch.x1, batch.labels
        assert batch.real is not None
        images = mirrored(batch.real, generator) if self.config.flip else batch.real
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        if self.config.coupling == "ot":
            noise = noise[transport(noise, images, batch.real_labels)]
        return noise, images, batch.real_labels

    def _losses(self, images: torch.Tensor, x1: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The loss of each row, (B,), of predictions `images` and images `x1` (B, C, H, W) at `t` (B,)."""
        if self.config.distance == "l2":
            return l2(images, x1) / t.square()
        huber = velocity_huber((images - x1) / t.reshape(-1, 1, 1, 1))
        return huber if self.config.distance == "huber" else (1 - t) * huber + self._distance(images, x1) / t


def draw_times(count: int, law: Literal["uniform", "u_shaped"], generator: torch.Generator) -> torch.Tensor:
    """Draw t, float32 (count,), between FIRST and LAST, on the generator's device."""
    u = torch.rand(count, generator=generator, device=generator.device)
    if law == "u_shaped":
        rising = (2 * u - 1).abs()  # uniform, and independent of the half that u lies in
        end = torch.log1p(rising * math.expm1(STEEPNESS)) / STEEPNESS  # the inverse of the distribution function of e^(4 t)
        u = torch.where(u < 0.5, end, 1 - end)
    return FIRST + (LAST - FIRST) * u


def velocity_huber(difference: torch.Tensor) -> torch.Tensor:
    """Compute (sqrt(|v|^2 + c^2) - c) / d per row, (B,), of velocity differences v (B, C, H, W); d = C H W, c = 0.00054 d."""
    size = difference[0].numel()
    c = HUBER * size
    return ((difference.square().sum(dim=(1, 2, 3)) + c * c).sqrt() - c) / size


@torch.no_grad()
def transport(noise: torch.Tensor, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Indices (B,) of the noise for each image: the permutation with the least sum of |noise - image|^2, both (B, C, H, W).

    With `labels`, one-hot (B, K), noise moves only between images of a class: otherwise it would come to depend on the class,
    and noise of all kinds is what a class is sampled from. Squares do not depend on the permutation, so only products count.
    Waits for the device, and solves the assignment on the CPU.
    """
    gain = images.flatten(1) @ noise.flatten(1).T
    if is_fake(gain):  # counting FLOPs, without values
        return torch.arange(len(gain), device=gain.device)
    costs = -gain.double().cpu().numpy()
    if labels is not None:
        classes = labels.argmax(dim=1).cpu().numpy()
        costs[classes[:, None] != classes[None, :]] = math.inf  # the identity stays possible
    _, chosen = linear_sum_assignment(costs)
    return torch.as_tensor(chosen, device=noise.device)
