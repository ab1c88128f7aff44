"""Flow maps: jumps and tangents agree with the definitions in the coordinates of flow matching, written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gaussian_map import GaussianMap, data, scale

from beeline.errors import SettingError
from beeline.objectives.maps.flow_map import LevelPairSettings, jump, regression, residual, to_level, to_tau

T = torch.tensor([0.003, 0.2, 1.0, 7.0, 80.0], dtype=torch.float64)
S = torch.tensor([0.0, 0.05, 1.0, 0.4, 2.0], dtype=torch.float64)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_jumps_of_the_known_map_follow_the_ode() -> None:
    t, s = (levels.reshape(-1, 1, 1, 1) for levels in (T, S))
    x = data(5) * scale(t)
    torch.testing.assert_close(jump(x, GaussianMap()(x, T, to=S), T, S), x * scale(s) / scale(t))


def test_coordinates() -> None:
    torch.testing.assert_close(to_level(to_tau(T)), T)
    assert float(to_level(torch.tensor(1.0))) == 80.0


def wavy(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """A smooth map of no meaning."""
    return torch.sin(2 * x + t.log()) * torch.cos(s) + 0.3 * x * torch.exp(-t) + torch.tanh(s * x)


@pytest.mark.parametrize("r", [0.0, 0.7, 1.0])
def test_the_tangent_is_that_of_flow_matching(r: float) -> None:
    """h = (U - v) + r (tau - tau_s) dU/dtau, with dU/dtau by central differences along xbar + tau v."""
    torch.manual_seed(0)
    t, s = (levels.reshape(-1, 1, 1, 1) for levels in (T, S))
    x, ref = torch.randn(5, 2, 3, 3).double() * (1 + t), torch.randn(5, 2, 3, 3).double()
    tau, bar, step = t / (1 + t), x / (1 + t), 1e-6
    velocity = (bar - ref) / tau

    def average(by: float) -> torch.Tensor:
        moved = tau * (1 + by)  # tau + by tau: levels near 0 need small steps
        place, level = bar + by * tau * velocity, moved / (1 - moved)
        return (place - wavy(place * (1 + level), level, s)) / moved

    slope = (average(step * 1e-1) - average(-step * 1e-1)) / (2 * step * 1e-1 * tau)
    h = (average(0) - velocity) + r * (tau - s / (1 + s)) * slope

    def along(u: float) -> torch.Tensor:
        return wavy(x + u * (x - ref), t * torch.tensor(u).double().exp(), s)

    rate = (along(1e-6) - along(-1e-6)) / 2e-6
    torch.testing.assert_close(-residual(along(0), rate, ref, T, S, r) / tau, h, rtol=1e-5, atol=1e-5)


def test_at_equal_levels_the_tangent_is_flow_matching() -> None:
    g, rate, ref = torch.randn(3, 5, 1, 2, 2).double()
    torch.testing.assert_close(residual(g, rate, ref, T, T), g - ref)
    torch.testing.assert_close(residual(g, rate, ref, T, S, 0.0), g - ref)


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_the_regression_moves_velocities_against_the_tangent(power: float) -> None:
    tangent, g = torch.randn(5, 2, 3, 3).double(), torch.randn(5, 2, 3, 3).double().requires_grad_()
    tau = (T / (1 + T)).reshape(-1, 1, 1, 1)
    average = -g / tau
    error = (average - (average.detach() - tangent)).square().sum(dim=(1, 2, 3))
    loss = error / (error.detach() + 1e-3) ** power
    (wanted,) = torch.autograd.grad(loss.sum(), g)
    ours = regression(g, tangent, T, power)
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), g)[0], wanted)


LAWS: list[dict[str, Any]] = [{"law": "lognormal"}, {"law": "gap", "t_normal": (-0.8, 1.0)}, {"law": "schedule"}]


@pytest.mark.parametrize("law", LAWS)
def test_shares_of_levels(law: dict[str, Any]) -> None:
    t, s = LevelPairSettings(top=0.1, zero=0.2, same=0.3, **law).draw(20_000, seeded())
    assert bool(((t >= 0.002) & (t <= 80) & (s >= 0) & (s <= t)).all())
    assert bool(((s == 0) | (s >= 0.002)).all())
    for kind, share in ((s == t, 0.3), (s == 0, 0.2), (t == 80, 0.1)):
        assert share - 0.01 < float(kind.float().mean()) < share + 0.13  # laws reach the ends, too
    t, s = LevelPairSettings(**law).draw(20_000, seeded())
    assert float((s == t).float().mean()) < 0.02


def test_laws_of_levels() -> None:
    t, s = LevelPairSettings(t_normal=(1.0, 0.5), s_normal=(-3.0, 0.5)).draw(20_000, seeded())
    for levels, mean in ((t, 1.0), (s, -3.0)):
        assert float(levels.log().mean()) == pytest.approx(mean, abs=0.02)
        assert float(levels.log().std()) == pytest.approx(0.5, abs=0.02)
    t, s = LevelPairSettings(law="gap", t_normal=(-0.8, 1.0)).draw(20_000, seeded())
    gap = to_tau(t) - to_tau(s)
    assert float(gap.logit().median()) == pytest.approx(-0.8, abs=0.03)
    assert float((to_tau(s) / (1 - gap)).mean()) == pytest.approx(0.5, abs=0.01)
    t, s = LevelPairSettings(law="schedule").draw(20_000, seeded())
    time = (torch.cat([t, s]) ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    assert torch.allclose(time.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([0.25, 0.5, 0.75]), atol=0.02)
    with pytest.raises(SettingError, match=r"zero is 0.5; expected at most 0.25, since 0.75"):
        LevelPairSettings(same=0.75, zero=0.5)
