"""Real images into images/: uint8 Parquet shards with labels, from scikit-learn's digits, a folder or EDM's zip.

python pipeline/ingest_images.py digits
python pipeline/ingest_images.py digits --images.source photos/ --images.resolution 32 --images.channels 3
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import tyro

from beeline.config import ImagesConfig, to_dict
from pipeline.command import Progress, run_command
from pipeline.images import open_source
from pipeline.pool import PoolConfig, run_pool
from pipeline.shards import encode, shard_count, shard_name, shard_rows, todo
from pipeline.stage import Stage
from pipeline.storage import Folder


class ImageShards:
    """Writes shard k of images/."""

    def __init__(self, workspace: Folder, plan: dict[str, Any], config: ImagesConfig) -> None:
        self.folder = workspace / "images"
        self.plan = plan
        self.source = open_source(config)

    def work(self, k: int) -> dict[str, Any]:
        """Make and publish the shard; the row says how many images it holds."""
        rows = shard_rows(k, self.plan["images"]["shard_size"], self.plan["images"]["count"])
        images = np.stack([self.source.image(i) for i in rows])
        self.folder.write(shard_name(k), encode("image", images, self.source.labels[rows], rows, self.plan))
        return {"shard": k, "images": len(rows)}


def ingest_images(workspace: str, recipe: tyro.conf.Suppress[str], images: ImagesConfig) -> None:
    """Read the real images and write them into <workspace>/images.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    source = open_source(images)
    labels = source.labels
    names = "\n".join(getattr(source, "names", ()))
    plan = {
        "images": to_dict(images)
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
    left = todo(stage.folder, stage.plan, len(labels), images.shard_size)
    progress = Progress("images", sum(len(shard_rows(k, images.shard_size, len(labels))) for k in left), "images")
    arguments = {"workspace": place, "plan": stage.plan, "config": images}
    for row in run_pool(ImageShards, arguments, left, PoolConfig()):
        progress.add(row["images"])
    stage.folder.clean()
    stage.finish(images=len(labels), shards=shard_count(len(labels), images.shard_size))


if __name__ == "__main__":
    run_command(ingest_images)
