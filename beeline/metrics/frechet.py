"""Fréchet distance between feature distributions, from float64 statistics that merge exactly.

    d^2 = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))          (Heusel et al. 2017, eq. 6)

Statistics are (n, mean, centred second moment), merged by Chan's formula. Shards are always merged in the order of their
index, so a distance does not depend on the number of actors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import scipy.linalg

from beeline.files.arrays import pack, unpack


class Gaussian(Protocol):
    """Distribution as a Fréchet distance needs it: `mean` (D,) and `covariance` (D, D), float64."""

    @property
    def mean(self) -> np.ndarray: ...

    @property
    def covariance(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D), float64, of samples that are not available themselves."""

    mean: np.ndarray
    covariance: np.ndarray

    @staticmethod
    def from_npz(data: bytes) -> Moments:
        """Read reference statistics as EDM publishes them: an .npz file with `mu` (D,) and `sigma` (D, D). Raises ValueError
        for anything else."""
        arrays = unpack(data, "an .npz file with mu and sigma")
        if not {"mu", "sigma"} <= arrays.keys():
            raise ValueError(f"an .npz file with {', '.join(arrays)}; expected mu and sigma")
        mean, covariance = (np.asarray(arrays[key], np.float64) for key in ("mu", "sigma"))
        if covariance.shape != 2 * mean.shape or mean.ndim != 1 or not np.allclose(covariance, covariance.T, equal_nan=True):
            raise ValueError(f"mu has shape {mean.shape}, sigma {covariance.shape}; expected (D,) and a symmetric (D, D)")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("mu or sigma holds NaN or infinity; expected finite numbers")
        return Moments(mean, covariance)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of n feature vectors: `mean` (D,) and centred second moment `m2` (D, D), float64.

    m2 = sum (f - mean)(f - mean)^T.
    """

    n: int
    mean: np.ndarray
    m2: np.ndarray

    @staticmethod
    def of(features: np.ndarray) -> Statistics:
        """Compute the statistics of `features` (n, D), n >= 1."""
        features = np.asarray(features, dtype=np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        return Statistics(len(features), mean, centred.T @ centred)

    def __add__(self, other: Statistics) -> Statistics:
        """Merge two samples' statistics (Chan, Golub & LeVeque 1983)."""
        n = self.n + other.n
        delta = other.mean - self.mean
        return Statistics(
            n,
            self.mean + delta * (other.n / n),
            self.m2 + other.m2 + np.outer(delta, delta) * (self.n * other.n / n),
        )

    @property
    def covariance(self) -> np.ndarray:
        """Covariance (D, D), normalised by n - 1."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, found {self.n}")
        return self.m2 / (self.n - 1)

    def to_npz(self) -> bytes:
        """Encode the statistics as the bytes of an .npz file; the same statistics give the same bytes."""
        return pack({"n": np.int64(self.n), "mean": self.mean, "m2": self.m2})

    @staticmethod
    def from_npz(data: bytes) -> Statistics:
        """Invert `to_npz`. Raises ValueError for anything damaged."""
        arrays = unpack(data, "statistics")
        if not {"n", "mean", "m2"} <= arrays.keys():
            raise ValueError(f"an .npz file with {', '.join(arrays)}; expected n, mean and m2")
        n, mean, m2 = (arrays[key] for key in ("n", "mean", "m2"))
        if n.shape != () or mean.ndim != 1 or m2.shape != 2 * mean.shape:
            raise ValueError(f"n, mean and m2 have shapes {n.shape}, {mean.shape} and {m2.shape}; expected (), (D,) and (D, D)")
        return Statistics(int(n), mean, m2)


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Merge the parts in their order."""
    return functools.reduce(lambda a, b: a + b, parts)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Compute the Fréchet distance (squared, as FID reports it) between two feature distributions."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features have {a.mean.size} and {b.mean.size} dimensions; they must come from the same network")
    s1, s2 = a.covariance, b.covariance
    factor = root(s1)  # the eigenvalues of S1 S2 are those of the symmetric L^T S2 L: much cheaper than sqrtm
    eigenvalues = scipy.linalg.eigvalsh(factor.T @ s2 @ factor)
    covmean_trace = np.sqrt(eigenvalues.clip(0)).sum()
    delta = a.mean - b.mean
    return float(delta @ delta + np.trace(s1) + np.trace(s2) - 2 * covmean_trace)


def root(covariance: np.ndarray) -> np.ndarray:
    """Compute L (D, D) with L L^T = `covariance` (D, D)."""
    try:
        return scipy.linalg.cholesky(covariance, lower=True)
    except np.linalg.LinAlgError:  # singular: fewer samples than dimensions, or a dead feature
        values, vectors = scipy.linalg.eigh(covariance)
        return vectors * np.sqrt(values.clip(0))
