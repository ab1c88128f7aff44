"""Metrics of a set of images: Beeline against torch-fidelity's `calculate_metrics`, on the same images, weights and machine.

    python -m benchmarks.evaluation                        # 1,000 images against 1,000, about 6 minutes on two cores
    python -m benchmarks.evaluation --images 10000 --device cuda

- whole: seconds for FID, IS, KID, precision and recall of one set against another, end to end. Inception's weights are random,
  because speed and rounding do not depend on them. The metrics of both are compared as well.
- looking and distance: the two slowest parts, timed separately: computing features, and the Fréchet distance.
- scaling: images/s through Ray with 1 actor and with one per core or GPU, while computing features of real images.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beeline.config import EvaluateConfig
from beeline.features.measuring import Eye, Inception
from beeline.features.torchvision_shim import import_torchvision
from beeline.metrics.frechet import Statistics, frechet_distance
from beeline.metrics.measures import Reference, counted, measures
from beeline.weights import dump_backbone
from benchmarks.machine import describe, synchronize, write
from evaluation.bench import Bench, Setup
from evaluation.jobs import RealImages
from evaluation.reference import groups
from pipeline.pool import run_pool
from pipeline.runtime import ensure_ray
from pipeline.shards import encode, shard_count, shard_name, shard_rows
from pipeline.storage import Folder

THEIRS = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "is": "inception_score_mean",
    "precision": "precision",
    "recall": "recall",
}
SCALING_SHARD = 32


class Pictures(torch.utils.data.Dataset[torch.Tensor]):
    """uint8 images (3, 32, 32): noisy waves of random frequencies and colours; `seed` shifts both."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        grid = torch.linspace(0, 1, 32)
        frequency = (3 + 2 * seed) * torch.rand(count, 3, 1, 1, generator=generator)
        waves = torch.sin(6.28 * (frequency * grid + frequency.flip(1) * grid[:, None]) + seed)
        noisy = waves + 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
        self.images = (noisy.clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images[i]


def random_inception() -> Inception:
    """Build Inception with random weights whose features neither vanish nor explode."""
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network


def timed_once(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Return the result of a call and its seconds. Not repeated, because a call takes minutes."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - start


def whole(network: Inception, count: int, device: torch.device) -> dict[str, Any]:
    """Run the benchmark "whole" (see the module's docstring), with the two slowest parts."""
    import_torchvision()
    import torch_fidelity
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    fake, real = Pictures(count, 0), Pictures(count, 1)
    subset = min(1000, count)
    seconds: dict[str, dict[str, float]] = {"torch_fidelity": {}, "beeline": {}}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "inception.pth"
        torch.save(network.network.state_dict(), weights)
        theirs, seconds["torch_fidelity"]["whole"] = timed_once(
            lambda: torch_fidelity.calculate_metrics(
                input1=fake, input2=real, cuda=device.type == "cuda", cache=False, verbose=False, fid=True, isc=True, kid=True,
                prc=True, kid_subset_size=subset, feature_extractor="inception-v3-compat",
                feature_extractor_weights_path=str(weights),
            ),
            device,
        )  # fmt: skip

    def ours() -> dict[str, float]:
        start = time.perf_counter()
        eye = Eye(network, device)
        seen, true = eye.look(fake.images), eye.look(real.images)
        synchronize(device)
        seconds["beeline"]["looking"] = time.perf_counter() - start
        reference = Reference(Statistics.of(true.features), true.features, np.arange(count))
        features.extend([seen.features, true.features])
        return measures(seen, reference, "inception", neighbours=count)

    features: list[np.ndarray] = []
    values, seconds["beeline"]["whole"] = timed_once(ours, device)
    a, b = (torch.from_numpy(part.astype(np.float64)) for part in features)
    _, seconds["torch_fidelity"]["distance"] = timed_once(
        lambda: fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False), device
    )
    _, seconds["beeline"]["distance"] = timed_once(
        lambda: frechet_distance(Statistics.of(features[0]), Statistics.of(features[1])), device
    )
    figures = {
        name: {"torch_fidelity": theirs[key], "beeline": values[counted(name, count)]}
        for name, key in THEIRS.items()
        if counted(name, count) in values
    }
    for value in figures.values():
        value["relative_difference"] = value["beeline"] / value["torch_fidelity"] - 1
    return {
        "images": [count, count],
        "seconds": seconds,
        "ratio": seconds["torch_fidelity"]["whole"] / seconds["beeline"]["whole"],
        "images_per_second": 2 * count / seconds["beeline"]["looking"],
        "figures": figures,
    }


def scaling(network: Inception, count: int, actors: int, gpus: float) -> dict[str, Any]:
    """Run the benchmark "scaling": images/s between the first finished shard and the last."""
    with tempfile.TemporaryDirectory() as directory:
        place, config = Folder(directory), {"count": count, "shard_size": SCALING_SHARD}
        for name, data in dump_backbone(network, {"source": "random"}).items():
            (place / "weights/inception").write(name, data)
        images = Pictures(count, 0).images.numpy()
        for k in range(shard_count(count, SCALING_SHARD)):
            rows = shard_rows(k, SCALING_SHARD, count)
            labels = np.full(len(rows), -1, np.int32)
            (place / "images").write(shard_name(k), encode("image", images[rows.start : rows.stop], labels, rows, {}))
        rates = {}
        for pool in sorted({1, actors}):
            evaluate = EvaluateConfig(features=("inception",), min_actors=pool, max_actors=pool, gpus=gpus, cpus=0.5, threads=1)
            setup = Setup(
                workspace=place, recipe="", config=evaluate, images={"images": config}, pairs=None, count=count
            )  # fmt: skip
            jobs = [RealImages("inception", group) for group in range(len(groups(config)))]
            rows = run_pool(Bench, {"setup": setup, "jobs": jobs}, range(len(jobs)), evaluate, name="evaluation")
            at = [time.perf_counter() for _ in rows]
            rates[pool] = SCALING_SHARD * (len(at) - pool) / (at[-1] - at[pool - 1])
        return {"images": count, "images_per_second": rates, "speedup": rates[actors] / rates[1], "actors": actors}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="images in each of the two sets")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--scaling-images", type=int, default=1024, help="images for the benchmark of scaling; 0 skips it, and Ray"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    result: dict[str, Any] = {"machine": describe(device)}
    network = random_inception()
    result["whole"] = whole(network, arguments.images, device)
    print(result["whole"], flush=True)
    if arguments.scaling_images:
        ensure_ray()
        on_gpu = device.type == "cuda"
        actors = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
        result["scaling"] = scaling(network, arguments.scaling_images, actors, float(on_gpu))
        print(result["scaling"], flush=True)
    write(f"evaluation-{device.type}", result, arguments.out)


if __name__ == "__main__":
    main()
