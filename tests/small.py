"""A workspace made in this process, without Ray: images, probes, a teacher and a student with random weights, pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured import finished

from beeline import noise
from beeline.checkpoint import build, dump
from beeline.config import NetworkConfig, PairsConfig, ProbeNetworkConfig
from beeline.features.probe import Probe
from beeline.labels import pair_labels
from beeline.sampling.few_step import FewStep
from pipeline.gen_pairs import make_pairs, plan_of
from pipeline.model_folders import require_model
from pipeline.shards import encode, shard_count, shard_name, shard_rows
from pipeline.stage import PLAN
from pipeline.storage import Folder

CLASSES, COUNT, SHARD = 4, 48, 16
NETWORK = NetworkConfig(
    kind="ddpmpp", img_resolution=8, img_channels=1, label_dim=CLASSES, model_channels=16, channel_mult=(1,), num_blocks=1,
    attn_resolutions=(8,),
)  # fmt: skip
PAIRS = PairsConfig(count=COUNT, shard_size=SHARD, batch_size=SHARD, num_steps=4, seed=3)
FEW_STEP = FewStep(num_steps=4)


def workspace(path: Path, network: NetworkConfig = NETWORK) -> Folder:
    """Write the workspace in `path`, with all stages finished."""
    place = Folder(str(path))
    write_images(place, network)
    write_models(place, network)
    write_pairs(place)
    return place


def write_images(place: Folder, network: NetworkConfig) -> None:
    """Write images/: COUNT random pictures in three shards."""
    channels, side = network.img_channels, network.img_resolution
    config = {"count": COUNT, "shard_size": SHARD, "num_classes": CLASSES, "resolution": side, "channels": channels}
    plan, chance, files = {"images": config}, np.random.default_rng(0), {}
    for k in range(shard_count(COUNT, SHARD)):
        rows = shard_rows(k, SHARD, COUNT)
        pixels = chance.integers(0, 256, (len(rows), channels, side, side), dtype=np.uint8)
        files[shard_name(k)] = encode("image", pixels, np.asarray(rows, np.int32) % CLASSES, rows, plan)
    finished(place, "images", plan, files)


def write_models(place: Folder, network: NetworkConfig) -> None:
    """Write probe/losses, probe/measure, teacher and students/lmm."""
    torch.manual_seed(0)
    losses = ProbeNetworkConfig(widths=(8, 12), strides=(1, 2))
    for which, config in (("losses", losses), ("measure", dataclasses.replace(losses, activation="gelu"))):
        probe = Probe(config, channels=network.img_channels, num_classes=CLASSES)
        finished(place, f"probe/{which}", {}, dump(probe, {}))
    finished(place, "probe", {}, {})
    model = build(network)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    finished(place, "teacher", {}, dump(model, {}))
    model.few_step = FEW_STEP
    finished(place, "students/lmm", {}, dump(model, {}))


def write_weak(place: Folder, network: NetworkConfig = NETWORK) -> None:
    """Write students/weak, a model with other weights than the teacher."""
    model = build(network)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1, generator)
    finished(place, "students/weak", {}, dump(model, {}))


def write_pairs(place: Folder, config: PairsConfig = PAIRS) -> None:
    """Write pairs/ of the teacher."""
    teacher, teacher_digest = require_model(place, "teacher", "digits")
    plan, files = plan_of(config, teacher, teacher_digest, None), {}
    for k in range(shard_count(config.count, config.shard_size)):
        rows = shard_rows(k, config.shard_size, config.count)
        z, labels = noise.unit_noise(config.seed, rows, teacher.image_shape), pair_labels(rows, teacher.label_dim)
        x1 = make_pairs(teacher, z, labels, config)
        files[shard_name(k)] = encode("x1", x1, labels, rows, plan, x0_crc32=noise.crc32(z))
    finished(place, "pairs", plan, files)


def plans(place: Folder) -> dict[str, Any]:
    """Return the plans of pairs/ and images/, as commands pass them on."""
    return {name: (place / name).read_json(PLAN) for name in ("pairs", "images")}
