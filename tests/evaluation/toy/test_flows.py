"""2-D flows: losses against the papers' formulas, straightness against closed forms, and the order of Table 1."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

from beeline.errors import BeelineError
from evaluation.toy.flows import (
    CFM_SIGMA_MIN,
    DISTRIBUTIONS,
    Field,
    ToyConfig,
    coupling,
    integrate,
    measure,
    regression,
    sliced_w2,
    straightness,
    taught,
    times,
    train_all,
)

SMALL = ToyConfig(
    distributions=("two_moons",), repeats=1, ot_batches=(64,), iterations=800, pairs=1024, width=32, steps=20, points=500
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def field(members: int = 2) -> Field:
    return Field(members, 16, generator()).requires_grad_(False)


def lines(members: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw noise, data and times of 30 points for each member."""
    g = generator(1)
    return (
        torch.randn(members, 30, 2, generator=g),
        torch.randn(members, 30, 2, generator=g),
        torch.rand(members, 30, 1, generator=g),
    )


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_data_have_no_mean_and_unit_variance(name: str) -> None:
    x = DISTRIBUTIONS[name](200_000, generator()).double()
    assert x.mean(dim=0).tolist() == pytest.approx([0, 0], abs=0.01)
    assert float(x.var(dim=0).mean()) == pytest.approx(1, abs=0.01)


def test_lines_matching_is_the_distance_of_the_denoised_to_the_data() -> None:
    net, (x0, x1, t) = field(), lines()
    expected = (net.denoised((1 - t) * x0 + t * x1, t) - x1).square().sum(dim=-1).mean(dim=-1)
    torch.testing.assert_close(regression("LMM", net, x0, x1, t), expected)


def test_edm_is_its_weighted_denoising_loss() -> None:
    net, (x0, x1, t) = field(), lines()
    sigma = (1 - t) / t
    x = x1 + sigma * x0  # as EDM has it, without the scale of the line
    weight = (sigma**2 + 1) / (sigma * 1) ** 2
    expected = (weight * (net.denoised(t * x, t) - x1).square()).sum(dim=-1).mean(dim=-1)
    torch.testing.assert_close(regression("EDM", net, x0, x1, t), expected, rtol=1e-4, atol=1e-4)


def test_edm_draws_the_logarithm_of_sigma_from_its_normal() -> None:
    t = times("EDM", (100_000,), generator()).double()
    log_sigma = ((1 - t) / t / 2).log()  # halved: EDM's numbers are for data of standard deviation 0.5
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=0.02)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=0.02)


def test_conditional_flow_matching_keeps_a_little_noise_at_the_end() -> None:
    config = ToyConfig(distributions=("checkerboard",), repeats=1)
    x0, end = coupling("CFM", {}, config, generator())()
    again = generator()
    assert torch.equal(x0, config.noise(config.batch_size, again))
    torch.testing.assert_close(end - config.data(config.batch_size, again), CFM_SIGMA_MIN * x0, rtol=0, atol=1e-6)


def test_batches_of_the_optimal_coupling_are_nearer_and_lose_no_point() -> None:
    config = ToyConfig(distributions=("checkerboard",), repeats=2, pairs=512, batch_size=4096)
    g = generator()
    x0, x1 = config.noise(512, g), config.data(512, g)
    a, b = coupling("BOT-CFM 64", {}, config, generator())()
    assert {tuple(row) for row in b[1].tolist()} <= {tuple(row) for row in x1[1].tolist()}
    assert float((a - b).square().sum(dim=-1).mean()) < 0.5 * float((x0 - x1).square().sum(dim=-1).mean())


def test_a_field_is_regular_at_both_ends_and_its_members_are_apart() -> None:
    net, (z, _, _) = field(), lines()
    for t in (0.0, 1.0):
        assert torch.isfinite(net(z, torch.tensor(t))).all()
    assert torch.equal(net.denoised(z, torch.tensor(1.0)), z)
    moved = net(torch.stack([z[0] + 1, z[1]]), torch.tensor(0.5))
    still = net(z, torch.tensor(0.5))
    assert torch.equal(moved[1], still[1])
    assert not torch.equal(moved[0], still[0])


class Gaussian(Field):
    """The exact field of standard normal data with independent coupling."""

    def __init__(self) -> None:
        super().__init__(1, 1, generator())

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (2 * t - 1) / ((1 - t) ** 2 + t**2) * z


def test_the_teacher_is_solved_in_its_own_scale() -> None:
    x0 = lines(1)[0]
    # sigma from 160 to 0 in units of the data: the variance sigma^2 + 1 falls from 25,601 to 1, Heun's error is 1 %
    torch.testing.assert_close(taught(Gaussian(), x0), x0 * 160 / math.sqrt(160**2 + 1), rtol=0.015, atol=0)


def test_a_straight_flow_has_straightness_zero() -> None:
    x0 = lines()[0]
    path, slopes = integrate(lambda z, t: torch.ones_like(z) * torch.tensor([2.0, -1.0]), x0, 10)
    torch.testing.assert_close(path[-1], x0.double() + torch.tensor([2.0, -1.0], dtype=torch.float64))
    assert straightness(path, slopes).tolist() == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize("turn", [0.5, math.pi, 5.0])
def test_a_flow_in_circles_has_its_closed_form(turn: float) -> None:
    x0 = lines()[0]
    path, slopes = integrate(lambda z, t: turn * torch.stack([-z[..., 1], z[..., 0]], dim=-1), x0, 400)
    # |dZ/dt|^2 = turn^2 r^2 and |Z_1 - Z_0|^2 = (2 r sin(turn/2))^2; straightness is the mean of the one less the other
    expected = (turn**2 - 4 * math.sin(turn / 2) ** 2) * x0.double().square().sum(dim=-1).mean(dim=-1)
    torch.testing.assert_close(straightness(path, slopes), expected, rtol=1e-3, atol=0)


def test_a_flow_on_straight_ways_at_changing_speed_has_its_closed_form() -> None:
    x0 = lines(1)[0]
    path, slopes = integrate(Gaussian(), x0, 200)
    expected = (2 - math.pi / 2) * x0.double().square().sum(dim=-1).mean(dim=-1)  # each point goes inwards and comes back
    torch.testing.assert_close(straightness(path, slopes), expected, rtol=1e-3, atol=0)
    late = straightness(path, slopes, since=0.5)
    torch.testing.assert_close(late, expected / 2, rtol=1e-2, atol=0)


def test_sliced_distance_of_a_shift_and_of_the_same_points() -> None:
    x = lines()[0]
    assert sliced_w2(x, x.flip(dims=[1])).tolist() == [0, 0]
    shifted = sliced_w2(x, x + torch.tensor([3.0, 4.0]))
    assert shifted.tolist() == pytest.approx([5 / math.sqrt(2)] * 2, rel=1e-6)


@pytest.fixture(scope="module")
def trained() -> dict[str, Field]:
    return dict(train_all(SMALL, seed=0))


def test_the_order_of_table_1(trained: dict[str, Field]) -> None:
    g = generator(7)
    x0, real = SMALL.noise(SMALL.points, g), SMALL.data(SMALL.points, g)
    found = {name: {key: float(v[0]) for key, v in measure(net, x0, real, 20).items()} for name, net in trained.items()}
    straight = {name: figures["straightness"] for name, figures in found.items()}
    assert list(straight) == ["EDM", "CFM", "BOT-CFM 64", "1-RF", "2-RF", "LMM"]
    assert straight["EDM"] == pytest.approx(straight["CFM"], rel=0.1)
    assert straight["1-RF"] == pytest.approx(straight["CFM"], rel=0.1)
    assert straight["2-RF"] < 0.1 * straight["1-RF"]
    assert straight["LMM"] < 0.1 * straight["EDM"]
    assert found["LMM"]["w2_one_step"] < 0.4 * found["EDM"]["w2_one_step"]
    assert found["EDM"]["known"] < 0.2 < 0.6 < found["LMM"]["known"]
    assert all(0 < figures["w2"] < 0.3 for figures in found.values())


def test_training_is_a_function_of_the_seed() -> None:
    config = dataclasses.replace(SMALL, iterations=2, pairs=64)
    first, again, other = (dict(train_all(config, seed)) for seed in (0, 0, 1))
    for name, net in first.items():
        for key, value in net.state_dict().items():
            assert torch.equal(value, again[name].state_dict()[key]), (name, key)
        assert not torch.equal(net.weights[0], other[name].weights[0])


def test_students_start_from_their_teachers() -> None:
    config = dataclasses.replace(SMALL, iterations=1, pairs=64, lr=1e-9)
    nets = dict(train_all(config, seed=0))
    for student, teacher in (("LMM", "EDM"), ("2-RF", "1-RF")):
        torch.testing.assert_close(nets[student].weights[0], nets[teacher].weights[0])
    assert not torch.allclose(nets["EDM"].weights[0], nets["1-RF"].weights[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distributions": ("spiral",)}, "ToyConfig.distributions is ('spiral',); expected values, each 'eight_gaussians' or"),
        ({"distributions": ()}, "ToyConfig.distributions is (); expected values"),
        ({"iterations": 0}, "ToyConfig.iterations is 0; expected a whole number from 1"),
        ({"lr": 0.0}, "ToyConfig.lr is 0.0; expected a number above 0"),
        ({"ot_batches": (3,)}, "ToyConfig.ot_batches is (3,); expected sizes that divide pairs, 8192"),
    ],
)
def test_a_config_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BeelineError, match=re.escape(message)):
        ToyConfig(**changes)  # pyright: ignore[reportArgumentType]
