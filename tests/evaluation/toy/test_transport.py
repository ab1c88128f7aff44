"""Optimal pairing and the remaining slope of batches: closed forms, a bound that always holds, the prediction."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from beeline.errors import BeelineError
from evaluation.toy.transport import (
    OtConfig,
    batch_for,
    measure_ot,
    measured_slope,
    ot_pairing,
    predicted_batch,
    predicted_slope,
)

RNG = np.random.default_rng


def cost(x0: np.ndarray, x1: np.ndarray) -> float:
    return float(((x0 - x1) ** 2).sum())


def test_pairing_is_the_cheapest_permutation() -> None:
    x0, x1 = RNG(0).standard_normal((2, 6, 3))
    pairing = ot_pairing(x0, x1)
    assert sorted(pairing) == list(range(6))
    assert cost(x0, x1[pairing]) == pytest.approx(min(cost(x0, x1[list(p)]) for p in itertools.permutations(range(6))))
    assert cost(x0, x1[pairing]) < cost(x0, x1)


def test_pairing_in_one_dimension_is_sorting() -> None:
    x0, x1 = RNG(0).standard_normal((2, 50, 1))
    assert np.array_equal(x1[ot_pairing(x0, x1)][np.argsort(x0[:, 0])], np.sort(x1, axis=0))


@pytest.mark.parametrize("dim", [1, 2, 5, 20])
def test_slope_of_batches_of_two_is_the_closed_form(dim: int) -> None:
    slope, error = measured_slope(dim, 2, 4000, RNG(dim))
    # the better of two pairings: half of E|<x0 - x0', x1 - x1'>|, over 2 d
    expected = math.gamma((dim + 1) / 2) / (math.sqrt(math.pi) * math.gamma(dim / 2) * dim)
    assert slope == pytest.approx(expected, abs=4 * error)
    assert 0 < error < 0.02


@pytest.mark.parametrize(("dim", "batch"), [(1, 8), (4, 64), (16, 64), (64, 128)])
def test_slope_stays_below_the_bound_and_grows_with_the_batch(dim: int, batch: int) -> None:
    slope, error = measured_slope(dim, batch, 20, RNG(0))
    assert slope < math.sqrt(2 * math.log(batch) / dim)
    assert measured_slope(dim, batch // 4, 80, RNG(1))[0] < slope - 4 * error


@pytest.mark.parametrize(
    ("dim", "batch", "within"), [(1, 16, 0.03), (1, 128, 0.02), (16, 128, 0.03), (32, 128, 0.02), (64, 256, 0.01)]
)
def test_prediction(dim: int, batch: int, within: float) -> None:
    assert measured_slope(dim, batch, 4000 // batch, RNG(0))[0] == pytest.approx(predicted_slope(dim, batch), abs=within)


@pytest.mark.parametrize("slope", [0.2, 0.5, 0.9])
def test_predicted_batch_is_the_inverse_and_exponential_in_the_dimension(slope: float) -> None:
    assert predicted_slope(12, predicted_batch(12, slope)) == pytest.approx(slope)
    growth = math.log(predicted_batch(301, slope) / predicted_batch(300, slope))
    assert growth == pytest.approx(-0.5 * math.log(1 - slope**2), abs=0.003)
    assert predicted_batch(300, slope) > math.exp(300 * slope**2 / 2)


def test_batch_for_a_slope_is_interpolated_and_not_extrapolated() -> None:
    assert batch_for(0.5, (4, 16, 64), (0.2, 0.4, 0.6)) == pytest.approx(32)
    assert batch_for(0.7, (4, 16, 64), (0.2, 0.4, 0.6)) is None
    assert batch_for(0.1, (4, 16, 64), (0.2, 0.4, 0.6)) is None


def test_rows_are_a_function_of_the_seed_and_place() -> None:
    config = OtConfig(dims=(2, 3), batches=(4, 8), points=64)
    rows = measure_ot(config, 0)
    assert [(row["dim"], row["batch"]) for row in rows] == [(2, 4), (2, 8), (3, 4), (3, 8)]
    assert measure_ot(OtConfig(dims=(3,), batches=(8,), points=64), 0) == rows[3:]
    assert measure_ot(config, 1)[0]["slope"] != rows[0]["slope"]


@pytest.mark.parametrize("changes", [{"dims": (0,)}, {"dims": ()}, {"batches": (1, 2)}, {"batches": (8, 4)}, {"points": 0}])
def test_a_config_that_cannot_be(changes: dict[str, object]) -> None:
    with pytest.raises(BeelineError, match="expected"):
        OtConfig(**changes)  # pyright: ignore[reportArgumentType]
