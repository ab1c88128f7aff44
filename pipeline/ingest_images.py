"""Write real images into images/: uint8 Parquet shards with labels, from any source that pipeline/sources supports.

    python pipeline/ingest_images.py digits
    python pipeline/ingest_images.py digits --images.source photos/ --images.resolution 32 --images.channels 3

Sources are often sorted by class, and the reader shuffles only within a window. So images/ stores the images in shuffled
order: shard k holds images order[k * size : (k + 1) * size] of the source, and `index` is the position in images/.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import collections
import hashlib
import json
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tyro

from beeline.config import ImagesConfig, to_dict
from beeline.errors import BeelineError, one_line
from beeline.files.names import IMAGES
from beeline.noise import stream
from beeline.settings import MAX_SHARDS
from pipeline.command import run_command
from pipeline.manifest import Manifest
from pipeline.pool import run_pool
from pipeline.progress import Progress
from pipeline.shards import encode, shard_count, shard_name, shard_rows, survey
from pipeline.sources import BUILT_IN, CorruptImage, Source, open_source
from pipeline.sources.labels import summary
from pipeline.stage import PLAN, Stage
from pipeline.storage import Folder

NAMED = 20  # corrupt images named in an error
NOTE = 400  # maximum characters of a printed line about the source
PASS_BYTES = 512 * 2**20  # images held by an actor at once, if the source must be read sequentially


def shuffled(count: int) -> np.ndarray:
    """Map each position of images/ to an image of the source: a permutation of range(count), int64, fixed by `count`.

    It ranks Philox's raw bits, which are the same in all versions of NumPy.
    """
    return np.argsort(stream(0, "images", count).bit_generator.random_raw(count), kind="stable")


def listing_digest(source: Source, order: np.ndarray) -> str:
    """Compute the SHA-256 of the images' names and classes in the order of images/."""
    names = "\n".join(source.names[int(i)] for i in order)
    return hashlib.sha256(names.encode("utf-8", "surrogateescape") + source.classes.labels[order].tobytes()).hexdigest()


class ImageShards:
    """Writes the shards of images/; each entry of `passes` lists the shards that are made together."""

    def __init__(self, workspace: Folder, plan: dict[str, Any], config: ImagesConfig, passes: Sequence[list[int]]) -> None:
        self.folder = workspace / IMAGES
        self.plan, self.config, self.passes = plan, config, passes
        self.source = open_source(config)
        self.order = shuffled(len(self.source.names))
        if listing_digest(self.source, self.order) != plan["images"]["listing_sha256"]:
            raise BeelineError(
                f"{config.source} holds other images here than on the machine that started the command; expected the same on "
                "all machines, unchanged until images/ is finished"
            )

    def work(self, number: int) -> dict[str, Any]:
        """Make and publish the shards of one pass, except shards with corrupt images.

        The returned row counts the images and the changes made to them, and names the corrupt ones.
        """
        start_reading = time.monotonic()
        shards = [shard_rows(k, self.config.shard_size, len(self.order)) for k in self.passes[number]]
        positions = np.concatenate([np.asarray(rows) for rows in shards])
        wanted = self.order[positions]
        side = self.config.resolution
        images = np.empty((len(wanted), self.config.channels, side, side), np.uint8)
        sound, corrupt = np.ones(len(wanted), bool), []
        for i in np.argsort(wanted):  # in the source's order: neighbouring files, one row group after another
            try:
                images[i] = self.source.image(int(wanted[i]))
            except CorruptImage as error:
                sound[i] = False
                corrupt.append(str(error))
        start, written = 0, []
        for k, rows in zip(self.passes[number], shards, strict=True):
            part = slice(start, start := start + len(rows))
            if sound[part].all():
                labels = self.source.classes.labels[wanted[part]]
                data = encode("image", images[part], labels, rows, self.plan)
                self.folder.write(shard_name(k), data)
                written.append(
                    {"shard": k, "bytes": len(data), "crc32": zlib.crc32(data), "published": round(time.time() * 1000)}
                )
        changes = dict(self.source.pixels.changes)
        self.source.pixels.changes.clear()
        return {
            "images": len(wanted),
            "reading_seconds": time.monotonic() - start_reading,
            "written": json.dumps(written),
            "corrupt": json.dumps(corrupt),
            "changes": json.dumps(changes),
        }


def passes_for(shards: Sequence[int], source: Source, config: ImagesConfig) -> list[list[int]]:
    """Group the shards that are made together.

    With random access to the source, each pass is one shard. A sequential source is read whole in each pass, so a pass takes as
    many shards as fit into PASS_BYTES.
    """
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
    count = len(source.names)
    if (shards := shard_count(count, images.shard_size)) > MAX_SHARDS:
        raise BeelineError(
            f"{count:,} images in shards of {images.shard_size:,} make {shards:,} shards; expected at most {MAX_SHARDS:,}. "
            "Choose a larger --images.shard-size"
        )
    for note in (summary(source.classes), *source.notes):
        print(f"images: {one_line(note, NOTE)}", flush=True)
    plan = {
        "images": to_dict(images, resources=False)
        | {
            "count": count,
            "num_classes": int(source.classes.labels.max()) + 1,
            "order": "shuffled",
            "listing_sha256": listing_digest(source, shuffled(count)),
        }
    }
    place = Folder(workspace)
    stage = Stage(place, IMAGES, plan)
    if not stage.begin():
        return
    corrupt, seconds = _make(stage, place, source, images)
    stage.folder.clean()
    if corrupt:
        stage.folder.remove(PLAN)  # another source may be ingested here; kept shards carry their plan themselves
        shown = "; ".join(sorted(corrupt)[:NAMED]) + ("; ..." if len(corrupt) > NAMED else "")
        raise BeelineError(
            f"{len(corrupt):,} of {count:,} images in {images.source} cannot be read: {shown}. Repair them or remove them "
            "from the source, then run the command again; shards without them are kept"
        )
    stage.finish(images=count, shards=shard_count(count, images.shard_size), reading_seconds=round(seconds, 3))


def _make(stage: Stage, place: Folder, source: Source, images: ImagesConfig) -> tuple[list[str], float]:
    """Make the missing shards. Returns descriptions of the corrupt images, and the actors' total reading time in seconds."""
    count = len(source.names)
    expected = {shard_name(k) for k in range(shard_count(count, images.shard_size))}
    for name in stage.folder.sizes():
        if name.startswith("part-") and name not in expected:  # left by a larger source with corrupt images
            stage.folder.remove(name)
    state = survey(stage.folder, stage.plan, count, images.shard_size)
    manifest, left = Manifest(stage.folder, state.sizes), state.todo
    total = sum(len(shard_rows(k, images.shard_size, count)) for k in left)
    passes = passes_for(left, source, images)
    resolved = images if images.source == BUILT_IN else replace(images, source=os.path.abspath(images.source))
    arguments = {"workspace": place, "plan": stage.plan, "config": resolved, "passes": passes}
    corrupt: list[str] = []
    seconds = 0.0
    changes: collections.Counter[str] = collections.Counter()
    with Progress("images", total, "images") as progress:
        for row in run_pool(ImageShards, arguments, range(len(passes)), images, name="images"):
            progress.add(row["images"])
            seconds += row["reading_seconds"]
            corrupt += json.loads(row["corrupt"])
            changes.update(json.loads(row["changes"]))
            for entry in json.loads(row["written"]):
                manifest.add(entry)
    manifest.publish()
    for change, number in sorted(changes.items()):
        print(f"images: {number:,} {change}", flush=True)
    return corrupt, seconds


if __name__ == "__main__":
    run_command(ingest_images)
