"""Actor pool that processes a list of items; used by pairs, images, verification and evaluation."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
import ray.data

from beeline.config import PoolConfig
from beeline.errors import BeelineError
from pipeline import prometheus
from pipeline.room import check_room
from pipeline.runtime import ensure_ray, quiet_data

GROW_ABOVE = 0.5  # pool utilization: tasks in flight over tasks that can run at once; a busy pool is at 1 or 2


def run_pool(
    worker: type,
    arguments: Mapping[str, Any],
    items: Sequence[int],
    pool: PoolConfig,
    *,
    name: str,
    overlap: bool = False,
) -> Iterator[dict[str, Any]]:
    """Call `worker(**arguments).work(item)` for each item on an actor pool; yield the rows (dicts) as they come.

    One item is one task; the items of a dead actor are retried on another. Workers write their own results under names and with
    bytes that depend only on the item, so a retry is harmless. A BeelineError from a worker or its constructor is raised here
    and ends the work; storage has already retried transient failures. With `overlap`, two threads call a worker at once, and
    the worker does its own locking. Each row names the node that made it. Ray's dashboard and the metrics show the pool as
    `name`.
    """
    if not items:
        return
    ensure_ray()
    quiet_data()
    check_room(name, min(pool.min_actors, len(items)), cpus=pool.cpus, gpus=pool.gpus)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1  # actors hold a model
    # The pool doubles while there is work for more actors; it shrinks once all work is assigned.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = GROW_ABOVE
    context.autoscaling_config.actor_pool_util_downscaling_threshold = 0.0
    shell = type(name, (_Shell,), {})  # Ray Data names its actors and tasks after the class
    rows = ray.data.from_items([{"item": int(k)} for k in items], override_num_blocks=len(items)).map_batches(
        shell,
        fn_constructor_kwargs={"name": name, "worker": worker, "arguments": dict(arguments), "pool": pool},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=min(pool.min_actors, len(items)),
            max_size=max(1, min(pool.max_actors, len(items))),
            max_tasks_in_flight_per_actor=2,
            max_concurrent_calls_per_actor=2 if overlap else 1,
            enable_true_multi_threading=overlap,
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    rows.set_name(name)
    for outcome in rows.iter_rows():
        row = pickle.loads(outcome["outcome"])
        if isinstance(row, BeelineError):
            raise row
        yield row


class _Shell:
    """Ray actor around one worker: sets its thread count and reports its rows and its time to the cluster's metrics.

    A BeelineError is returned to the driver in place of a row. If it were raised here, it would arrive as text after Ray's
    tracebacks.
    """

    def __init__(self, name: str, worker: type, arguments: dict[str, Any], pool: PoolConfig) -> None:
        import torch

        from beeline.numerics import set_numerics

        set_numerics()
        self.name, self.price = name, pool.price
        self._counted, self._lock = time.monotonic(), threading.Lock()
        torch.set_num_threads(pool.threads)
        self.node = ray.get_runtime_context().get_node_id()[:8]
        self.error: BeelineError | None = None
        try:
            self.worker = worker(**arguments)
        except BeelineError as error:
            self.error = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        (item,) = batch["item"]
        try:
            outcome = self.error or self._row(int(item))
        except BeelineError as error:
            outcome = error
        return {"outcome": [pickle.dumps(outcome)]}

    def _row(self, item: int) -> dict[str, Any]:
        row = self.worker.work(item)
        seconds = self._seconds()
        prometheus.count(self.name, row | {"actor_seconds": seconds, "cost": seconds / 3600 * self.price})
        return row | {"node": self.node}

    def _seconds(self) -> float:
        """Return the seconds since the last call or the start."""
        with self._lock:  # items may overlap
            since, self._counted = self._counted, time.monotonic()
            return self._counted - since
