"""Real images into images/: uint8 Parquet shards with labels, from any source that images.py knows.

python pipeline/ingest_images.py digits
python pipeline/ingest_images.py digits --images.source photos/ --images.resolution 32 --images.channels 3
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import tyro

from beeline.config import ImagesConfig, to_dict
from beeline.errors import BeelineError
from beeline.settings import MAX_SHARDS
from pipeline.command import Progress, run_command
from pipeline.images import CorruptImage, open_source
from pipeline.pool import run_pool
from pipeline.shards import encode, shard_count, shard_name, shard_rows, survey
from pipeline.stage import Stage
from pipeline.storage import Folder

NAMED = 20  # corrupt images that an error names


class ImageShards:
    """Writes shard k of images/."""

    def __init__(self, workspace: Folder, plan: dict[str, Any], config: ImagesConfig) -> None:
        self.folder = workspace / "images"
        self.plan = plan
        self.source = open_source(config)

    def work(self, k: int) -> dict[str, Any]:
        """Make and publish the shard; the row counts its images and names the corrupt ones, which keep it from being made."""
        rows = shard_rows(k, self.plan["images"]["shard_size"], self.plan["images"]["count"])
        images, corrupt = [], []
        for i in rows:
            try:
                images.append(self.source.image(i))
            except CorruptImage as error:
                corrupt.append(str(error))
        if not corrupt:
            self.folder.write(shard_name(k), encode("image", np.stack(images), self.source.labels[rows], rows, self.plan))
        return {"shard": k, "images": len(rows), "corrupt": json.dumps(corrupt)}


def ingest_images(workspace: str, recipe: tyro.conf.Suppress[str], images: ImagesConfig) -> None:
    """Read the real images and write them into <workspace>/images.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    source = open_source(images)
    labels = source.labels
    if (shards := shard_count(len(labels), images.shard_size)) > MAX_SHARDS:
        raise BeelineError(
            f"{len(labels):,} images in shards of {images.shard_size:,} make {shards:,} shards; expected at most "
            f"{MAX_SHARDS:,}. Choose a larger --images.shard-size"
        )
    names = "\n".join(source.names)
    plan = {
        "images": to_dict(images, resources=False)
        | {
            "count": len(labels),
            "num_classes": int(labels.max()) + 1,
            "listing_sha256": hashlib.sha256(names.encode() + labels.tobytes()).hexdigest(),
        }
    }
    place = Folder(workspace)
    stage = Stage(place, "images", plan)
    if not stage.begin():
        return
    left = survey(stage.folder, stage.plan, len(labels), images.shard_size).todo
    progress = Progress("images", sum(len(shard_rows(k, images.shard_size, len(labels))) for k in left), "images")
    arguments = {"workspace": place, "plan": stage.plan, "config": images}
    corrupt: list[str] = []
    for row in run_pool(ImageShards, arguments, left, images, name="images"):
        progress.add(row["images"])
        corrupt += json.loads(row["corrupt"])
    stage.folder.clean()
    if corrupt:
        shown = "; ".join(sorted(corrupt)[:NAMED]) + ("; ..." if len(corrupt) > NAMED else "")
        raise BeelineError(
            f"{len(corrupt):,} of {len(labels):,} images in {images.source} cannot be read: {shown}. Shards without "
            f"them are kept. Mend these and run the command again, or take them out of the source and remove "
            f"{stage.folder} to start without them"
        )
    stage.finish(images=len(labels), shards=shard_count(len(labels), images.shard_size))


if __name__ == "__main__":
    run_command(ingest_images)
