"""What stages ask of machines, and what a running Ray cluster has: as its head tells it, without joining it."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray._raylet
from ray._common.usage.usage_lib import get_cluster_metadata
from ray.core.generated.autoscaler_pb2 import ClusterConfig  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import RayError

from beeline.config import PoolConfig, Recipe
from beeline.errors import BeelineError, plain
from cluster.planning.workspace import Workspace
from pipeline.runtime import find_head
from trainers.trials import can_vary

TIMEOUT = 5  # seconds
_raylet: Any = ray._raylet
UNBOUNDED = 1_000_000  # nodes, where an autoscaler knows no limit


@dataclasses.dataclass(frozen=True)
class Node:
    """What a node offers; `count` of them."""

    cpus: float
    gpus: float
    count: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Nodes that are there, and nodes that an autoscaler says it may bring beside them."""

    nodes: list[Node]
    promised: list[Node] = dataclasses.field(default_factory=list)
    versions: str = ""
    mismatch: str = ""
    """What to do where the driver's versions are not the cluster's; "" where they are."""

    def __str__(self) -> str:
        text = f"{len(self.nodes)} node{'s' * (len(self.nodes) != 1)} with {sum(node.cpus for node in self.nodes):g} CPUs"
        text += f" and {sum(node.gpus for node in self.nodes):g} GPUs"
        if self.promised:
            more = ", ".join(
                f"{'any number' if node.count == UNBOUNDED else node.count} of {node.gpus:g} GPUs, {node.cpus:g} CPUs"
                for node in self.promised
            )
            text += f"; its autoscaler may make it {more}"
        return text


def look_at_cluster(address: str) -> Surroundings:
    """What RAY_ADDRESS leads to. Raises BeelineError where nobody answers within seconds."""
    place = find_head(address)
    try:
        client = _raylet.GcsClient(address=place)
        alive, end = {}, time.monotonic() + TIMEOUT
        while not alive and time.monotonic() < end:  # a head that has just been started does not know itself yet
            alive = client.get_all_node_info(timeout=TIMEOUT, state_filter=GcsNodeInfo.GcsNodeState.ALIVE)
            time.sleep(0 if alive else 0.2)
        about = get_cluster_metadata(client)
        key, space = (
            text.encode() for text in (_raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, _raylet.GCS_AUTOSCALER_STATE_NAMESPACE)
        )
        told = client.internal_kv_get(key, namespace=space, timeout=TIMEOUT)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise BeelineError(f"the Ray cluster at {address} does not answer ({plain(error)})") from error
    if not alive:
        raise BeelineError(f"the head at {address} answers, but it has no node: it has just been started, or is about to end")
    nodes = [Node(_of(node.resources_total, "CPU"), _of(node.resources_total, "GPU")) for node in alive.values()]
    theirs = f"Ray {about['ray_version']}, Python {about['python_version']}"
    ours = f"Ray {ray.__version__}, Python {platform.python_version()}"
    fix = "" if theirs == ours else f"The cluster has {theirs}: install the same on both sides, or submit the command as a job"
    promised = _promised(ClusterConfig.FromString(told)) if told else []
    return Surroundings(nodes=nodes, promised=promised, versions=f"{ours} here{'' if fix else ' and there'}", mismatch=fix)


def _promised(config: Any) -> list[Node]:
    """The largest number of each kind of node, those that run already among them."""
    groups = [(group.resources, group.max_count) for group in config.node_group_configs]
    return [
        Node(_of(resources, "CPU"), _of(resources, "GPU"), count if count > 0 else UNBOUNDED)
        for resources, count in groups
        if count
    ]


def _of(resources: Any, name: str) -> float:
    return float(resources[name]) if name in resources else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """Processes of a stage: `least` must run at once, `most` may, with `gpus` and `cpus` each. `option` says how many."""

    stage: str
    option: str
    least: int
    most: int
    gpus: float
    cpus: float


def needs(recipe: Recipe, there: Workspace, teacher: str) -> Iterator[Need]:
    """What each stage that is left asks of machines."""

    def pool(name: str, section: str, config: PoolConfig) -> Need:
        least, most = config.min_actors, config.max_actors
        return Need(stage=name, option=f"--{section}.gpus", least=least, most=most, gpus=config.gpus, cpus=config.cpus)

    if not there.complete("images"):
        yield pool("images", "images", recipe.images)
    if not there.complete("probe"):
        yield Need(stage="probe", option="--probe.gpus", least=1, most=2, gpus=recipe.probe.gpus, cpus=1)
    trained = [("teacher", recipe.teacher.workers)] * (teacher == "train")
    for name, workers in [*trained, *((f"students/{lmm.name}", lmm.workers) for lmm in recipe.students.values())]:
        if not there.complete(name):
            least = workers.min_count or workers.count
            option = f"--{name.replace('/', '.')}.workers.count"
            yield Need(stage=name, option=option, least=least, most=workers.count, gpus=workers.gpus, cpus=workers.threads)
    if not there.complete("pairs"):
        yield pool("pairs", "pairs", recipe.pairs)
    sweep = recipe.sweep
    if can_vary(recipe.main):
        side = sweep.max_concurrent or sweep.trials
        yield Need(stage=f"sweeps/{sweep.name}", option="--sweep.gpus", least=1, most=side, gpus=sweep.gpus, cpus=sweep.threads)
    yield pool("evaluation", "evaluate", recipe.evaluate)


def alike(asked: Sequence[Need]) -> list[Need]:
    """Stages that ask for the same, as one."""
    found: dict[tuple[float, ...], list[Need]] = {}
    for need in asked:
        found.setdefault((need.least, need.gpus, need.cpus), []).append(need)
    return [
        dataclasses.replace(
            same[0], stage=", ".join(need.stage for need in same), option=" ".join(need.option for need in same)
        )
        for same in found.values()
    ]


def fitting(need: Need, node: Node) -> int:
    """Processes that have room on an empty node."""
    rooms = [have / want for have, want in ((node.gpus, need.gpus), (node.cpus, need.cpus)) if want]
    return math.floor(min(rooms, default=need.least) + 1e-9)
