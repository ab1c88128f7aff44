"""Flows between 2-D distributions: the methods of the LMM paper's Table 1 in common coordinates, and their straightness.

All methods use lines between noise x0 ~ N(0, I) and data x1 of unit variance, the form `lerp` of beeline.objectives.lines:

    z_t = (1 - t) x0 + t x1,   t from 0 (noise) to 1 (data),   sigma = (1 - t) / t

EDM's x1 + sigma x0 is z_t / t: the same line, scaled. In these coordinates a denoiser D and a velocity v are
equivalent: D = z + (1 - t) v, and on a line D - x1 = (1 - t) (v - (x1 - x0)). So each method regresses v(z_t, t) on x1 - x0.
The methods differ in the coupling of x0 to x1, the law of t and the weight:

    method     coupling                             law of t             weight
    EDM        independent                          ln sigma normal      (1 - t)^2 + t^2   (Karras et al. 2022, table 1)
    CFM        independent, to x1 + sigma_min x0    uniform              1                 (Lipman et al. 2023, eq. 23)
    BOT-CFM    optimal within batches               uniform              1                 (Pooladian, Tong et al. 2023)
    1-RF       independent                          uniform              1                 (Liu et al. 2022)
    2-RF       x0 with its image under 1-RF         uniform              1                 (Liu et al. 2022, reflow)
    LMM        x0 with its image under EDM's ODE    uniform, eq. 4       (1 - t)^2         (eq. 3 with d = L2: |D - x1|^2)

CFM and 1-RF differ only in sigma_min, and an exact EDM has the same field. LMM in L2 is reflow of an EDM with less weight near
the data. Straightness follows Liu et al. 2022, sec. 3: the integral over t of E|(Z_1 - Z_0) - dZ_t/dt|^2. It is 0 for a flow
that moves straight at constant speed. It depends on the choice of t and z; every method uses those above.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Literal

import torch
from torch import nn
from torch.nn import functional as F

from beeline.noise import stream_seed
from beeline.sampling.solvers import solve
from beeline.settings import Channels, Count, Positive, Range, Settings, Size, Some, Steps
from evaluation.toy.transport import MAX_OT_BATCH, ot_pairing

EDM_UNIT = 2.0  # EDM's constants assume data of standard deviation 0.5; here it is 1, so all noise levels double
P_MEAN, P_STD = -1.2 + math.log(EDM_UNIT), 1.2
CFM_SIGMA_MIN = 0.002
HEUN_STEPS = 40  # steps of EDM's Heun solver: 79 evaluations
TEACHERS = {"2-RF": "1-RF", "LMM": "EDM"}
Draw = Callable[[], tuple[torch.Tensor, torch.Tensor]]
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def eight_gaussians(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw points (count, 2) from a ring of eight Gaussians of standard deviation 0.1."""
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    ring = torch.stack([angle.cos(), angle.sin()], dim=1) * math.sqrt(2 * (1 - 0.1**2))
    return ring + 0.1 * torch.randn(count, 2, generator=generator)


def two_moons(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw points (count, 2) from two interleaved half circles, with noise of 0.07 of their radius."""
    angle = torch.rand(count, generator=generator) * math.pi
    lower = torch.rand(count, generator=generator) < 0.5
    x = torch.where(lower, 1 - angle.cos(), angle.cos()) - 0.5
    y = torch.where(lower, 0.5 - angle.sin(), angle.sin()) - 0.25
    noisy = torch.stack([x, y], dim=1) + 0.07 * torch.randn(count, 2, generator=generator)
    return noisy / math.sqrt((0.75 + 0.5625 - 1 / math.pi) / 2 + 0.07**2)  # the mean variance of x and y becomes 1


def checkerboard(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw points (count, 2) uniformly on the dark squares of a 4x4 board."""
    column = torch.randint(4, (count,), generator=generator)
    row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
    corner = torch.stack([column, row], dim=1)
    return (corner + torch.rand(count, 2, generator=generator) - 2) * (math.sqrt(3) / 2)


DISTRIBUTIONS = {"eight_gaussians": eight_gaussians, "two_moons": two_moons, "checkerboard": checkerboard}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(Settings):
    """Settings of training and measurement.

    Every repeat of every distribution has its own network: each method has K = len(distributions) * repeats networks. BOT-CFM
    is trained once for each batch size in `ot_batches`. BOT-CFM, 2-RF and LMM learn from `pairs` pairs; the others draw new
    data in every iteration. `steps` is the number of Heun steps to solve a flow in t. `points` is the number of held-out noises
    per network.
    """

    distributions: Some[Literal["eight_gaussians", "two_moons", "checkerboard"]] = (
        "eight_gaussians",
        "two_moons",
        "checkerboard",
    )
    repeats: Annotated[int, Range(1, 1000)] = 3
    ot_batches: tuple[Annotated[Size, Range(2, MAX_OT_BATCH)], ...] = (4, 256)
    iterations: Count = 4000
    batch_size: Size = 256
    pairs: Size = 8192
    width: Channels = 64
    lr: Positive = 2e-3
    steps: Steps = 50
    points: Size = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = all(self.pairs % batch == 0 for batch in self.ot_batches)
        self.require(whole, "ot_batches", f"sizes that divide pairs, {self.pairs}")

    @property
    def members(self) -> int:
        """K, the number of networks of each method."""
        return len(self.distributions) * self.repeats

    def noise(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `count` source points for each network, (K, count, 2)."""
        return torch.randn(self.members, count, 2, generator=generator)

    def data(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `count` data points for each network, (K, count, 2)."""
        drawn = [DISTRIBUTIONS[name](self.repeats * count, generator) for name in self.distributions]
        return torch.cat(drawn).reshape(self.members, count, 2)


class Field(nn.Module):
    """K networks at once: velocities (K, B, 2) of points z (K, B, 2) at times t in [0, 1] that broadcast to (K, B, 1).

    Uses EDM's preconditioning in the coordinates z, where it is regular at both ends. With s^2 = (1 - t)^2 + t^2 the denoiser
    D = (t / s^2) z + ((1 - t) / s) F(z / s; t) has the velocity ((2t - 1) / s^2) z + F / s. The network gets time as an angle,
    because ln sigma is infinite at both ends.
    """

    def __init__(self, members: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise([6, width, width, width, 2]):
            weight = (torch.rand(members, fan_in, fan_out, generator=generator) * 2 - 1) * math.sqrt(3 / fan_in)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(members, 1, fan_out)))

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.expand(*z.shape[:-1], 1)
        s = ((1 - t) ** 2 + t**2).sqrt()
        angle = 2 * torch.atan2(1 - t, t)
        h = torch.cat([z / s, angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()], dim=-1)
        for n, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, F.silu(h) if n else h, weight)
        return (2 * t - 1) / s**2 * z + h / s

    def denoised(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Predict the data D (K, B, 2) from points `z` (K, B, 2) on lines at times `t`."""
        return z + (1 - t) * self(z, t)


class Teacher(nn.Module):
    """An EDM field as a denoiser for `solve`: x (K, B, 2) in EDM's scale, sigma (K,)."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field = field

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: None = None) -> torch.Tensor:
        t = 1 / (1 + EDM_UNIT * sigma.reshape(-1, 1, 1))
        return self.field.denoised(t * EDM_UNIT * x, t) / EDM_UNIT


def times(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw times in [0, 1] from the method's law."""
    if name == "EDM":
        return 1 / (1 + (P_MEAN + P_STD * torch.randn(shape, generator=generator)).exp())
    return torch.rand(shape, generator=generator)


def weight(name: str, t: torch.Tensor) -> torch.Tensor:
    """Weights of the method's loss at times `t`, in the same shape."""
    return {"EDM": (1 - t) ** 2 + t**2, "LMM": (1 - t) ** 2}.get(name, torch.ones_like(t))


def regression(name: str, velocity: Velocity, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Loss of the method (K,), weight |v(z_t, t) - (x1 - x0)|^2, for x0 and x1 (K, B, 2) and times (K, B, 1)."""
    off = velocity((1 - t) * x0 + t * x1, t) - (x1 - x0)
    return (weight(name, t) * off.square()).sum(dim=-1).mean(dim=-1)


def coupling(name: str, trained: Mapping[str, Field], config: ToyConfig, generator: torch.Generator) -> Draw:
    """Return the function that draws a batch of (x0, x1), (K, B, 2) each, in the method's pairing. `trained` holds teachers."""
    if name in ("EDM", "CFM", "1-RF"):
        sigma_min = CFM_SIGMA_MIN if name == "CFM" else 0.0

        def independent() -> tuple[torch.Tensor, torch.Tensor]:
            x0 = config.noise(config.batch_size, generator)
            return x0, config.data(config.batch_size, generator) + sigma_min * x0

        return independent
    x0 = config.noise(config.pairs, generator)
    if name == "LMM":
        x1 = taught(trained["EDM"], x0)
    elif name == "2-RF":
        x1 = integrate(trained["1-RF"], x0, config.steps)[0][-1].to(torch.float32)
    else:
        batch = int(name.removeprefix("BOT-CFM "))
        parts0, x1 = x0.reshape(-1, batch, 2), config.data(config.pairs, generator).reshape(-1, batch, 2)
        x1 = torch.stack([b[ot_pairing(a.numpy(), b.numpy())] for a, b in zip(parts0, x1, strict=True)]).reshape(x0.shape)

    def from_pairs() -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(config.pairs, (config.batch_size,), generator=generator)
        return x0[:, rows], x1[:, rows]

    return from_pairs


def train_all(config: ToyConfig, seed: int) -> Iterator[tuple[str, Field]]:
    """Train each method; yield its name and networks. A student (2-RF, LMM) starts from its teacher's weights."""
    trained: dict[str, Field] = {}
    for name in ("EDM", "CFM", *(f"BOT-CFM {batch}" for batch in config.ot_batches), "1-RF", "2-RF", "LMM"):
        generator = torch.Generator().manual_seed(stream_seed(seed, "toy", name))
        field = Field(config.members, config.width, generator)
        if name in TEACHERS:
            field.load_state_dict(trained[TEACHERS[name]].state_dict())
        draw = coupling(name, trained, config, generator)
        optimiser = torch.optim.Adam(field.parameters(), lr=config.lr)
        for n in range(config.iterations):
            optimiser.param_groups[0]["lr"] = config.lr * (1 - n / config.iterations)
            optimiser.zero_grad()
            x0, x1 = draw()
            regression(name, field, x0, x1, times(name, (*x0.shape[:-1], 1), generator)).sum().backward()
            optimiser.step()
        trained[name] = field.eval().requires_grad_(False)
        yield name, field


@torch.inference_mode()
def taught(field: Field, x0: torch.Tensor) -> torch.Tensor:
    """Map the noise `x0` (K, B, 2) through an EDM field, with EDM's Heun solver on its noise levels from 80 to 0."""
    return EDM_UNIT * solve(Teacher(field), x0, None, solver="heun", num_steps=HEUN_STEPS)


@torch.inference_mode()
def integrate(velocity: Velocity, x0: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve the flow from `x0` (K, N, 2) with Heun. Returns Z_t and dZ_t/dt, float64 (steps + 1, K, N, 2) each.

    The `steps` + 1 times are equally spaced. The state is float64 and the network runs in float32, as in EDM.
    """
    at = torch.linspace(0, 1, steps + 1)

    def slope(z: torch.Tensor, n: int) -> torch.Tensor:
        return velocity(z.to(torch.float32), at[n].reshape(1, 1, 1)).to(torch.float64)

    path = [x0.to(torch.float64)]
    slopes = [slope(path[0], 0)]
    for n in range(1, steps + 1):
        ahead = path[-1] + slopes[-1] / steps
        path.append(path[-1] + (slopes[-1] + slope(ahead, n)) / (2 * steps))
        slopes.append(slope(path[-1], n))
    return torch.stack(path), torch.stack(slopes)


def straightness(path: torch.Tensor, slopes: torch.Tensor, since: float = 0.0) -> torch.Tensor:
    """Integral (K,) over t in [since, 1] of E|(Z_1 - Z_0) - dZ_t/dt|^2, from the results of `integrate`."""
    off = (path[-1] - path[0] - slopes).square().sum(dim=-1).mean(dim=-1)
    return torch.trapezoid(off[round(since * (len(path) - 1)) :], dx=1 / (len(path) - 1), dim=0)


def sliced_w2(a: torch.Tensor, b: torch.Tensor, directions: int = 64) -> torch.Tensor:
    """Sliced Wasserstein-2 distance (K,) between two sets of equally many points (K, N, 2), over equally spaced directions."""
    angle = torch.arange(directions, dtype=torch.float64) * (math.pi / directions)
    onto = torch.stack([angle.cos(), angle.sin()])
    off = (a.to(torch.float64) @ onto).sort(dim=1).values - (b.to(torch.float64) @ onto).sort(dim=1).values
    return off.square().mean(dim=(1, 2)).sqrt()


@torch.inference_mode()
def measure(field: Field, x0: torch.Tensor, real: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """Measure a flow on held-out noise `x0` and data `real`, (K, N, 2) each. Every value is (K,).

    `late` is the share of `straightness` that arises in the last tenth of the time. `w2` and `w2_one_step` are sliced distances
    to the data: of the flow's end points, and of the end points of a single step. `known` is the share of the end points'
    variance that the velocity at the source has. It is 0 if all noise moves to one point, and about 1 if each has its own.
    """
    path, slopes = integrate(field, x0, steps)
    one = path[0] + slopes[0]
    return {
        "straightness": straightness(path, slopes),
        "late": straightness(path, slopes, since=0.9) / straightness(path, slopes),
        "w2": sliced_w2(path[-1], real),
        "w2_one_step": sliced_w2(one, real),
        "known": one.var(dim=1).sum(dim=-1) / path[-1].var(dim=1).sum(dim=-1),
    }
