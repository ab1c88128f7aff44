"""The real images as measuring networks see them: evaluation/reference/<network>/, made once for each network.

Statistics are of all images, features of an evenly spread part: what needs single images needs no more. Work items look at
groups of shards (evaluation/jobs.py), so that few statistics are written for many shards.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from beeline.errors import BeelineError, reading
from beeline.files.arrays import pack, unpack
from beeline.files.names import EVALUATION
from beeline.metrics.frechet import Gaussian, Statistics
from beeline.metrics.measures import Reference
from pipeline.shards import shard_count
from pipeline.storage import Folder

KEPT = 50_000  # real images whose features are kept one by one
GROUPS = 64  # of shards, at most
REFERENCE = f"{EVALUATION}/reference"
STATISTICS, FEATURES = "statistics.npz", "features.npz"


def groups(config: dict[str, Any]) -> list[range]:
    """The shards of images/ (`config` of its plan) in at most GROUPS groups."""
    shards = shard_count(int(config["count"]), int(config["shard_size"]))
    size = -(-shards // GROUPS)
    return [range(k, min(k + size, shards)) for k in range(0, shards, size)]


def reference_folder(network: str) -> str:
    """Where the real images' features in `network` are."""
    return f"{REFERENCE}/{network}"


def reference_bytes(images: int, dimensions: int) -> int:
    """Bytes of what stays of `images` real images in `dimensions` features: rows (int64) and features (float32) of those that
    are kept, mean and second moment (float64) of all."""
    return min(KEPT, images) * (8 + 4 * dimensions) + 8 * dimensions * (dimensions + 1)


def reference(workspace: Folder, network: str, given: Gaussian | None = None) -> Reference:
    """The real images as `network` sees them, from files that RealImages and `merge_reference` have made. What is `given` takes
    the place of their statistics in Inception's features; BeelineError if it is of another network."""
    folder = workspace / reference_folder(network)
    kept = arrays_in(folder, FEATURES, "features", "rows")
    moments = given if network == "inception" and given else _statistics_in(folder)
    check_reference(moments, network, kept["features"].shape[1])
    return Reference(moments, kept["features"], kept["rows"])


def arrays_in(folder: Folder, name: str, *keys: str) -> dict[str, np.ndarray]:
    """The arrays of a file that an evaluation left, with these among them. Raises FileNotFoundError where it is not there, and
    BeelineError where it is damaged."""
    data = folder.read(name)
    with reading(f"{folder}/{name} is damaged", "remove it and measure again"):
        found = unpack(data, "arrays")
        if missing := set(keys) - set(found):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return found


def _statistics_in(folder: Folder) -> Statistics:
    data = folder.read(STATISTICS)
    with reading(f"{folder}/{STATISTICS} is damaged", "remove it and measure again"):
        return Statistics.from_npz(data)


def check_reference(moments: Gaussian, network: str, dimensions: int) -> None:
    """Raise BeelineError unless `moments` are of as many features as `network` has."""
    if moments.mean.shape[0] != dimensions:
        raise BeelineError(
            f"the reference has {moments.mean.shape[0]} features, {network} {dimensions}; "
            "expected statistics of the same network"
        )


def merge_reference(folder: Folder, files: list[str]) -> None:
    """The groups' files, in their order, into one of statistics and one of features."""
    statistics, features, rows = None, [], []
    for name in files:
        part = arrays_in(folder, name, "n", "mean", "m2", "features", "rows")
        made = Statistics(int(part["n"]), part["mean"], part["m2"])
        statistics = made if statistics is None else statistics + made
        features.append(part["features"])
        rows.append(part["rows"])
    assert statistics is not None
    folder.write(STATISTICS, statistics.to_npz())
    folder.write(FEATURES, pack({"features": np.concatenate(features), "rows": np.concatenate(rows)}))
