"""Train the two probes into probe/: small classifiers of the real images, one for the losses and one for measuring.

python trainers/train_probe.py digits
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import ray
import torch
import tyro

from beeline.checkpoint import dump
from beeline.config import ProbeConfig, ProbeNetworkConfig, to_dict
from beeline.errors import BeelineError
from beeline.features.probe import Probe, train_probe
from beeline.files.names import IMAGES, PROBE
from beeline.networks.buildable import check_probe
from beeline.noise import stream_seed
from beeline.numerics import set_numerics
from beeline.pixels import to_float
from pipeline.command import run_command
from pipeline.model_folders import publish_model
from pipeline.reader import some_images
from pipeline.room import check_room
from pipeline.runtime import ensure_ray
from pipeline.stage import Stage, fingerprint, require
from pipeline.storage import Folder

PROBES = ("losses", "measure")
MOST_IMAGES = 100_000  # enough for a probe, and all of them are held in memory
FEWEST_IMAGES = 10


def train_probes(workspace: str, recipe: tyro.conf.Suppress[str], probe: ProbeConfig) -> None:
    """Train both probes on <workspace>/images.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    place = Folder(workspace)
    images = require(place, IMAGES, recipe)
    if images["images"]["num_classes"] == 0:
        raise BeelineError(f"{place / 'images'} has no labels; a probe is a classifier and needs them")
    if images["images"]["count"] < FEWEST_IMAGES:
        raise BeelineError(
            f"{place / 'images'} holds {images['images']['count']} images; a probe needs at least {FEWEST_IMAGES}, since one "
            "in ten is held out to test it. Ingest more images, or train with the distance l2, which needs no probe"
        )
    for which in PROBES:
        network, classes = getattr(probe, which), images["images"]["num_classes"]
        check_probe(f"probe.{which}", network, channels=images["images"]["channels"], num_classes=classes)
    stage = Stage(place, PROBE, {"probe": to_dict(probe, resources=False), "images": fingerprint(images)})
    if not stage.begin():
        return
    ensure_ray()
    check_room("probe", 1, cpus=1, gpus=probe.gpus)
    try:
        files, accuracies = _train_both(place, probe, images)
    except Exception:  # a failed training keeps nothing: free the folder for other settings
        stage.withdraw()
        raise
    for which in PROBES:
        publish_model(place / PROBE / which, files[which])
    stage.finish(accuracies=accuracies, iterations=len(PROBES) * probe.iterations)


def _train_both(place: Folder, config: ProbeConfig, images: dict) -> tuple[dict[str, dict[str, bytes]], dict[str, float]]:
    """Train both probes in parallel. Returns the files and the held-out accuracy of each."""
    remote = ray.remote(num_cpus=1, num_gpus=config.gpus)(_train)
    jobs = {
        which: remote.options(name=f"probe/{which}").remote(place, getattr(config, which), config, images) for which in PROBES
    }
    files, accuracies = {}, {}
    for which, job in jobs.items():
        files[which], accuracies[which] = ray.get(job)
        print(f"probe: {which}, held-out accuracy {accuracies[which]:.3f}", flush=True)
        if not accuracies[which] >= config.min_accuracy:  # also refuses NaN, from weights that are not finite
            raise BeelineError(
                f"the {which} probe reached a held-out accuracy of {accuracies[which]:.3f}, expected at least "
                f"{config.min_accuracy}; train it longer (--probe.iterations) or with a lower --probe.lr, or lower "
                "--probe.min-accuracy"
            )
    return files, accuracies


def _train(workspace: Folder, network: ProbeNetworkConfig, config: ProbeConfig, images: dict) -> tuple[dict[str, bytes], float]:
    set_numerics()
    torch.set_num_threads(1)
    device = torch.device("cuda" if config.gpus else "cpu")
    torch.manual_seed(stream_seed(network.seed, "probe"))
    pixels, labels = some_images(workspace / IMAGES, images["images"], MOST_IMAGES)
    probe = Probe(network, channels=pixels.shape[1], num_classes=images["images"]["num_classes"])
    probe.to(device)
    accuracy = train_probe(
        probe,
        torch.from_numpy(to_float(pixels)).to(device),
        torch.from_numpy(labels).to(device, torch.int64),
        iterations=config.iterations,
        batch_size=config.batch_size,
        lr=config.lr,
        seed=network.seed,
    )
    return dump(probe, {"held_out_accuracy": accuracy}), accuracy


if __name__ == "__main__":
    run_command(train_probes)
