"""Features of the real images in the measuring networks: evaluation/reference/<network>/, computed once for each network.

Statistics cover all images. Single features are kept for an evenly spread part, which is enough for metrics that need them.
Work items process groups of shards (evaluation/jobs.py), so that many shards need few files of statistics.
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
GROUPS = 64  # largest number of groups of shards
REFERENCE = f"{EVALUATION}/reference"
STATISTICS, FEATURES = "statistics.npz", "features.npz"


def groups(config: dict[str, Any]) -> list[range]:
    """Divide the shards of images/ into at most GROUPS groups. `config` is the plan's "images"."""
    shards = shard_count(int(config["count"]), int(config["shard_size"]))
    size = -(-shards // GROUPS)
    return [range(k, min(k + size, shards)) for k in range(0, shards, size)]


def reference_folder(network: str) -> str:
    """Folder of the real images' features in `network`."""
    return f"{REFERENCE}/{network}"


def reference_bytes(images: int, dimensions: int) -> int:
    """Bytes of what stays of `images` real images in `dimensions` features: rows (int64) and features (float32) of those that
    are kept, mean and second moment (float64) of all."""
    return min(KEPT, images) * (8 + 4 * dimensions) + 8 * dimensions * (dimensions + 1)


def reference(workspace: Folder, network: str, given: Gaussian | None = None) -> Reference:
    """Statistics and features of the real images in `network`, from the files that `merge_reference` writes.

    `given` replaces the statistics in Inception's features. Raises BeelineError if it belongs to another network.
    """
    folder = workspace / reference_folder(network)
    kept = arrays_in(folder, FEATURES, "features", "rows")
    moments = given if network == "inception" and given else _statistics_in(folder)
    check_reference(moments, network, kept["features"].shape[1])
    return Reference(moments, kept["features"], kept["rows"])


def arrays_in(folder: Folder, name: str, *keys: str) -> dict[str, np.ndarray]:
    """The arrays of a file that an evaluation wrote. Raises FileNotFoundError if it is missing, and BeelineError if it is
    damaged or lacks one of `keys`."""
    data = folder.read(name)
    with reading(f"{folder}/{name} is damaged", "remove it and measure again"):
        arrays = unpack(data, "arrays")
        if missing := set(keys) - set(arrays):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return arrays


def _statistics_in(folder: Folder) -> Statistics:
    data = folder.read(STATISTICS)
    with reading(f"{folder}/{STATISTICS} is damaged", "remove it and measure again"):
        return Statistics.from_npz(data)


def check_reference(moments: Gaussian, network: str, dimensions: int) -> None:
    """Raise BeelineError unless `moments` have `dimensions` features, the number of `network`."""
    if moments.mean.shape[0] != dimensions:
        raise BeelineError(
            f"the reference has {moments.mean.shape[0]} features, expected {dimensions}; give statistics in the features of "
            f"{network}"
        )


def merge_reference(folder: Folder, files: list[str]) -> None:
    """Merge the files of the groups, in their order, into one file of statistics and one of features."""
    statistics, features, rows = None, [], []
    for name in files:
        part = arrays_in(folder, name, "n", "mean", "m2", "features", "rows")
        part_statistics = Statistics(int(part["n"]), part["mean"], part["m2"])
        statistics = part_statistics if statistics is None else statistics + part_statistics
        features.append(part["features"])
        rows.append(part["rows"])
    assert statistics is not None
    folder.write(STATISTICS, statistics.to_npz())
    folder.write(FEATURES, pack({"features": np.concatenate(features), "rows": np.concatenate(rows)}))
