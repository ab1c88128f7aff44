"""Rectified flow: its minimiser on Gaussian data, the pairing by optimal transport, the laws of t, and steps of training."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import small
import torch
from torch import nn

from beeline import counting
from beeline.checkpoint import build
from beeline.config import OptimizerConfig, ProbeNetworkConfig, to_dict
from beeline.errors import SettingError
from beeline.features import Frozen
from beeline.features.probe import Probe
from beeline.objectives import Batch, Context
from beeline.objectives.learner import Learner
from beeline.objectives.rectified_flow import FIRST, LAST, RectifiedFlowConfig, draw_times, transport, velocity_huber
from beeline.schedule import SIGMA_MAX

SD = 0.5
PROBE = ProbeNetworkConfig(widths=(8, 12), strides=(1, 2))
CONFIGS = [
    RectifiedFlowConfig(),
    RectifiedFlowConfig(data="images"),
    RectifiedFlowConfig(data="images", coupling="ot"),
    RectifiedFlowConfig(times="u_shaped", distance="huber"),
    RectifiedFlowConfig(data="images", coupling="ot", times="u_shaped", distance="probe"),
]


class Perturbed(nn.Module):
    """A closed form `exact(x, sigma)` plus a learnable share of t^2 x_t."""

    def __init__(self, exact: Any) -> None:
        super().__init__()
        self.exact, self.share = exact, nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        t = sigma / (1 + sigma)
        return self.exact(x, sigma) + self.share * t**2 * (1 - t) * x


def context(network: nn.Module, **features: Probe) -> Context:
    frozen = {name: Frozen(probe) for name, probe in features.items()}
    average: Any = network
    return Context(image_shape=(1, 8, 8), num_classes=0, models={}, features=frozen, average=average)


def gradient(config: RectifiedFlowConfig, exact: Any, batch: Batch) -> tuple[float, float]:
    """The loss, and its derivative in the direction of the perturbation."""
    network = Perturbed(exact)
    objective = config.build(context(network))
    figures = objective.backward(network, None, batch, torch.Generator().manual_seed(1))  # pyright: ignore[reportArgumentType]
    assert network.share.grad is not None
    return float(figures["velocity"]), float(network.share.grad)


@pytest.mark.parametrize("times", ["uniform", "u_shaped"])
def test_the_minimiser_on_real_images_is_the_denoiser(times: Any) -> None:
    """The minimiser for data N(0, SD^2) with independent noise is E[x1 | x] = x SD^2 / (SD^2 + sigma^2)."""
    real = SD * torch.randn(400_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    config = RectifiedFlowConfig(data="images", times=times)
    batch = Batch(size=len(real), step=0, total=1, real=real)

    def denoised(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x * SD**2 / (SD**2 + sigma**2)

    _, slope = gradient(config, denoised, batch)
    _, other = gradient(config, lambda x, sigma: 0.9 * denoised(x, sigma), batch)
    assert abs(slope) < 0.005
    assert abs(other) > 0.015


@pytest.mark.parametrize("distance", ["l2", "huber"])
def test_the_minimiser_on_pairs_of_an_ode_is_straight(distance: Any) -> None:
    """The teacher's ODE maps sigma_max z to k z. On these pairs the exact map has loss 0, and one step makes the same image."""
    k = SIGMA_MAX * SD / math.hypot(SD, SIGMA_MAX)
    noise = torch.randn(1000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    config = RectifiedFlowConfig(distance=distance)
    batch = Batch(size=1000, step=0, total=1, noise=noise, x1=k * noise)
    loss, slope = gradient(config, lambda x, sigma: x * k / (k + sigma), batch)
    assert loss < 1e-6
    assert abs(slope) < 1e-3
    worse, _ = gradient(config, lambda x, sigma: x * SD**2 / (SD**2 + sigma**2), batch)  # the teacher itself is not straight
    assert worse > 0.05


def test_velocity_huber() -> None:
    """Quadratic below c = 0.00054 d, linear above."""
    small_difference, large = torch.full((1, 3, 32, 32), 1e-4), torch.full((1, 3, 32, 32), 10.0)
    d = 3 * 32 * 32
    assert velocity_huber(small_difference).item() == pytest.approx(1e-8 / (2 * 0.00054 * d), rel=0.02)
    assert velocity_huber(large).item() == pytest.approx(10 / math.sqrt(d) - 0.00054, rel=1e-2)


def test_feature_distances_are_added_as_published() -> None:
    """(1 - t) Huber of the velocities + distance of the images / t (Lee et al. 2024)."""
    torch.manual_seed(0)
    probe = Probe(PROBE, channels=1, num_classes=4).eval().requires_grad_(False)
    objective = RectifiedFlowConfig(distance="probe").build(context(nn.Identity(), probe=probe))
    images, x1 = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    t = torch.tensor([0.25, 0.75])
    only_huber, both = (objective._losses(images, x1, each) for each in (torch.tensor([0.999999] * 2), t))
    features = only_huber  # at t = 1 the pixels count nothing
    expected = (1 - t) * velocity_huber((images - x1) / t.reshape(-1, 1, 1, 1)) + features / t
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-5)


def test_transport_recovers_a_permutation() -> None:
    images = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    noise = (images + 0.1)[order]
    torch.testing.assert_close(noise[transport(noise, images, None)], images + 0.1)


@pytest.mark.parametrize("classes", [0, 2])
def test_transport_is_the_best_pairing(classes: int) -> None:
    """Compared with all permutations, for labels with those within the classes."""
    noise, images = (torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    kinds = torch.tensor([0, 1, 1, 0, 1, 0])
    labels = nn.functional.one_hot(kinds, classes).float() if classes else None
    chosen = transport(noise, images, labels)
    assert chosen.sort().values.tolist() == list(range(6))
    costs = {}
    for order in itertools.permutations(range(6)):
        if labels is None or torch.equal(kinds[list(order)], kinds):
            costs[order] = float((noise[list(order)] - images).square().sum())
    assert len(costs) == (36 if classes else 720)
    assert costs[tuple(chosen.tolist())] == pytest.approx(min(costs.values()))
    assert not torch.equal(chosen, torch.arange(6))


@pytest.mark.parametrize(("law", "a"), [("uniform", 0.0), ("u_shaped", 4.0)])
def test_the_laws_of_t(law: Any, a: float) -> None:
    """Histogram against the density e^(a t) + e^(a (1 - t)) over the range."""
    count, bins = 200_000, 20
    t = draw_times(count, law, torch.Generator().manual_seed(0))
    assert t.min() >= FIRST
    assert t.max() <= LAST
    share = torch.histc((t - FIRST) / (LAST - FIRST), bins, 0, 1) / count
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    total = edges if a == 0 else (torch.expm1(a * edges) / math.expm1(a) + 1 - torch.expm1(a * (1 - edges)) / math.expm1(a)) / 2
    expected = total.diff()
    assert ((share - expected).abs() < 5 * (expected / count).sqrt()).all()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.about())
@pytest.mark.parametrize(("precision", "classes"), [("fp32", 4), ("bf16", 0)])
def test_training_through_the_denoiser(config: RectifiedFlowConfig, precision: Any, classes: int) -> None:
    torch.manual_seed(0)
    model = build(replace(small.NETWORK, label_dim=classes))
    probe = Probe(PROBE, channels=1, num_classes=4).eval().requires_grad_(False)
    objective = config.build(context(model, probe=probe))
    learner = Learner(model.train(), OptimizerConfig(lr=3e-3, warmup=0), precision=precision)
    labels = nn.functional.one_hot(torch.arange(16) % 4, 4).float() if classes else None
    rows: dict[str, Any] = {"noise": torch.randn(16, 1, 8, 8), "x1": 0.5 * torch.randn(16, 1, 8, 8), "labels": labels}
    rows |= {"real": rows["x1"], "real_labels": labels}
    losses = []
    for step in range(12):
        batch = Batch(size=16, step=step, total=12, **rows)
        losses.append(float(objective.backward(learner, None, batch, torch.Generator().manual_seed(0))["velocity"]))
        assert learner.update(step, 12)["skipped"] == 0
    assert losses[-1] < 0.9 * losses[0]


def test_the_cost_is_counted() -> None:
    flops = [counting.phase_flops(small.NETWORK, PROBE, config) for config in CONFIGS]
    assert flops[0] == flops[1] == flops[2] == flops[3]
    assert flops[4] > flops[0] > 2 * counting.evaluation(small.NETWORK)


def test_settings() -> None:
    with pytest.raises(SettingError, match="'independent', because pairs are coupled already"):
        RectifiedFlowConfig(coupling="ot")
    needs = RectifiedFlowConfig(data="images", distance="probe").needs()
    assert (needs.pairs, needs.images, needs.noise, needs.features) == (False, True, False, ("probe",))
    about = RectifiedFlowConfig(data="images", coupling="ot", times="u_shaped", distance="huber").about()
    assert about == (
        "rectified flow on real images, noise by minibatch optimal transport, U-shaped times, pixel distance (Huber)"
    )


def test_settings_of_earlier_versions_keep_their_identity() -> None:
    assert set(to_dict(RectifiedFlowConfig(), resources=False)) == {"method", "num_steps"}
    assert to_dict(RectifiedFlowConfig(times="u_shaped"), resources=False)["times"] == "u_shaped"
