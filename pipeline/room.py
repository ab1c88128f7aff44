"""Whether this machine can ever start the processes that a stage asks for: Ray would wait for them without a word."""

from __future__ import annotations

import os

import ray

from beeline.errors import BeelineError


def check_room(stage: str, processes: int, *, cpus: float, gpus: float) -> None:
    """Raise BeelineError where a Ray of our own has too few CPUs or GPUs for `processes` of `stage` at once, each with `cpus`
    and `gpus`. A cluster (RAY_ADDRESS) may grow: there nothing is refused."""
    if os.environ.get("RAY_ADDRESS"):
        return
    there = ray.cluster_resources()
    for kind, each in (("CPU", cpus), ("GPU", gpus)):
        if processes * each > there.get(kind, 0) + 1e-6:
            raise BeelineError(
                f"{stage} asks for {processes} x {each:g} {kind} at once, and Ray on this machine has "
                f"{there.get(kind, 0):g}: it would wait for more without end. Ask for fewer, or join a cluster (RAY_ADDRESS)"
            )
