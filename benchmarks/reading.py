"""Reading pairs for training, compared with plain pyarrow on the same shards and machine.

    python -m benchmarks.reading                               # on the local disk
    python -m benchmarks.reading --folder s3://bucket/reading  # on object storage; set the usual AWS_* variables

Plain pyarrow only reads shard after shard into arrays, in order. The reader shuffles, verifies every page, draws the noise
again and returns float32 batches. Drawing the noise is also timed alone: at 3x32x32 it is most of the work.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from beeline.noise import crc32, unit_noise
from benchmarks.machine import describe, write
from pipeline.reader import ShardReader
from pipeline.shards import encode, shard_count, shard_name, shard_rows
from pipeline.storage import Folder


def fill(folder: Folder, plan: dict[str, Any], shape: tuple[int, ...], dtype: str) -> None:
    """Write a store of random images; existing shards are kept."""
    config, files = plan["pairs"], folder.sizes()
    for k in range(shard_count(config["count"], config["shard_size"])):
        rows = shard_rows(k, config["shard_size"], config["count"])
        if shard_name(k) not in files:
            noise = unit_noise(config["seed"], rows, shape)
            data = encode("x1", (noise / 4).astype(dtype), np.zeros(len(rows), np.int32), rows, plan, x0_crc32=crc32(noise))
            folder.write(shard_name(k), data)


def plain(folder: Folder, config: dict[str, Any]) -> None:
    """Read one shard after another into arrays, with pyarrow."""
    filesystem, path = folder.arrow()
    for k in range(shard_count(config["count"], config["shard_size"])):
        table = pq.read_table(f"{path}/{shard_name(k)}", filesystem=filesystem)
        table["x1"].combine_chunks().to_numpy_ndarray()


def through_reader(folder: Folder, config: dict[str, Any], batch: int, epoch: int) -> None:
    """Read one epoch of batches with a new reader."""
    reader = ShardReader(folder, config, seed=epoch)
    for start in range(0, config["count"], batch):
        reader.batch(start, batch)


def noise_alone(config: dict[str, Any], shape: tuple[int, ...], batch: int) -> None:
    """Draw the noise of every pair, in batches."""
    for start in range(0, config["count"], batch):
        unit_noise(config["seed"], range(start, start + batch), shape)


def main() -> None:
    parser = argparse.ArgumentParser(description="Reading pairs.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", help="folder of the store, which is kept; default: a temporary one")
    parser.add_argument("--count", type=int, default=65_536)
    parser.add_argument("--shard-size", type=int, default=4096)
    parser.add_argument("--shape", type=int, nargs=3, default=[3, 32, 32])
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = {"count": arguments.count, "shard_size": arguments.shard_size, "seed": 0}
    shape, batch = tuple(arguments.shape), arguments.batch_size
    with tempfile.TemporaryDirectory() as directory:
        folder = Folder(arguments.folder or directory)
        fill(folder, {"pairs": config}, shape, arguments.dtype)
        seconds: dict[str, list[float]] = {}
        for number in range(arguments.rounds):
            calls: dict[str, Callable[[], None]] = {
                "plain pyarrow": lambda: plain(folder, config),
                "reader": lambda number=number: through_reader(folder, config, batch, number),
                "x0 alone": lambda: noise_alone(config, shape, batch),
            }
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    rates = {name: config["count"] / statistics.median(times) for name, times in seconds.items()}
    for name, value in rates.items():
        print(f"{name:14} {value:10,.0f} pairs/s, {value / rates['plain pyarrow']:.3f} of plain pyarrow")
    place = "s3" if folder.uri.startswith("s3://") else "disk"
    write(
        f"reading-{place}",
        {
            "machine": describe(torch.device("cpu")),
            "settings": {**config, "shape": shape, "dtype": arguments.dtype, "batch_size": batch, "rounds": arguments.rounds},
            "pairs_per_s": rates,
            "share_of_plain": rates["reader"] / rates["plain pyarrow"],
            "share_of_x0": rates["reader"] / rates["x0 alone"],
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
