"""Making pairs through Ray, compared with the same sampler in a plain loop on the same machine.

    python -m benchmarks.pairs                    # everything, about 20 minutes on two cores
    python -m benchmarks.pairs --only throughput  # or scaling, startup, shard, memory

- throughput: one actor's pairs/s including publishing, divided by that of a plain loop that does not publish.
- scaling: shards/s of 1 to 32 actors whose teacher only sleeps, divided by the ideal of as many plain loops.
- startup: seconds to the first shard, for few shards and for the 3,907 shards of 4 million ImageNet pairs.
- shard: additional seconds per shard over a plain loop that publishes too; the stub teacher returns at once.
- memory: peak memory of driver and actor, from 10 thousand to 10 million pairs; with a stub teacher.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import nn

from beeline.checkpoint import build
from beeline.config import PairsConfig, PoolConfig
from beeline.denoiser import Denoiser
from beeline.labels import pair_labels
from beeline.noise import unit_noise
from beeline.recipes import digits
from benchmarks.machine import describe, write
from pipeline.gen_pairs import PairShards, make_pairs, plan_of
from pipeline.pool import run_pool
from pipeline.shards import shard_count
from pipeline.storage import Folder

KINDS = ("throughput", "scaling", "startup", "shard", "memory")
IMAGENET_SHARDS = 3_907


class Sleeper(nn.Module):
    """A network that sleeps for `seconds` and returns its input."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.weight = seconds, nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        if self.seconds:
            time.sleep(self.seconds)
        return x


def teacher(seconds: float | None) -> Denoiser:
    """Build the digits' network with random weights, or, with `seconds`, one that sleeps that long in each evaluation."""
    model = build(digits().teacher.network).eval()
    if seconds is not None:
        model.model = Sleeper(seconds)
    return model


class Worker(PairShards):
    """The worker of gen_pairs.py. Its rows also hold its process id and its peak memory."""

    def work(self, k: int) -> dict[str, Any]:
        """Make a shard as PairShards does."""
        return super().work(k) | {"mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "pid": os.getpid()}


def pairs_config(count: int, shard_size: int, evaluations: int = 35) -> PairsConfig:
    """Return settings of a store, sampled by Heun with this number of evaluations."""
    return PairsConfig(count=count, shard_size=shard_size, batch_size=shard_size, num_steps=(evaluations + 1) // 2)


def through_ray(config: PairsConfig, actors: int, seconds: float | None, shards: int | None = None) -> list[dict[str, Any]]:
    """Run with `actors` actors. Returns the rows, each with its arrival in seconds after the call."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        model = teacher(seconds)
        plan = plan_of(config, model, "benchmark", None)
        arguments = {"folder": Folder(directory), "plan": plan, "config": config, "load": functools.partial(teacher, seconds)}
        pool = PoolConfig(min_actors=actors, max_actors=actors, cpus=0.01, threads=1)
        start = time.perf_counter()
        items = range(shard_count(config.count, config.shard_size))
        for row in run_pool(Worker, arguments, items, pool, name="pairs", overlap=True):
            rows.append(row | {"at": time.perf_counter() - start})
            if len(rows) == shards:
                break
    return rows


def plain_loop(config: PairsConfig, shards: int, seconds: float | None, *, publish: bool) -> float:
    """Measure the seconds per shard of a plain loop in this process, on one thread.

    It does not use the main thread: malloc there returns memory to the system after every batch, which made the loop a tenth
    slower than in an actor's thread.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_loop, config, shards, seconds, publish).result()


def _loop(config: PairsConfig, shards: int, seconds: float | None, publish: bool) -> float:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        model = teacher(seconds)
        worker = PairShards(Folder(directory), plan_of(config, model, "benchmark", None), config, lambda: model)

        def one(k: int) -> None:
            if publish:
                worker.work(k)
            else:
                rows = range(k * config.shard_size, (k + 1) * config.shard_size)
                noise = unit_noise(config.seed, rows, model.image_shape)
                make_pairs(worker.model, noise, pair_labels(rows, model.label_dim), config)

        one(0)
        start = time.perf_counter()
        for k in range(shards):
            one(k)
        return (time.perf_counter() - start) / shards


def rate(rows: list[dict[str, Any]]) -> float:
    """Compute shards/s while all actors work: the sum over actors of shards between the first and the last, divided by the time
    between them."""
    published: dict[int, list[float]] = {}
    for row in rows:
        published.setdefault(row["pid"], []).append(row["published"] / 1000)
    return sum((len(times) - 1) / (max(times) - min(times)) for times in published.values() if len(times) > 1)


def throughput(shards: int = 9, size: int = 256, rounds: int = 5) -> dict[str, Any]:
    """Run the benchmark "throughput". Loop and Ray alternate, because machines drift by more than the difference. The share of
    time in which the sampler is busy, by its own account, does not drift."""
    config = pairs_config(shards * size, size)
    ratios, loops, busy = [], [], []
    for _ in range(rounds):
        loop = plain_loop(config, shards // 2, None, publish=False)
        rows = through_ray(config, 1, None)
        ratios.append(rate(rows) * loop)
        loops.append(size / loop)
        sampling, waiting = (sum(row[name] for row in rows[1:]) for name in ("sampling_seconds", "waiting_seconds"))
        busy.append(sampling / (sampling + waiting))
        print(f"throughput: {loops[-1]:.1f} pairs/s in a loop; {ratios[-1]:.3f} through Ray, busy {busy[-1]:.4f}", flush=True)
    return {
        "pairs_per_s_in_a_loop": loops,
        "share_through_ray": ratios,
        "median_share": float(np.median(ratios)),
        "sampler_busy": float(np.median(busy)),
    }


def scaling(actors: tuple[int, ...] = (1, 2, 4, 8, 16, 32), shards_each: int = 8, seconds: float = 5.0) -> list[dict[str, Any]]:
    """Run the benchmark "scaling". A shard sleeps for `seconds`, a twelfth to a fortieth of the time a real shard takes."""
    results = []
    config = pairs_config(64 * shards_each * max(actors), 64, evaluations=5)
    loop = plain_loop(config, 2, seconds / 5, publish=False)
    for n in actors:
        rows = through_ray(pairs_config(64 * shards_each * n, 64, evaluations=5), n, seconds / 5)
        done = rate(rows)
        results.append({"actors": n, "shards_per_s": done, "ideal": n / loop, "share": done * loop / n})
        print(f"scaling: {n} actors, {done:.2f} shards/s, {results[-1]['share']:.3f} of ideal", flush=True)
    return results


def startup() -> list[dict[str, Any]]:
    """Run the benchmark "startup", with Ray already running."""
    results = []
    for shards in (1, 100, IMAGENET_SHARDS):
        rows = through_ray(pairs_config(16 * shards, 16, evaluations=1), 1, 0.0, shards=1)
        results.append({"shards": shards, "seconds_to_the_first": rows[0]["at"]})
        print(f"startup: {shards} shards, the first after {rows[0]['at']:.1f} s", flush=True)
    return results


def shard(shards: int = 300) -> dict[str, float]:
    """Run the benchmark "shard"."""
    config = pairs_config(16 * shards, 16, evaluations=1)
    loop = plain_loop(config, shards, 0.0, publish=True)
    ours = 1 / rate(through_ray(config, 1, 0.0))
    print(f"shard: {ours * 1000:.1f} ms through Ray, {loop * 1000:.1f} ms in a loop", flush=True)
    return {"seconds_through_ray": ours, "seconds_in_a_loop": loop, "fixed_cost_s": ours - loop}


def memory(counts: tuple[int, ...]) -> list[dict[str, float]]:
    """Run the benchmark "memory": peaks so far, in increasing order of counts. The stub makes 1x8x8 images in shards of
    8,192."""
    results = []
    for count in counts:
        rows = through_ray(pairs_config(count, 8192, evaluations=1), 1, 0.0)
        driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        results.append(
            {"pairs": count, "driver_mb": driver, "actor_mb": max(row["mb"] for row in rows), "seconds": rows[-1]["at"]}
        )
        print(f"memory: {count:,} pairs, driver {driver:.0f} MB, actor {results[-1]['actor_mb']:.0f} MB", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Making pairs through Ray.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--counts",
        type=int,
        nargs="+",
        default=[10_000, 100_000, 1_000_000, 10_000_000],
        help="numbers of pairs for the benchmark of memory",
    )
    parser.add_argument("--out", type=Path, help="folder for the results, instead of results/")
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=300 * 2**20, logging_level=logging.ERROR)
    kinds = {
        "throughput": throughput,
        "scaling": scaling,
        "startup": startup,
        "shard": shard,
        "memory": functools.partial(memory, tuple(arguments.counts)),
    }
    for name in arguments.only:
        result = {"machine": describe(torch.device("cpu")), "ray": ray.__version__, name: kinds[name]()}
        write(f"pairs-{name}", result, arguments.out and arguments.out / f"pairs-{name}.json")


if __name__ == "__main__":
    main()
