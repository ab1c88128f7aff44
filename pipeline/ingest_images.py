"""Real images into images/: uint8 Parquet shards with labels, from any source that images.py knows.

    python pipeline/ingest_images.py digits
    python pipeline/ingest_images.py digits --images.source photos/ --images.resolution 32 --images.channels 3

Sources are often sorted by class, and the reader only mixes what lies within a window. So images/ holds the images in a
shuffled order: shard k holds images order[k * size : (k + 1) * size] of the source, and `index` is the position in images/.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tyro

from beeline.config import ImagesConfig, to_dict
from beeline.errors import BeelineError
from beeline.noise import stream
from beeline.settings import MAX_SHARDS
from pipeline.command import Progress, run_command
from pipeline.images import CorruptImage, Source, open_source
from pipeline.pool import run_pool
from pipeline.shards import encode, shard_count, shard_name, shard_rows, survey
from pipeline.stage import Stage
from pipeline.storage import Folder

NAMED = 20  # corrupt images that an error names
PASS_BYTES = 512 * 2**20  # images that an actor holds at once, where a source is best read from its start to its end


def shuffled(count: int) -> np.ndarray:
    """The image of the source at each position of images/: a permutation of range(count) that depends on `count` alone, int64.

    It ranks Philox's raw bits, which NumPy keeps the same in all versions.
    """
    return np.argsort(stream(0, "images", count).bit_generator.random_raw(count), kind="stable")


class ImageShards:
    """Writes the shards of images/; `passes` are the shards that are made together."""

    def __init__(self, workspace: Folder, plan: dict[str, Any], config: ImagesConfig, passes: Sequence[list[int]]) -> None:
        self.folder = workspace / "images"
        self.plan, self.config, self.passes = plan, config, passes
        self.source = open_source(config)
        self.order = shuffled(len(self.source.labels))

    def work(self, number: int) -> dict[str, Any]:
        """Make and publish the shards of a pass; the row counts their images and names the corrupt ones, whose shards are left
        out."""
        shards = [shard_rows(k, self.config.shard_size, len(self.order)) for k in self.passes[number]]
        positions = np.concatenate([np.asarray(rows) for rows in shards])
        wanted = self.order[positions]
        side = self.config.resolution
        images = np.empty((len(wanted), self.config.channels, side, side), np.uint8)
        sound, corrupt = np.ones(len(wanted), bool), []
        for i in np.argsort(wanted):  # in the source's order: files that lie side by side, one row group after the other
            try:
                images[i] = self.source.image(int(wanted[i]))
            except CorruptImage as error:
                sound[i] = False
                corrupt.append(str(error))
        start = 0
        for k, rows in zip(self.passes[number], shards, strict=True):
            part = slice(start, start := start + len(rows))
            if sound[part].all():
                labels = self.source.labels[wanted[part]]
                self.folder.write(shard_name(k), encode("image", images[part], labels, rows, self.plan))
        return {"images": len(wanted), "corrupt": json.dumps(corrupt)}


def passes_for(shards: Sequence[int], source: Source, config: ImagesConfig) -> list[list[int]]:
    """The shards that are made together. A shard alone where any image can be read by itself; else as many as fit into memory,
    because each pass reads the whole source."""
    if not source.sequential or not shards:
        return [[k] for k in shards]
    size = len(shards) * config.shard_size * config.channels * config.resolution**2
    count = max(-(-size // PASS_BYTES), config.max_actors)
    return [part.tolist() for part in np.array_split(shards, min(count, len(shards)))]


def ingest_images(workspace: str, recipe: tyro.conf.Suppress[str], images: ImagesConfig) -> None:
    """Read the real images and write them into <workspace>/images.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    source = open_source(images)
    count = len(source.labels)
    if (shards := shard_count(count, images.shard_size)) > MAX_SHARDS:
        raise BeelineError(
            f"{count:,} images in shards of {images.shard_size:,} make {shards:,} shards; expected at most {MAX_SHARDS:,}. "
            "Choose a larger --images.shard-size"
        )
    order = shuffled(count)
    labels, names = source.labels[order], "\n".join(source.names[int(i)] for i in order)
    plan = {
        "images": to_dict(images, resources=False)
        | {
            "count": count,
            "num_classes": int(labels.max()) + 1,
            "order": "shuffled",
            "listing_sha256": hashlib.sha256(names.encode() + labels.tobytes()).hexdigest(),  # the order is in it
        }
    }
    place = Folder(workspace)
    stage = Stage(place, "images", plan)
    if not stage.begin():
        return
    left = survey(stage.folder, stage.plan, count, images.shard_size).todo
    progress = Progress("images", sum(len(shard_rows(k, images.shard_size, count)) for k in left), "images")
    passes = passes_for(left, source, images)
    arguments = {"workspace": place, "plan": stage.plan, "config": images, "passes": passes}
    corrupt: list[str] = []
    for row in run_pool(ImageShards, arguments, range(len(passes)), images, name="images"):
        progress.add(row["images"])
        corrupt += json.loads(row["corrupt"])
    stage.folder.clean()
    if corrupt:
        shown = "; ".join(sorted(corrupt)[:NAMED]) + ("; ..." if len(corrupt) > NAMED else "")
        raise BeelineError(
            f"{len(corrupt):,} of {count:,} images in {images.source} cannot be read: {shown}. Shards without "
            f"them are kept. Mend these and run the command again, or take them out of the source and remove "
            f"{stage.folder} to start without them"
        )
    stage.finish(images=count, shards=shard_count(count, images.shard_size))


if __name__ == "__main__":
    run_command(ingest_images)
