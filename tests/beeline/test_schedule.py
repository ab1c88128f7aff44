"""Noise levels of the EDM schedule, and the rules for step schedules."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beeline.schedule import SIGMA_MAX, SIGMA_MIN, check_steps, edm_sigmas

PUBLISHED = {
    18: "80.0 57.586 40.786 28.375 19.352 12.910 8.401 5.315 3.257 1.923 1.088 .5853 .2964 .1395 .0599 .0229 .0075 .002",
    40: "80.0 69.451 60.117 51.880 44.630 38.267",
}


@pytest.mark.parametrize("num_steps", PUBLISHED)
def test_levels_are_the_published_ones(num_steps: int) -> None:
    wanted = [float(text) for text in PUBLISHED[num_steps].split()]
    levels = edm_sigmas(num_steps)
    assert levels.shape == (num_steps,)
    assert levels.dtype == torch.float64
    # .0075 and its neighbours are printed to two digits
    assert levels[: len(wanted)].tolist() == pytest.approx(wanted, rel=1e-3, abs=5e-5)


@settings(deadline=None, max_examples=20)
@given(num_steps=st.integers(2, 200))
def test_levels_fall_from_sigma_max_to_sigma_min(num_steps: int) -> None:
    levels = edm_sigmas(num_steps)
    assert (levels.diff() < 0).all()
    assert levels[[0, -1]].tolist() == pytest.approx([SIGMA_MAX, SIGMA_MIN], rel=1e-12)


def test_one_level_is_sigma_max() -> None:
    assert edm_sigmas(1).tolist() == pytest.approx([SIGMA_MAX])


def test_other_bounds_and_rho() -> None:
    assert edm_sigmas(3, sigma_min=1.0, sigma_max=3.0, rho=1.0).tolist() == pytest.approx([3, 2, 1])


@pytest.mark.parametrize("arguments", [(0,), (-1,), (5, 0.0, 80.0), (5, 2.0, 1.0), (5, 1.0, 1.0)])
def test_impossible_schedules_are_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"sigma_min|num_steps"):
        edm_sigmas(*arguments)


@pytest.mark.parametrize("steps", [(0,), [0, 1], (0, 3, 5), torch.tensor([0, 17])])
def test_good_steps_become_a_tuple(steps: Sequence[int]) -> None:
    checked = check_steps(steps, 18)
    assert checked == tuple(int(i) for i in steps)
    assert all(type(i) is int for i in checked)


@pytest.mark.parametrize(
    ("steps", "message"),
    [((), "begin with 0"), ((1,), "begin with 0"), ((-1, 0), "begin with 0"), ((0, 18), "18 levels"), ((0, 0), "rise"),
     ((0, 5, 3), "rise"), ((0, -1), "rise")],
)  # fmt: skip
def test_bad_steps_are_refused(steps: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_steps(steps, 18)
