"""FD-loss: the Fréchet distance as the loss of a one-step student (arXiv 2604.28190). It fine-tunes a student that another
objective has trained.

    L = mean over networks of d^2 / tr S
    d^2 = |mu - mu_r|^2 + tr C + tr S - 2 tr (L^T C L)^(1/2),   S = L L^T

mu, C are mean and covariance of generated images' features, mu_r, S those of all real images. The trace of the root is the sum
of the square roots of the eigenvalues, which equal those of S^(1/2) C S^(1/2). Division by tr S makes networks comparable.

Features: the last tap of a frozen network, averaged over space. For the probe this is the vector that metrics use. A figure in
a network that the loss has used is not a measurement of the student: judge in other networks, best of another kind.

Real statistics: each rank reads its share of the real images once, before the first step. All merge their statistics in the
order of ranks. They are exact from the first step on. They are part of the checkpoint, so a resumed run does not compute them
again. The counted cost of a step leaves these forward passes out.

Generated statistics: of this micro-batch on all ranks, alone or together with earlier ones ("queue": the last n features;
"average": weights that decay by a factor with each micro-batch). Only this micro-batch carries gradients. Earlier features come
from earlier weights: with a large queue or a slow decay, use a small learning rate.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from beeline.errors import BeelineError
from beeline.features import FeatureNetwork, pooled, resized
from beeline.features.backbones import TIMM
from beeline.metrics.frechet import Statistics, merge, root
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig
from beeline.objectives.distances import SMALLEST_VGG16
from beeline.objectives.learner import Learner
from beeline.objectives.ranks import gather, world_size
from beeline.sampling.few_step import FewStep
from beeline.schedule import SIGMA_MAX
from beeline.settings import MANY, MAX_SIDE, Range, ShareBelow1, Some, Steps

PROBE = "probe"
FLOOR = 1e-9  # added to the eigenvalues of L^T C L, for features of variance 1
SMALLEST_TIMM = 32  # pixels: sides are multiples of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrechetLossConfig(ObjectiveConfig):
    """FD-loss. Without `queue` and `decay` the statistics are those of the micro-batch: it should have several times as many
    images as there are features."""

    networks: Some[Literal["probe", "vgg16", "vgg16_avg", "tf_efficientnet_lite0", "deit_base_distilled_patch16_224"]] = (
        "probe",
    )
    """Feature networks: the losses' probe, pretrained backbones."""
    resize: Annotated[int, Range(0, MAX_SIDE)] = 0
    """Side in pixels of the images for pretrained backbones; 0 keeps the images' own size."""
    queue: Annotated[int, Range(0, MANY)] = 0
    """Number of the latest features, of all ranks, that the statistics cover."""
    decay: ShareBelow1 = 0.0
    """Factor by which the weight of earlier features falls with each micro-batch."""
    num_steps: Steps = 18
    """Levels of the schedule; the student is sampled at the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(len(set(self.networks)) == len(self.networks), "networks", "different networks")
        self.require(not (self.queue and self.decay), "decay", "0 with a queue: choose one of the two")

    def needs(self) -> Needs:
        """Fresh noise, all real images, and the feature networks."""
        return Needs(noise=True, all_images=True, features=self.networks)

    def sampling(self) -> FewStep:
        """Sampling in one step from pure noise."""
        return FewStep(num_steps=self.num_steps, trained_steps=(0,))

    def about(self) -> str:
        """Describe the objective, like "Fréchet distance (probe), queue of 2048"."""
        memory = [f"queue of {self.queue}"] * bool(self.queue) + [f"average of decay {self.decay:g}"] * bool(self.decay)
        return ", ".join([f"Fréchet distance ({', '.join(self.networks)})", *memory])

    def build(self, context: Context) -> FrechetLoss:
        """Build the objective."""
        return FrechetLoss(self, context)

    def check(self, resolution: int) -> None:
        """Raise BeelineError if a feature network cannot take images of this size."""
        side = self.resize or resolution
        for name in self.networks:
            if name in TIMM and side % SMALLEST_TIMM:
                raise BeelineError(f"{name} takes sides that are multiples of {SMALLEST_TIMM}, found {side}; set resize")
            if name not in (PROBE, *TIMM) and side < SMALLEST_VGG16:
                raise BeelineError(f"{name} needs sides of {SMALLEST_VGG16} or more, found {side}; set resize")


class Sums(NamedTuple):
    """Weighted sums over features x (centred at mu_r) with weights w, float64."""

    weight: torch.Tensor
    """sum w, ()"""
    squares: torch.Tensor
    """sum w^2, ()"""
    first: torch.Tensor
    """sum w x, (D,)"""
    length: torch.Tensor
    """sum w |x|^2, ()"""
    second: torch.Tensor
    """sum w (L^T x) (L^T x)^T, (D, D)"""


def sums_of(centred: torch.Tensor, factor: torch.Tensor) -> Sums:
    """Compute the sums over features minus mu_r, `centred` (B, D), of weight 1. `factor` is L (D, D). Both float64."""
    projected = centred @ factor
    count = centred.new_full((), len(centred))
    return Sums(count, count, centred.sum(dim=0), centred.square().sum(), projected.T @ projected)


def distance(sums: Sums, factor: torch.Tensor) -> torch.Tensor:
    """Compute d^2, (), from the sums of generated features. `factor` is L (D, D).

    Covariances are unbiased: normalised by n - 1 for n equal weights, and by n - sum w^2 / n, n = sum w, in general.
    """
    mean = sums.first / sums.weight
    unbiased = 1 / (1 - sums.squares / sums.weight**2).clamp_min(0.5)  # 0.5 is that of 2 images
    variance = unbiased * (sums.length / sums.weight - mean.square().sum())
    projected = mean @ factor
    product = unbiased * (sums.second / sums.weight - projected.outer(projected))
    finite = product.isfinite().all()  # eigvalsh raises for NaN; |mu - mu_r|^2 keeps it
    product = torch.where(finite, product, torch.eye(len(product), dtype=product.dtype, device=product.device))
    real = factor.square().sum()
    floor = FLOOR * (real / len(factor)).square()
    cross = (torch.linalg.eigvalsh(product).clamp_min(0) + floor).sqrt().sum()
    return mean.square().sum() + variance + real - 2 * cross


class Memory(nn.Module):
    """Memory of the loss in one feature network of `dimensions` D: real statistics, and earlier generated features."""

    mean: torch.Tensor
    """mu_r, float64 (D,)"""
    factor: torch.Tensor
    """L, float64 (D, D)"""
    recent: torch.Tensor
    """Ring of the latest features minus mu_r, float32 (queue, D)."""
    position: torch.Tensor
    """Next slot of the ring, int64 ()."""

    def __init__(self, dimensions: int, *, queue: int, decay: float) -> None:
        super().__init__()
        self.queue, self.decay = queue, decay
        self.known = False  # whether the real statistics are
        square, scalar = torch.zeros(dimensions, dimensions, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        self.register_buffer("mean", torch.zeros(dimensions, dtype=torch.float64))
        self.register_buffer("factor", square)
        if queue or decay:
            for name, value in zip(Sums._fields, (scalar, scalar, self.mean, scalar, square), strict=True):
                self.register_buffer(name, value.clone())
        if queue:
            self.register_buffer("recent", torch.zeros(queue, dimensions))
            self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_know)

    def learn(self, real: Statistics) -> None:
        """Set the real statistics. Raises BeelineError if all real images have the same features."""
        trace = float(np.trace(real.m2))
        if not (real.n > 1 and 0 < trace < np.inf):
            raise BeelineError(
                f"the features of {real.n} real images have a covariance of trace {trace / max(real.n - 1, 1):g}; a Fréchet "
                "distance needs images that differ. Check images/ and the feature network"
            )
        self.mean.copy_(torch.from_numpy(real.mean))
        self.factor.copy_(torch.from_numpy(root(real.covariance)))
        self.known = True

    def add(self, features: torch.Tensor) -> Sums:
        """Take this micro-batch's features (B, D) of all ranks into the memory. Returns the sums over all that it covers, with
        gradients to `features`. Features that are not finite are not remembered."""
        centred = (features.double() - self.mean).float()  # as the queue keeps them
        sums = sums_of(centred.double(), self.factor)
        if not (self.queue or self.decay):
            return sums
        earlier = Sums(*(getattr(self, name) for name in Sums._fields))
        if self.queue:
            sums = self._replace(earlier, sums, centred.detach())
        else:
            old = Sums(*(self.decay * value for value in earlier))._replace(squares=self.decay**2 * earlier.squares)
            sums = Sums(*(a + b for a, b in zip(old, sums, strict=True)))
        finite = centred.detach().isfinite().all()
        for value, new in zip(earlier, sums, strict=True):
            value.copy_(torch.where(finite, new.detach(), value))
        return sums

    def _replace(self, earlier: Sums, sums: Sums, centred: torch.Tensor) -> Sums:
        """Put `centred` (B, D), of sums `sums`, into the ring in place of the oldest. Returns the sums over the ring."""
        count = len(centred)
        if count > self.queue:
            raise BeelineError(f"a queue of {self.queue} features cannot take {count} images at once; set a longer queue")
        slots = (self.position + torch.arange(count, device=centred.device)) % self.queue
        leaving = sums_of(self.recent[slots].double(), self.factor)  # 0 for slots that are still empty
        total = (earlier.weight + count).clamp_max(self.queue)
        finite = centred.isfinite().all()
        self.recent.index_copy_(0, slots, torch.where(finite, centred, self.recent[slots]))
        self.position.copy_(torch.where(finite, (self.position + count) % self.queue, self.position))
        first, length, second = (
            getattr(earlier, name) - getattr(leaving, name) + getattr(sums, name) for name in ("first", "length", "second")
        )
        return Sums(total, total, first, length, second)


def _know(memory: nn.Module, incompatible_keys: Any) -> None:
    """A loaded memory has its real statistics."""
    assert isinstance(memory, Memory)
    memory.known = True


class FrechetLoss(Objective):
    """Training step of FD-loss."""

    def __init__(self, config: FrechetLossConfig, context: Context) -> None:
        self.config, self._images = config, context.images
        self._networks = {name: context.features[name] for name in config.networks}
        self.memories = nn.ModuleDict(
            {
                name: Memory(network.tap_channels[-1], queue=config.queue, decay=config.decay)
                for name, network in self._networks.items()
            }
        )

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of the loss. Figures: "frechet_<network>", d^2 of each network.

        All ranks compute the same loss, of the features of all ranks (see `gather`). On a GPU it synchronises once per network,
        in `eigvalsh`.
        """
        assert batch.noise is not None
        self._read()
        sigma = torch.full((batch.size,), SIGMA_MAX, device=batch.noise.device)
        images = student(SIGMA_MAX * batch.noise, sigma, batch.labels)
        figures, total = {}, torch.zeros((), dtype=torch.float64, device=images.device)
        for name, network in self._networks.items():
            memory = self._memory(name)
            features = torch.cat(gather(self._features(name, network, images)))
            d2 = distance(memory.add(features), memory.factor)
            total = total + d2 / memory.factor.square().sum() / len(self._networks)
            figures[f"frechet_{name}"] = d2.detach().float()
        (batch.weight * world_size() * total).backward()
        return figures

    def state(self) -> nn.Module:
        """The memories."""
        return self.memories

    def _memory(self, name: str) -> Memory:
        memory = self.memories[name]
        assert isinstance(memory, Memory)
        return memory

    def _features(self, name: str, network: FeatureNetwork, images: torch.Tensor) -> torch.Tensor:
        return pooled(network, images if name == PROBE else resized(images, self.config.resize))

    @torch.no_grad()
    def _read(self) -> None:
        """Compute the real statistics, unless they are known."""
        missing = {name: network for name, network in self._networks.items() if not self._memory(name).known}
        parts: dict[str, list[Statistics]] = {name: [] for name in missing}
        for images in self._images() if missing else ():
            for name, network in missing.items():
                parts[name].append(Statistics.of(self._features(name, network, images).cpu().numpy()))
        for name, own in parts.items():
            if own or world_size() > 1:
                self._memory(name).learn(_merged(own, self._memory(name).mean))


def _merged(own: list[Statistics], like: torch.Tensor) -> Statistics:
    """Merge the statistics of all ranks, in the order of ranks; `like` (D,) is on the device."""
    size = len(like)
    part = merge(own) if own else Statistics(0, np.zeros(size), np.zeros((size, size)))
    flat = torch.from_numpy(np.concatenate([[part.n], part.mean, part.m2.ravel()])).to(like.device)
    ranks = [rank.cpu().numpy() for rank in gather(flat)]
    split = [Statistics(int(rank[0]), rank[1 : size + 1], rank[size + 1 :].reshape(size, size)) for rank in ranks]
    return merge([statistics for statistics in split if statistics.n])
