"""Sample the teacher into pairs/: an actor pool makes noise-image pairs, one task and one Parquet file per shard.

    python pipeline/gen_pairs.py digits --pairs.count 20000
    python pipeline/gen_pairs.py digits --pairs.model students/rf --pairs.num-steps 8     # reflow: pairs of a rectified flow

Kill it at any moment and run it again: no pair is lost or made twice, and the files are the same, byte for byte.
docs/pair-store.md describes the format; `python pipeline/verify_pairs.py digits` checks every file.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import functools
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import tyro

from beeline.checkpoint import SOLVER, WEIGHTS, digest_of, solver_levels
from beeline.config import PairsConfig, to_dict
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.files.names import TEACHER, pairs_folder
from beeline.labels import pair_labels
from beeline.noise import X0_GENERATOR, crc32, unit_noise
from beeline.pixels import rounded
from beeline.sampling import Sampling, batches, sample_from
from beeline.sampling.inference import prepare
from beeline.sampling.solvers import evaluations
from beeline.schedule import edm_sigmas
from pipeline import storage
from pipeline.command import run_command
from pipeline.manifest import Manifest
from pipeline.model_folders import require_model
from pipeline.pool import run_pool
from pipeline.progress import Progress
from pipeline.shards import MAX_SHARD_BYTES, encode, shard_count, shard_name, shard_rows, survey
from pipeline.stage import Stage
from pipeline.storage import Folder

CONTACT = "contact.png"  # drawn by verify_pairs.py


def make_pairs(model: Denoiser, noise: np.ndarray, labels: np.ndarray, config: PairsConfig) -> np.ndarray:
    """Sample x1 (n, C, H, W) float32 from unit-variance `noise` (n, C, H, W) and classes `labels` (n,).

    The ODE solver adds no noise of its own (no churn; lmm.md, section Pairs).
    """
    device, parts = next(model.parameters()).device, []
    sampling = Sampling(solver=config.solver, num_steps=config.num_steps)
    for batch in batches(len(noise), config.batch_size):
        rows = slice(batch.start, batch.stop)
        classes = torch.from_numpy(labels[rows]).to(device) if model.label_dim else None
        latents = torch.from_numpy(noise[rows]).to(device)
        parts.append(sample_from(model, latents, classes, sampling))
    return torch.cat(parts).cpu().numpy()


def maker(config: PairsConfig) -> str:
    """The model that makes the pairs, in messages."""
    return "the teacher" if config.model == TEACHER else config.model


def stored(x1: np.ndarray, dtype: str) -> np.ndarray:
    """Convert x1 to the dtype of the store; uint8 is the usual 8 bits per channel, clipped to [-1, 1]."""
    if dtype == "uint8":
        return rounded(x1)
    return x1.astype(dtype, copy=False)


def check_images(x1: np.ndarray, rows: range, config: PairsConfig, digest: str) -> None:
    """Raise BeelineError, naming the model, unless x1 (n, C, H, W) of the pairs `rows` is finite in its stored dtype."""
    largest = np.finfo(np.float16).max if config.dtype == "float16" else np.inf
    bad = ~(np.abs(x1) < largest).reshape(len(x1), -1).all(axis=1)
    if bad.any():
        name = maker(config)
        cure = "choose --pairs.precision bf16 or fp32" if config.precision == "fp16" else f"check {name}'s training"
        raise BeelineError(
            f"{name} (SHA-256 {digest[:12]}...) makes NaN or infinite images in precision {config.precision}: "
            f"{int(bad.sum()):,} of the pairs {rows[0]:,} to {rows[-1]:,}, the first is {rows[int(bad.argmax())]:,}. "
            f"Their shard is not stored; {cure}"
        )


def load_sampler(workspace: Folder, recipe: str, plan: dict[str, Any], config: PairsConfig) -> Denoiser:
    """Load the model for sampling by `plan`: its device (GPU if there is one), precision and noise levels."""
    model = require_model(workspace, config.model, recipe)[0].to("cuda" if torch.cuda.is_available() else "cpu")
    model.levels = tuple(plan["sigmas"])
    return prepare(
        model,
        precision=config.precision,
        compiled=config.compiled,
        batch_size=config.batch_size if config.compiled else None,
    )


class PairShards:
    """Samples the model that `load` returns and publishes shards of pairs.

    Called from several threads: while one shard is published, the next is sampled.
    """

    def __init__(self, folder: Folder, plan: dict[str, Any], config: PairsConfig, load: Callable[[], Denoiser]) -> None:
        self.folder, self.plan, self.config = folder, plan, config
        self.model = load()
        self._sampler = ThreadPoolExecutor(1, "sampler")  # one thread: CUDA graphs belong to the thread that made them
        self._idle_since = time.monotonic()

    def work(self, k: int) -> dict[str, Any]:
        """Make and publish shard k; return its manifest row."""
        rows = shard_rows(k, self.config.shard_size, self.config.count)
        (noise, x1, labels), row = self._sampler.submit(self._sample, rows).result()
        start, repeated = time.monotonic(), storage.retries()
        data = encode(
            "x1", stored(x1, self.config.dtype), labels, rows, self.plan,
            x0_generator=X0_GENERATOR, x0_crc32=crc32(noise),
        )  # fmt: skip
        self.folder.write(shard_name(k), data)
        return row | {
            "shard": k,
            "pairs": len(rows),
            "bytes": len(data),
            "crc32": zlib.crc32(data),
            "evaluations": len(rows) * self.plan["evaluations"],
            "published": round(time.time() * 1000),
            "writing_seconds": time.monotonic() - start,
            "retries": storage.retries() - repeated,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        }

    def _sample(self, rows: range) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], dict[str, float]]:
        start = time.monotonic()
        waited, labels = start - self._idle_since, pair_labels(rows, self.model.label_dim)
        noise = unit_noise(self.config.seed, rows, self.model.image_shape)
        x1 = make_pairs(self.model, noise, labels, self.config)
        check_images(x1, rows, self.config, self.plan["teacher_sha256"])
        self._idle_since = time.monotonic()
        return (noise, x1, labels), {"sampling_seconds": self._idle_since - start, "waiting_seconds": waited}


def calibrated_levels(teacher: Folder) -> tuple[float, ...]:
    """Read the noise levels from the teacher's solver.json. Raises BeelineError if none are stored for its weights."""
    try:
        return solver_levels(teacher.read(SOLVER), digest_of(teacher.read(WEIGHTS)), str(teacher))
    except FileNotFoundError as error:
        raise BeelineError(f"{teacher}/{SOLVER} is missing; make it with: python -m beeline.calibrate {teacher}") from error


def plan_of(config: PairsConfig, model: Denoiser, digest: str, levels: Sequence[float] | None) -> dict[str, Any]:
    """Build the plan of a store: everything its bytes depend on. Raises BeelineError if a shard would be too large, or for a
    student that no ODE solver can sample."""
    if model.few_step is not None:
        model.few_step.check_solver()
    pair_bytes = int(np.prod(model.image_shape)) * np.dtype(config.dtype).itemsize
    if config.shard_size * pair_bytes > MAX_SHARD_BYTES:
        raise BeelineError(
            f"a shard of {config.shard_size:,} pairs of {pair_bytes:,} bytes is over {MAX_SHARD_BYTES >> 20} MB; "
            f"expected at most --pairs.shard-size {MAX_SHARD_BYTES // pair_bytes}"
        )
    return {
        "pairs": to_dict(config, resources=False),
        "sigmas": list(levels) if levels else edm_sigmas(config.num_steps).tolist(),
        "evaluations": len(levels) if levels else evaluations("heun", config.num_steps),
        "shape": list(model.image_shape),
        "num_classes": model.label_dim,
        "teacher_sha256": digest,  # of the model that made the pairs
    }


def gen_pairs(workspace: str, recipe: tyro.conf.Suppress[str], pairs: PairsConfig) -> None:
    """Sample the teacher into <workspace>/pairs, or another model into <workspace>/<model>/pairs.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    place = Folder(workspace)
    model, digest = require_model(place, pairs.model, recipe)
    levels = calibrated_levels(place / pairs.model) if pairs.solver == "calibrated" else None
    stage = Stage(place, pairs_folder(pairs.model), plan_of(pairs, model, digest, levels))
    if not stage.begin():
        return
    found = survey(stage.folder, stage.plan, pairs.count, pairs.shard_size)
    manifest = Manifest(stage.folder, found.sizes)
    left = sum(len(shard_rows(k, pairs.shard_size, pairs.count)) for k in found.todo)
    print(
        f"{stage.name}: {len(found.sizes):,} of {shard_count(pairs.count, pairs.shard_size):,} shards exist "
        f"({sum(found.sizes.values()) / 1e9:.2f} GB); {left:,} of {pairs.count:,} pairs are left, "
        f"{stage.plan['evaluations']} evaluations each{_spent(manifest, pairs)}",
        flush=True,
    )
    load = functools.partial(load_sampler, place, recipe, stage.plan, pairs)
    arguments = {"folder": stage.folder, "plan": stage.plan, "config": pairs, "load": load}
    try:
        with Progress(stage.name, left, "pairs") as progress:
            for row in run_pool(PairShards, arguments, found.todo, pairs, name="pairs", overlap=True):
                manifest.add(row)
                progress.add(row["pairs"], _spent(manifest, pairs))
    finally:
        if manifest.rows:
            manifest.publish()
    sampling, waiting = manifest.total("sampling_seconds"), manifest.total("waiting_seconds")
    print(
        f"{stage.name}: {pairs.count:,} pairs, {manifest.total('bytes') / 1e9:.2f} GB; actors sampled {sampling:,.0f} s, "
        f"waited {waiting:,.0f} s, published {manifest.total('writing_seconds'):,.0f} s meanwhile, repeated "
        f"{manifest.total('retries'):,.0f} requests{_spent(manifest, pairs)}",
        flush=True,
    )
    stage.folder.clean()
    if CONTACT in stage.folder.sizes():  # drawn from an earlier state; _SUCCESS must not cover it
        stage.folder.remove(CONTACT)
    stage.finish(
        pairs=pairs.count,
        shards=len(manifest.rows),
        evaluations=stage.plan["evaluations"] * pairs.count,
        busy_seconds=round(sampling, 1),
        device_seconds=manifest.seconds_by_device(),
    )


def _spent(manifest: Manifest, config: PairsConfig) -> str:
    """Say what the store has cost so far: all runs together, as far as the manifest knows."""
    hours = (manifest.total("sampling_seconds") + manifest.total("waiting_seconds")) / 3600
    price = f" costing {hours * config.price:,.2f}" if config.price else ""
    return f"; {hours:.2f} actor-hours{price} so far" if hours else ""


if __name__ == "__main__":
    run_command(gen_pairs)
