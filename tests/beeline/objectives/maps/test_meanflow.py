"""MeanFlow: the data's map minimises it, equal levels make it flow matching, and it trains a real network."""

from __future__ import annotations

import pytest
import torch
from flow_map_checks import PROBE, check_training, gradient, rows
from gaussian_map import GaussianMap, data
from small import NETWORK

from beeline import counting
from beeline.objectives import Needs
from beeline.objectives.maps.meanflow import MeanFlowConfig

WIDE = MeanFlowConfig(t_normal=(0.0, 1.5), s_normal=(-1.0, 1.5), top=0.1, zero=0.2, power=0.0, derivative="jvp")


def test_the_known_map_is_the_minimiser() -> None:
    """The mean gradient vanishes at the map of Gaussian data, up to the noise of the draws, but not beside it."""
    many = rows(data(400_000))
    exact = gradient(WIDE, GaussianMap(), many)
    for deviation in ((0.05, 0.0, 0.0), (0.0, 0.05, 0.0), (0.0, 0.0, 0.05)):
        off = gradient(WIDE, GaussianMap(deviation), many)
        assert float(exact.norm()) < 0.1 * float(off.norm())
        assert float(off @ torch.tensor(deviation).double()) > 0  # descent leads back


def test_equal_levels_are_flow_matching() -> None:
    """E |(z - x1) - U|^2 with U = (xbar - g) / tau, whose error is (g - x1) / tau."""
    config, model, few = MeanFlowConfig(same=1.0, power=0.0), GaussianMap((0.1, 0.2, 0.3)), rows(data(50))
    found = gradient(config, model, few)
    generator = torch.Generator().manual_seed(3)
    t, s = config.draw(50, generator)
    assert torch.equal(t, s)
    assert few.real is not None
    level = t.reshape(-1, 1, 1, 1)
    x = few.real + level * torch.randn(few.real.shape, generator=generator)
    loss = ((model(x, t, to=t) - few.real) * (1 + level) / level).square().sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(found, torch.autograd.grad(loss, model.deviation)[0])


def test_derivatives_agree() -> None:
    model, few = GaussianMap((0.1, 0.2, 0.3)), rows(data(200))
    forward = gradient(WIDE, model, few)
    differences = gradient(MeanFlowConfig(**{**vars(WIDE), "derivative": "difference"}), model, few)
    torch.testing.assert_close(differences, forward, rtol=1e-2, atol=1e-2 * float(forward.abs().max()))
    assert not torch.equal(differences, forward)


def test_it_trains_a_network() -> None:
    check_training(MeanFlowConfig(flip=True))


def test_the_cost_of_a_step() -> None:
    """Three evaluations with gradients, two for the difference; forward mode costs three."""
    one = counting.evaluation(NETWORK)
    costs = [
        counting.phase_flops(NETWORK, PROBE, config) / one for config in (MeanFlowConfig(), MeanFlowConfig(derivative="jvp"))
    ]
    assert costs == pytest.approx([5, 6], rel=0.02)


def test_what_it_says() -> None:
    config = MeanFlowConfig(num_steps=6)
    assert config.needs() == Needs(images=True, second_level=True)
    sampling = config.sampling()
    assert (sampling.num_steps, sampling.rule, sampling.line, sampling.trained_steps) == (6, "line", "ve", None)
    assert config.about() == "flow map from images (MeanFlow)"
    assert config.representative() == MeanFlowConfig(power=1.0, same=0.5).representative()
    assert config.representative() != MeanFlowConfig(derivative="jvp").representative()


def test_micro_batches_add_up() -> None:
    few = rows(data(20))
    whole = gradient(WIDE, GaussianMap((0.1, 0.0, 0.0)), few)
    half = gradient(WIDE, GaussianMap((0.1, 0.0, 0.0)), rows(data(20), weight=0.5))
    torch.testing.assert_close(half, 0.5 * whole)
