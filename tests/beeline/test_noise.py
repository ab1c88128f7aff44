"""Noise as a function of (seed, index): the same for any batch, and the same numbers as in earlier versions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beeline.noise import crc32, stream, stream_seed, unit_noise

SHAPE = (2, 3, 3)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**63 - 1), indices=st.lists(st.integers(0, 10**9), min_size=1, max_size=6), data=st.data())
def test_a_row_depends_on_its_seed_and_index_alone(seed: int, indices: list[int], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(indices))
    alone = {i: unit_noise(seed, [i], SHAPE)[0] for i in indices}
    for rows in (indices, shuffled):
        assert (unit_noise(seed, rows, SHAPE) == np.stack([alone[i] for i in rows])).all()


def test_rows_differ_by_seed_and_index() -> None:
    rows = np.concatenate([unit_noise(seed, range(20), SHAPE) for seed in range(20)])
    assert len(np.unique(rows[:, 0, 0, 0])) == len(rows)


def test_unit_normal_float32() -> None:
    noise = unit_noise(3, range(50), (3, 16, 16))
    assert noise.dtype == np.float32
    assert noise.shape == (50, 3, 16, 16)
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert (np.abs(noise) > 2).mean() == pytest.approx(0.0455, abs=0.005)


def test_no_indices() -> None:
    assert unit_noise(0, [], SHAPE).shape == (0, *SHAPE)


@pytest.mark.parametrize(("seed", "first", "golden"), [(0, 0, 3525458831), (12345, 10**6, 1274749449)])
def test_golden_bits(seed: int, first: int, golden: int) -> None:
    """If a NumPy release drew other normal numbers, every stored pair would lose its noise; this test detects it."""
    assert crc32(unit_noise(seed, range(first, first + 4), (3, 8, 8))) == golden


def test_crc_sees_values_not_memory_order() -> None:
    noise = unit_noise(0, range(4), SHAPE)
    assert crc32(noise) == crc32(np.asfortranarray(noise))
    assert crc32(noise) != crc32(noise[::-1])


PLACES = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (7, 3, 2), (7, 2, 3), (0, 1, 1, 1), (0, 0, 0, 0, 1)]


def test_streams_differ_by_place_and_repeat_at_it() -> None:
    draws = [stream(*place).standard_normal(4) for place in PLACES]
    assert len({d[0] for d in draws}) == len(PLACES)
    assert all((stream(*place).standard_normal(4) == d).all() for place, d in zip(PLACES, draws, strict=True))


def test_stream_seeds_differ_by_place_and_fit_torch() -> None:
    seeds = [stream_seed(*place) for place in PLACES]
    assert len(set(seeds)) == len(PLACES)
    assert seeds == [stream_seed(*place) for place in PLACES]
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("place", "other"), [((5,), (5, 0)), ((5, 2), (5, 2, 0)), ((0,), (0, 0, 0))])
def test_streams_differ_by_the_length_of_their_place(place: tuple[int, ...], other: tuple[int, ...]) -> None:
    assert stream_seed(*place) != stream_seed(*other)
