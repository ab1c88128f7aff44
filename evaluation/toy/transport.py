"""Minibatch optimal-transport pairing, and why it fails in many dimensions (appendix A.2 of the LMM paper).

Between two standard normals in d dimensions the optimal transport is the identity: a flow that learned it would not move,
v = 0. Random pairing of noise and data gives the velocity v(x0) = E[x1] - x0 = -x0 at the source. Optimal pairing within
batches of n lies in between. Derivations:

- *Slope and cost.* The pairing does not change under rotations, so the linear regression of x1 on x0 is s x0 with one slope
  s = E<x0, x1> / d. The velocity at the source is (s - 1) x0. Because E|x0|^2 = E|x1|^2 = d, the cost E|x1 - x0|^2 is
  2 d (1 - s). So s determines both. It is 0 for random pairing and 1 for the optimal transport.
- *A bound.* No pairing is better than pairing each x0 with its best x1 of n. Then <x0, x1> is |x0| times the largest of n
  standard normals, at most sqrt(2 ln n) in expectation. So s <= sqrt(2 ln n / d): **a slope s needs n >= exp(d s^2 / 2)**.
- *A prediction* (`predicted_slope`). In many dimensions all lengths are about sqrt(d), and only angles matter. A random
  direction has a cosine of at least s with a given one with probability P_d(s), the size of a spherical cap,
  I_{1-s^2}((d-1)/2, 1/2) / 2. If n P_d(s) is far below 1, few x0 have an x1 that near. If it is far above 1, each x0 has many,
  and nearly all x0 can get one at once. So the prediction is n P_d(s) = 1. Up to powers of d this means
  ln n = -(d/2) ln(1 - s^2), exponential in d for every s. For large n, 1 - s ~ n^(-2/d) / 2, the rate at which empirical
  measures converge in W2^2. The step from "each has one" to "all can get one" is an argument, not a proof. In few dimensions
  the prediction is too optimistic: lengths differ, and points compete. In one dimension pairing is sorting, and s is exactly
  the mean square of the expected order statistics, computed by Blom's formula.

Nothing in the prediction is fitted.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import betainc, betaincinv, ndtri

from beeline.noise import stream
from beeline.settings import Channels, Range, Settings, Size, Some

MAX_OT_BATCH = 16_384  # the time of a pairing grows with the cube of the batch size


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtConfig(Settings):
    """Slopes to measure: each of `dims` with each of `batches`, from at least `points` pairs and at least 4 batches."""

    dims: Some[Channels] = (1, 2, 4, 8, 16, 32, 64)
    batches: Some[Annotated[int, Range(2, MAX_OT_BATCH)]] = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
    points: Size = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(a < b for a, b in itertools.pairwise(self.batches))
        self.require(rising, "batches", "rising batch sizes")


def ot_pairing(x0: np.ndarray, x1: np.ndarray) -> np.ndarray:
    """Permutation p of range(n) that minimises the sum of |x0_i - x1_p(i)|^2; x0 and x1 are (n, d)."""
    return linear_sum_assignment(-(x0 @ x1.T))[1]  # the squared lengths are the same for all permutations


def measured_slope(dim: int, batch: int, count: int, rng: np.random.Generator) -> tuple[float, float]:
    """Slope of x1 on x0 over `count` optimally paired batches of two standard normals, and its standard error.

    Lengths are pooled over x0 and x1, because both have the same distribution: s = 2 <x0, x1> / (|x0|^2 + |x1|^2), at most 1.
    """
    sums = np.empty((count, 2))
    for row in sums:
        x0, x1 = rng.standard_normal((2, batch, dim))
        row[:] = 2 * (x0 * x1[ot_pairing(x0, x1)]).sum(), (x0**2).sum() + (x1**2).sum()
    slope = float(sums[:, 0].sum() / sums[:, 1].sum())
    return slope, float((sums[:, 0] - slope * sums[:, 1]).std(ddof=1) * math.sqrt(count) / sums[:, 1].sum())


def predicted_slope(dim: int, batch: float) -> float:
    """Slope s for which `batch` P_d(s) = 1; in one dimension, the mean square of the expected order statistics."""
    if dim == 1:
        ranks = np.arange(1, round(batch) + 1)
        return float((ndtri((ranks - 0.375) / (len(ranks) + 0.25)) ** 2).mean())
    return math.sqrt(1 - betaincinv((dim - 1) / 2, 0.5, min(1.0, 2 / batch)))


def predicted_batch(dim: int, slope: float) -> float:
    """Batch size needed for a slope in (0, 1), 1 / P_d(slope), in two dimensions or more."""
    return float(2 / betainc((dim - 1) / 2, 0.5, 1 - slope**2))


def batch_for(slope: float, batches: Sequence[int], slopes: Sequence[float]) -> float | None:
    """Batch size at which measured `slopes` pass `slope`, interpolated over log batch sizes; None if they do not reach it."""
    for low, high, below, above in zip(batches, batches[1:], slopes, slopes[1:], strict=False):
        if below <= slope <= above:
            return low * (high / low) ** ((slope - below) / (above - below))
    return None


def measure_ot(config: OtConfig, seed: int) -> list[dict[str, float]]:
    """Measure one row for each dimension and batch size: the slope, its standard error, and the predicted slope."""
    rows = []
    for dim in config.dims:
        for batch in config.batches:
            count = max(4, math.ceil(config.points / batch))
            slope, error = measured_slope(dim, batch, count, stream(seed, "toy-ot", dim, batch))
            rows.append({"dim": dim, "batch": batch, "slope": slope, "error": error, "predicted": predicted_slope(dim, batch)})
    return rows
