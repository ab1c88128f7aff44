"""Metrics of samples against real images, computed from the outputs of a measuring network.

    fid, fd_<network>            Fréchet distance (Heusel et al. 2017); "fid" only for Inception's features
    kid                          kernel distance, polynomial kernel, 100 subsets of 1000 (Binkowski et al. 2018)
    is                           Inception Score, 10 splits (Salimans et al. 2016)
    precision, recall            k = 3 nearest neighbours (Kynkaanniemi et al. 2019)
    density, coverage            k = 5 (Naeem et al. 2020)
    authenticity                 share of samples that are farther from their nearest real image than that image is from its
                                 own nearest (Alaa et al. 2022): low if training images are copied

In Inception's features, all but the first have the names above; in other features, names like precision_<network>. Every name
ends in the number of samples: fid_50k, recall_10k. Features are converted to float64 first. KID and IS use torch-fidelity's
own code; the others equal its results (tests/beeline/test_measures.py).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from beeline.errors import BeelineError
from beeline.features.measuring import LOSSES_PROBE, Looks
from beeline.features.torchvision_shim import import_torchvision
from beeline.files.arrays import spread
from beeline.metrics.frechet import Gaussian, Statistics, frechet_distance

NEAREST_PR, NEAREST_DC = 3, 5
KID_SUBSET, KID_SUBSETS = 1000, 100  # images of a subset; the number of subsets is torch-fidelity's default
SEED = 2020  # torch-fidelity's: of KID's subsets and of the order in which IS splits
BLOCK = 1024  # rows of a matrix of distances that are in memory at once
# The names of metrics, without networks and counts.
FID, FRECHET, KID, INCEPTION_SCORE, PAIR_RMS = "fid", "fd", "kid", "is", "pair_rms"
DIVERSITY = ("precision", "recall", "density", "coverage", "authenticity")
RISING = (INCEPTION_SCORE, *DIVERSITY)


def frechet_name(network: str) -> str:
    """The name of the Fréchet distance in the features of `network`, without its count."""
    return FID if network == "inception" else f"{FRECHET}_{network}"


VALIDATION = frechet_name(LOSSES_PROBE)
"""The figure of a training's validation. Its name has no count."""


def is_frechet(metric: str) -> bool:
    """Whether the metric is a Fréchet distance, in any features."""
    return metric.split("_")[0] in (FID, FRECHET)


def is_diversity(metric: str) -> bool:
    """Whether the metric is a share or density of neighbourhoods, in any features."""
    return metric.split("_")[0] in DIVERSITY


def rises(metric: str) -> bool:
    """Return whether higher is better, for a metric's name with or without its count."""
    return metric.split("_")[0] in RISING


def counted(name: str, n: int) -> str:
    """Return the metric's name with its number of samples: fid_50k, fd_probe_1797."""
    return f"{name}_{n // 1000}k" if n % 1000 == 0 else f"{name}_{n}"


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images in the features of a network: `moments` of all of them (or of EDM's file); `features` (m, D) of an evenly
    spread subset, for metrics that need single images, at `rows` (m,) of images/."""

    moments: Gaussian
    features: np.ndarray
    rows: np.ndarray

    def some(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return at most `count` of the features, evenly spread, and their rows."""
        chosen = spread(min(count, len(self.rows)), len(self.rows))
        return self.features[chosen], self.rows[chosen]


def measures(seen: Looks, real: Reference, network: str, *, neighbours: int) -> dict[str, float]:
    """Compute all metrics of one set of samples, by name.

    Precision, recall, density, coverage and authenticity use `neighbours` samples and as many real images, both evenly spread,
    because their cost is quadratic. KID is omitted below 1000 samples, where it is not defined.
    """
    n, inception = len(seen.features), network == "inception"
    values = {counted(frechet_name(network), n): frechet_distance(Statistics.of(seen.features), real.moments)}
    if inception and min(n, len(real.features)) >= KID_SUBSET:
        values[counted(KID, n)] = kernel_distance(seen.features, real.features)
    if seen.logits is not None:
        values[counted(INCEPTION_SCORE, n)] = inception_score(seen.logits)
    chosen = seen.features[spread(min(neighbours, n), n)]  # samples are in the order of images/, often by class
    near = neighbourhoods(chosen, real.some(neighbours)[0])
    suffix = "" if inception else f"_{network}"
    return values | {counted(f"{name}{suffix}", min(n, neighbours)): value for name, value in near.items()}


def measures_flops(n: int, kept: int, dimensions: int, network: str, *, neighbours: int) -> float:
    """FLOPs of `measures` for `n` samples, `kept` real images and `dimensions` features: covariance and matrix square roots,
    distances between neighbours, kernels."""
    fake, true = min(neighbours, n), min(neighbours, kept)
    products = n * dimensions + fake**2 + true**2 + fake * true
    if network == "inception" and min(n, kept) >= KID_SUBSET:
        products += KID_SUBSETS * 3 * KID_SUBSET**2
    return 2.0 * dimensions * products + 10.0 * dimensions**3


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Compute KID between features (n, D) and (m, D): the mean over subsets of the unbiased squared MMD."""
    import_torchvision()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    metric = kid_features_to_metric(_double(a), _double(b), kid_subset_size=KID_SUBSET, rng_seed=SEED, verbose=False)
    return metric[KEY_METRIC_KID_MEAN]


def inception_score(logits: np.ndarray) -> float:
    """Compute the Inception Score of logits (n, K): the mean over ten splits of a shuffled order."""
    import_torchvision()
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    return isc_features_to_metric(_double(logits), rng_seed=SEED)[KEY_METRIC_ISC_MEAN]


def neighbourhoods(samples: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Compute precision, recall, density, coverage and authenticity of features (n, D) against real ones (m, D), n, m > 5."""
    fake, true = _double(samples), _double(real)
    if min(len(fake), len(true)) <= NEAREST_DC:
        raise BeelineError(
            f"{len(fake)} samples and {len(true)} real images; expected more than {NEAREST_DC} of each for neighbourhoods"
        )
    fake_radius = _radii(fake, (NEAREST_PR,))[0]
    nearest, radius, wide = _radii(true, (1, NEAREST_PR, NEAREST_DC))
    reached = torch.zeros(len(true), dtype=torch.bool)
    closest = torch.full((len(true),), torch.inf, dtype=torch.float64)
    precise, within, authentic = 0, 0, 0
    for part, part_radius in zip(fake.split(BLOCK), fake_radius.split(BLOCK), strict=True):
        distance = torch.cdist(part, true)
        precise += int((distance <= radius).any(dim=1).sum())
        reached |= (distance <= part_radius[:, None]).any(dim=0)
        within += int((distance < wide).sum())
        closest = torch.minimum(closest, distance.min(dim=0).values)
        least = distance.min(dim=1)
        authentic += int((least.values > nearest[least.indices]).sum())
    values = (
        precise / len(fake),
        float(reached.double().mean()),
        within / (NEAREST_DC * len(fake)),
        float((closest < wide).double().mean()),
        authentic / len(fake),
    )
    return dict(zip(DIVERSITY, values, strict=True))


def nearest(samples: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Find the row of `real` (m, D) that is nearest to each of `samples` (n, D), int64 (n,)."""
    return torch.cat([torch.cdist(part, _double(real)).argmin(dim=1) for part in _double(samples).split(BLOCK)]).numpy()


def _radii(features: torch.Tensor, orders: tuple[int, ...]) -> list[torch.Tensor]:
    """Compute the distance of each row to its k-th nearest other, (n,), for each k of `orders`; the row itself is the 0th."""
    distances = [
        torch.cdist(part, features).topk(max(orders) + 1, dim=1, largest=False, sorted=True).values
        for part in features.split(BLOCK)
    ]
    return [torch.cat([part[:, k] for part in distances]) for k in orders]


def _double(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, np.float64))
