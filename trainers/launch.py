"""The Ray Train shell around the loop: DDP ranks, restarted after failures from the newest intact checkpoint.

Ray's own checkpoint store is not used: it does not retry uploads, and one damaged snapshot in it ends every later run.
Ray gets a temporary folder on the driver's machine and writes only an empty marker there.
"""

from __future__ import annotations

import functools
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.callback import RayTrainCallback

from beeline.config import WorkersConfig
from beeline.errors import BeelineError, StorageError
from beeline.numerics import set_numerics
from pipeline import prometheus
from pipeline.room import check_room
from pipeline.runtime import ensure_ray
from pipeline.storage import Folder
from trainers import checkpoints, loop
from trainers.tracking import Tracker, open_trackers


def launch(
    build: Callable[..., loop.Task],
    arguments: Mapping[str, Any],
    folder: Folder,
    *,
    name: str,
    workers: WorkersConfig,
    cadence: loop.Cadence,
    tracking: Mapping[str, Any] | None = None,
) -> None:
    """Train `build(session=..., **arguments)` on `workers.count` ranks. Continues from <folder>/checkpoints.

    `build` is called in each rank, so it must be importable and its arguments picklable. Ray's dashboard and the metrics show
    the run as `name`. `tracking` holds the arguments of `open_trackers`. Killed ranks are restarted up to
    `workers.max_failures` times. A BeelineError in a rank ends the training, except a StorageError, which may be temporary.
    When Ray announces that a machine will leave, the ranks save a checkpoint and restart without it; this is not a failure.
    """
    ensure_ray()
    check_room(name, workers.min_count or workers.count, cpus=workers.threads, gpus=workers.gpus)
    count = (workers.min_count, workers.count) if workers.min_count else workers.count
    config = {
        "build": build,
        "name": name,
        "arguments": dict(arguments),
        "folder": folder,
        "threads": workers.threads,
        "cadence": cadence,
        "tracking": tracking,
    }
    with tempfile.TemporaryDirectory(prefix="beeline-train-") as scratch:
        finished = False
        while not finished:
            trainer = _Trainer(
                _rank,
                train_loop_config=config,
                scaling_config=ray.train.ScalingConfig(
                    num_workers=count,
                    use_gpu=workers.gpus > 0,
                    resources_per_worker={"CPU": workers.threads} | ({"GPU": workers.gpus} if workers.gpus else {}),
                ),
                run_config=ray.train.RunConfig(
                    name=name.replace("/", "-"),  # also the name of a folder
                    storage_path=scratch,
                    failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
                    callbacks=[FinalErrors()],
                    logging_config=ray.train.LoggingConfig(log_level="WARNING"),
                ),
            )
            finished = bool(trainer.fit().return_value)
            if not finished:
                print("training: a machine is about to leave; continuing on the others", flush=True)


class _Trainer(ray.train.torch.TorchTrainer):
    """Leaves Ctrl-C to the command (beeline/entry.py): Ray's own handler would end this process with status 1."""

    def _register_sigint_handler(self, controller: Any) -> None: ...

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        # Ray's cleaner of placement groups is a detached actor. In Ray 2.60 it never ends once the driver is killed, because it
        # calls exit_actor in a thread. It is not needed: placement groups end with their job.
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


class FinalErrors(ray.train.UserCallback):
    """Makes user errors fail at once: Ray Train retries every exception."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, BeelineError) and not isinstance(error, StorageError):
                raise ray.train.ControllerError(error)


def check_batch(batch_size: int, workers: WorkersConfig, accumulate: int = 1) -> None:
    """Raise BeelineError unless every rank gets the same share of the batch, in `accumulate` equal parts."""
    if batch_size % (workers.count * accumulate):
        raise BeelineError(
            f"batch size {batch_size} does not divide among {workers.count} workers"
            f"{f' in {accumulate} parts each' if accumulate > 1 else ''}; choose a multiple of "
            f"{workers.count * accumulate}, or another number of workers"
        )


def _rank(config: dict[str, Any]) -> bool:
    # Harmless for 1x1 convolutions: both layouts hold the same numbers in the same order.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    set_numerics()
    logging.getLogger("ray.train.v2._internal.util").addFilter(_is_news)
    torch.set_num_threads(config["threads"])
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank = context.get_world_rank()
    trackers: list[Tracker] = [prometheus.TrainingGauges(config["name"])] if rank == 0 else []
    if rank == 0 and config["tracking"]:
        trackers += open_trackers(**config["tracking"], resumed=bool(checkpoints.steps(config["folder"])))
    session = loop.Session(
        rank=rank,
        world_size=context.get_world_size(),
        device=device,
        folder=config["folder"],
        leaving=lambda: ray.train.get_preemption_info() is not None,
        trackers=trackers,
    )
    newest = functools.partial(_newest, config["folder"], rank, device)
    return loop.train(
        lambda session: config["build"](session=session, **config["arguments"]), session, config["cadence"], newest
    )


def _is_news(record: logging.LogRecord) -> bool:
    """False for a user error that Ray Train logs: the command prints it in one line."""
    return not isinstance(sys.exc_info()[1], BeelineError)


def _newest(folder: Folder, rank: int, device: torch.device, refused: Collection[int]) -> tuple[int, loop.State] | None:
    """`checkpoints.newest`, with the same result on all ranks: rank 0 chooses the step."""
    newest = checkpoints.newest(folder, refused) if rank == 0 else None
    chosen: list[int | None] = [newest[0] if newest else None]
    torch.distributed.broadcast_object_list(chosen, src=0, device=device)
    (step,) = chosen
    return (step, checkpoints.load(folder, step)) if rank and step is not None else newest
