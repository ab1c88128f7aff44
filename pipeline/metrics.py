"""What a cluster's Prometheus sees of the actors: counters of what their rows report, as ray_beeline_<name>_total.

Series of dead workers vanish from Ray's endpoint: numbers that must last are in the manifest.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter

COUNTERS = {
    "pairs": "Noise-image pairs published",
    "images": "Real images published",
    "evaluations": "Network evaluations",
    "bytes": "Bytes published",
    "retries": "Requests to object storage that had to be repeated",
    "sampling_seconds": "Seconds in which the sampler of an actor was busy",
    "writing_seconds": "Seconds spent encoding and publishing shards, beside the sampling of the next",
    "waiting_seconds": "Seconds in which the sampler of an actor had nothing to do",
}


@functools.cache
def _counter(name: str) -> Counter:
    return Counter(f"beeline_{name}", COUNTERS[name], tag_keys=("worker",))


def count(worker: str, row: Mapping[str, Any]) -> None:
    """Add what one finished work item reports of itself. Only inside Ray's processes."""
    for name in COUNTERS.keys() & row.keys():
        if row[name] > 0:
            _counter(name).inc(row[name], {"worker": worker})
