"""Beeline's metrics in the cluster's Prometheus, in addition to Ray's own: counters as ray_beeline_<name>_total, gauges as
ray_beeline_<name>. cluster/grafana plots them.

Ray's processes report every ten seconds and when they end. After that, a node's endpoint keeps their counters as long as the
node lives, but their gauges only for two more reports. A scrape every ten seconds sees the last value of a gauge; later only
Prometheus has it. Killed processes and the trials of a sweep do not report when they end, so their last seconds are lost.
Permanent numbers are in the workspace: pairs/manifest.parquet, train.jsonl, metrics.json.
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
    "retries": "Repeated requests to object storage",
    "sampling_seconds": "Seconds in which the sampler of an actor was busy",
    "writing_seconds": "Seconds spent encoding and publishing shards, in parallel with sampling",
    "waiting_seconds": "Seconds in which the sampler of an actor was idle",
    "actor_seconds": "Seconds from an actor's start to the end of its last work item",
    "cost": "Cost of actor_seconds at the price in the stage's settings",
}
GAUGES = {
    "training_step": "Steps done",
    "training_images_per_second": "Images per second of a training run, over all ranks",
    "training_waiting_ratio": "Share of the time in which steps wait for data",
    "training_peak_bytes": "Peak memory of the first rank in bytes: of the GPU, or of the process",
    "training_skipped": "Steps skipped because their gradients were not finite",
    "training_figure": "Training figures by name: losses, lambda, gradient norms, distances",
    "evaluation_figure": "Evaluation metrics of models by sampler and metric, means over draws",
    "sweep_trials": "Trials of a sweep, by state: left, stopped, finished",
}
TAGS = {"training": ("model",), "evaluation": ("model", "sampler", "metric"), "sweep": ("sweep", "state")}
# Figures that the training loop adds to a row of train.jsonl: their gauge, and the factor to the gauge's unit.
OF_THE_LOOP = {
    STEP: ("training_step", 1),
    IMAGES_PER_S: ("training_images_per_second", 1),
    DATA_WAIT: ("training_waiting_ratio", 1),
    PEAK_MB: ("training_peak_bytes", 2**20),
    SKIPPED: ("training_skipped", 1),
}
ZERO = sys.float_info.min  # Ray refuses to add 0, and a missing series looks like an unmonitored one


@functools.cache
def _counter(name: str) -> Counter:
    return Counter(f"beeline_{name}", COUNTERS[name], tag_keys=("worker",))


@functools.cache
def _gauge(name: str) -> Gauge:
    tags = TAGS[name.split("_")[0]] + (("figure",) if name == "training_figure" else ())
    return Gauge(f"beeline_{name}", GAUGES[name], tag_keys=tags)


def count(worker: str, row: Mapping[str, Any]) -> None:
    """Add the counts of one finished work item. Only inside Ray's processes."""
    for name in COUNTERS.keys() & row.keys():
        _counter(name).inc(max(row[name], ZERO), {"worker": worker})


def gauge(name: str, value: float, **tags: str) -> None:
    """Set one of GAUGES, with all its tags. Only inside Ray's processes."""
    _gauge(name).set(value, tags)


class TrainingGauges:
    """A tracker (trainers/tracking.py) that turns rows into gauges, for a run inside a Ray process; `model` is the folder of
    the trained model within the workspace."""

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
