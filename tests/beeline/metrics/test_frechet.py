"""Fréchet distances against SciPy's matrix square root; statistics merge exactly and survive files."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from beeline.files.arrays import pack
from beeline.metrics.frechet import Moments, Statistics, frechet_distance, merge, root


def features(seed: int, n: int, d: int) -> np.ndarray:
    """Correlated features with a mean far from zero."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 3 * rng.standard_normal(d)


def reference(x: np.ndarray, y: np.ndarray) -> float:
    """Compute Heusel et al.'s formula directly."""
    product_root = np.real(scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * product_root))


def symmetric_reference(x: np.ndarray, y: np.ndarray) -> float:
    """Compute the same from eigenvalues of S1^(1/2) S2 S1^(1/2), which also works for singular covariances."""
    values, vectors = np.linalg.eigh(np.cov(x.T))
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ np.cov(y.T) @ root).clip(0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T)) - 2 * trace)


@pytest.mark.parametrize("d", [2, 5, 16])
def test_distance_is_that_of_the_formula(d: int) -> None:
    x, y = features(0, 200, d), features(1, 300, d)
    assert frechet_distance(Statistics.of(x), Statistics.of(y)) == pytest.approx(reference(x, y), rel=1e-8)


def test_distance_of_shifted_and_scaled_gaussians() -> None:
    x = features(0, 500, 4)
    a = Statistics.of(x)
    assert frechet_distance(a, Statistics.of(x + 2)) == pytest.approx(4 * 2**2)
    scaled = Statistics.of((x - x.mean(0)) * 3 + x.mean(0))
    assert frechet_distance(a, scaled) == pytest.approx((3 - 1) ** 2 * np.trace(np.cov(x.T)))


def test_distance_is_symmetric_and_zero_for_the_same() -> None:
    a, b = Statistics.of(features(0, 100, 6)), Statistics.of(features(1, 100, 6))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, b) > 1


@pytest.mark.parametrize(("n", "other"), [(6, 200), (200, 6), (6, 8)])
def test_singular_covariances(n: int, other: int) -> None:
    x, y = features(0, n, 12), features(1, other, 12)
    assert frechet_distance(Statistics.of(x), Statistics.of(y)) == pytest.approx(symmetric_reference(x, y), rel=1e-6)


def test_dead_feature() -> None:
    x, y = features(0, 100, 4), features(1, 100, 4)
    x[:, 2] = 0
    distance = frechet_distance(Statistics.of(x), Statistics.of(y))
    assert distance == pytest.approx(symmetric_reference(x, y), rel=1e-6)


def test_statistics_are_those_of_numpy() -> None:
    x = features(0, 50, 5).astype(np.float32)
    stats = Statistics.of(x)
    assert stats.n == 50
    assert stats.mean.dtype == stats.m2.dtype == np.float64
    np.testing.assert_allclose(stats.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance, np.cov(x.astype(np.float64).T), rtol=1e-10)


@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(1, 99), max_size=6, unique=True), offset=st.floats(-1e3, 1e3))
def test_merging_parts_equals_the_whole(cuts: list[int], offset: float) -> None:
    x = features(0, 100, 4) + offset
    whole, merged = Statistics.of(x), merge(Statistics.of(part) for part in np.split(x, sorted(cuts)))
    assert merged.n == 100
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-9)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-9, atol=1e-9 * np.abs(whole.m2).max())


def test_covariance_needs_two_samples() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, found 1"):
        _ = Statistics.of(np.ones((1, 3))).covariance


def test_npz_round_trip_is_bitwise() -> None:
    stats = Statistics.of(features(0, 37, 7))
    again = Statistics.from_npz(stats.to_npz())
    assert again.n == stats.n
    assert again.mean.tobytes() == stats.mean.tobytes()
    assert again.m2.tobytes() == stats.m2.tobytes()


def test_the_same_statistics_give_the_same_bytes() -> None:
    first, again = (Statistics.of(features(0, 37, 7)).to_npz() for _ in range(2))
    assert first == again
    with zipfile.ZipFile(io.BytesIO(first)) as file:  # today's date would change the bytes tomorrow
        assert {info.date_time for info in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_features_of_two_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet_distance(Statistics.of(features(0, 9, 3)), Statistics.of(features(0, 9, 4)))


@pytest.mark.parametrize("keep", [0, 10, 100, 400])
def test_damaged_statistics_are_a_value_error(keep: int) -> None:
    data = Statistics.of(features(0, 37, 7)).to_npz()
    with pytest.raises(ValueError, match="not statistics"):
        Statistics.from_npz(data[:keep])


def test_far_fewer_samples_than_features_by_singular_values() -> None:
    """tr (S1 S2)^(1/2) is the nuclear norm of the product of the centred samples; it is exact for singular S1 and S2."""
    x, y = features(0, 10, 60), features(1, 14, 60)
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    trace = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * trace
    assert frechet_distance(Statistics.of(x), Statistics.of(y)) == pytest.approx(expected, rel=1e-7)


def test_edms_reference_files() -> None:
    x, y = features(0, 200, 5), features(1, 300, 5)
    data = pack({"mu": y.mean(axis=0), "sigma": np.cov(y, rowvar=False)})
    given = Moments.from_npz(data)
    assert frechet_distance(Statistics.of(x), given) == pytest.approx(frechet_distance(Statistics.of(x), Statistics.of(y)))
    with pytest.raises(ValueError, match="mu has shape"):
        Moments.from_npz(pack({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}))
    with pytest.raises(ValueError, match="expected mu and sigma"):
        Moments.from_npz(pack({"mean": np.zeros(3)}))
    for mean, covariance in ((np.nan, 1.0), (0.0, np.nan), (np.inf, 1.0), (0.0, np.inf)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            Moments.from_npz(pack({"mu": np.full(3, mean), "sigma": np.diag(np.full(3, covariance))}))
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        Moments.from_npz(data[:50])


def test_a_root_of_a_singular_covariance() -> None:
    for covariance in (np.diag([1.0, 4.0]), np.diag([1.0, 0.0, 2.0]), np.ones((3, 3))):
        factor = root(covariance)
        np.testing.assert_allclose(factor @ factor.T, covariance, atol=1e-12)
