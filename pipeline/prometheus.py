"""What a cluster's Prometheus sees of the work, beside Ray's own series: counters as ray_beeline_<name>_total, gauges as
ray_beeline_<name>. cluster/grafana draws them.

Ray's processes report every ten seconds and when they end. Afterwards a node's endpoint keeps their counters for as long as the
node lives, but their gauges for two reports more: a scrape every ten seconds sees the last value, and later it is in Prometheus
alone. Processes that are killed, and the trials of a sweep, do not report at their end: the last seconds are lost. Numbers that
must last are in the workspace: pairs/manifest.parquet, train.jsonl, metrics.json.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from beeline.objectives.learner import SKIPPED
from pipeline.training_log import DATA_WAIT, IMAGES_PER_S, PEAK_MB, SECONDS, STEP

COUNTERS = {
    "pairs": "Noise-image pairs published",
    "images": "Real images published",
    "samples": "Samples drawn from models and measured",
    "evaluations": "Network evaluations",
    "bytes": "Bytes published",
    "retries": "Requests to object storage that had to be repeated",
    "sampling_seconds": "Seconds in which the sampler of an actor was busy",
    "writing_seconds": "Seconds spent encoding and publishing shards, beside the sampling of the next",
    "waiting_seconds": "Seconds in which the sampler of an actor had nothing to do",
    "actor_seconds": "Seconds from an actor's start to the end of its last work item",
    "cost": "What those seconds cost, at the price of the stage's settings",
}
GAUGES = {
    "training_step": "Steps done",
    "training_images_per_second": "Images that a training run takes in, over all ranks",
    "training_waiting_ratio": "Share of the time in which steps wait for data",
    "training_peak_bytes": "The most memory that the first rank has held: the GPU's, or its own",
    "training_skipped": "Steps left out because their gradients were not finite",
    "training_figure": "What a training run says of its steps, by figure: losses, lambda, gradient norms, distances",
    "evaluation_figure": "Figures of models, means over draws, by sampler and metric",
    "sweep_trials": "Trials of a sweep, by state: left, stopped, finished",
}
TAGS = {"training": ("model",), "evaluation": ("model", "sampler", "metric"), "sweep": ("sweep", "state")}
# Figures that the loop itself adds to a row of train.jsonl: their gauge, and its unit in theirs.
OF_THE_LOOP = {
    STEP: ("training_step", 1),
    IMAGES_PER_S: ("training_images_per_second", 1),
    DATA_WAIT: ("training_waiting_ratio", 1),
    PEAK_MB: ("training_peak_bytes", 2**20),
    SKIPPED: ("training_skipped", 1),
}
ZERO = sys.float_info.min  # Ray refuses to add nothing, and a series that is not there looks like one that nobody watches


@functools.cache
def _counter(name: str) -> Counter:
    return Counter(f"beeline_{name}", COUNTERS[name], tag_keys=("worker",))


@functools.cache
def _gauge(name: str) -> Gauge:
    tags = TAGS[name.split("_")[0]] + (("figure",) if name == "training_figure" else ())
    return Gauge(f"beeline_{name}", GAUGES[name], tag_keys=tags)


def count(worker: str, row: Mapping[str, Any]) -> None:
    """Add what one finished work item reports of itself. Only inside Ray's processes."""
    for name in COUNTERS.keys() & row.keys():
        _counter(name).inc(max(row[name], ZERO), {"worker": worker})


def gauge(name: str, value: float, **tags: str) -> None:
    """Set one of GAUGES, with all of its tags. Only inside Ray's processes."""
    _gauge(name).set(value, tags)


class TrainingGauges:
    """A tracker (trainers/tracking.py) whose rows become gauges, for a run in one of Ray's processes; `model` is the folder of
    what is trained, within the workspace."""

    def __init__(self, model: str) -> None:
        self.model = model

    def log(self, row: Mapping[str, Any]) -> None:
        for key, value in row.items():
            if key in OF_THE_LOOP:
                name, unit = OF_THE_LOOP[key]
                gauge(name, value * unit, model=self.model)
            elif key != SECONDS:
                gauge("training_figure", value, model=self.model, figure=key)

    def close(self) -> None: ...
