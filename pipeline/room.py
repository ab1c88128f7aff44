"""Check that this machine can start the processes a stage asks for; Ray would wait for them silently."""

from __future__ import annotations

import os

import ray

from beeline.errors import BeelineError


def check_room(stage: str, processes: int, *, cpus: float, gpus: float) -> None:
    """Raise BeelineError if a local Ray has too few CPUs or GPUs for `processes` of `stage` at once, each with `cpus` and
    `gpus`.

    A cluster (RAY_ADDRESS) may grow, so nothing is refused there.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    available = ray.cluster_resources()
    for kind, needed in (("CPU", cpus), ("GPU", gpus)):
        if processes * needed > available.get(kind, 0) + 1e-6:
            raise BeelineError(
                f"{stage} asks for {processes} x {needed:g} {kind} at once, but Ray on this machine has "
                f"{available.get(kind, 0):g} and would wait forever. Ask for fewer, or join a cluster (RAY_ADDRESS)"
            )
