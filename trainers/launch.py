"""The Ray Train shell around the loop: DDP ranks, checkpoints in the stage's folder, restarts after failures."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from beeline.config import WorkersConfig
from beeline.errors import BeelineError
from pipeline.command import ensure_ray
from pipeline.storage import Folder
from trainers import loop

CHECKPOINTS = "checkpoints"
STATE = "state.pt"


def launch(
    build: Callable[..., loop.Task],
    arguments: Mapping[str, Any],
    folder: Folder,
    *,
    workers: WorkersConfig,
    log_every: int,
    checkpoint_every: int,
) -> None:
    """Train `build(session=..., **arguments)` on `workers.count` ranks. Resumes from <folder>/checkpoints by itself.

    `build` is called in each rank, so it must be importable and its arguments picklable.
    """
    ensure_ray()
    trainer = ray.train.torch.TorchTrainer(
        _rank,
        train_loop_config={
            "build": build,
            "arguments": dict(arguments),
            "folder": folder,
            "threads": workers.threads,
            "log_every": log_every,
            "checkpoint_every": checkpoint_every,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.threads} | ({"GPU": workers.gpus} if workers.gpus else {}),
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            **ray_storage(folder),
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()


def check_batch(batch_size: int, workers: WorkersConfig, accumulate: int = 1) -> None:
    """Raise BeelineError unless every rank gets the same share of the batch, in `accumulate` equal parts."""
    if batch_size % (workers.count * accumulate):
        raise BeelineError(
            f"batch size {batch_size} does not divide among {workers.count} workers"
            f"{f' in {accumulate} parts each' if accumulate > 1 else ''}; choose a multiple, or other workers"
        )


def ray_storage(folder: Folder) -> dict[str, Any]:
    """The arguments that make a RunConfig of Train or Tune keep its files in `folder`."""
    filesystem, path = folder.arrow()
    return {"storage_path": path, "storage_filesystem": filesystem}


def _rank(config: dict[str, Any]) -> None:
    # 1x1 convolutions: the two layouts hold the same numbers in the same order.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    restored = None
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            restored = torch.load(Path(directory) / STATE, weights_only=True)
    session = loop.Session(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
        folder=config["folder"],
        restored=restored,
        save=_save,
    )
    task = config["build"](session=session, **config["arguments"])
    loop.run(task, session, log_every=config["log_every"], checkpoint_every=config["checkpoint_every"])


def _save(step: int, figures: dict[str, float], state: loop.State | None) -> None:
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = None
        if state is not None:
            torch.save(state, os.path.join(directory, STATE))
            checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_dir_name=f"step-{step:08d}")
