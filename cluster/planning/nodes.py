"""Processes that stages request, and the nodes of a running Ray cluster, read from its head without joining it.

Ray's State API (ray.util.state) needs the dashboard and does not know which nodes an autoscaler may add. The head's tables do.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from typing import Any

import ray
import ray._raylet
from ray._common.usage.usage_lib import get_cluster_metadata
from ray.core.generated.autoscaler_pb2 import ClusterConfig  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import RayError

from beeline.errors import BeelineError, plain
from pipeline.runtime import find_head

TIMEOUT = 5  # seconds
_raylet: Any = ray._raylet
UNBOUNDED = 1_000_000  # nodes, if an autoscaler has no limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """Processes of a stage: `least` must run at once, `most` may. Each has `gpus`, Ray `cpus` and CPU `threads`. `option` is
    the setting that lowers the request."""

    stage: str
    option: str
    least: int
    most: int
    gpus: float
    cpus: float
    threads: int = 1

    def fitting(self, node: Node) -> int:
        """Number of processes that fit on an empty node."""
        rooms = [have / want for have, want in ((node.gpus, self.gpus), (node.cpus, self.cpus)) if want]
        return math.floor(min(rooms, default=self.least) + 1e-9)


@dataclasses.dataclass(frozen=True)
class Node:
    """CPUs and GPUs of a kind of node, and the number of such nodes."""

    cpus: float
    gpus: float
    count: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Running nodes, and the nodes that an autoscaler may run, which include those running now."""

    nodes: list[Node]
    promised: list[Node] = dataclasses.field(default_factory=list)
    versions: str = ""
    mismatch: str = ""
    """The fix if the driver's versions differ from the cluster's, else ""."""

    def __str__(self) -> str:
        text = f"{len(self.nodes)} node{'s' * (len(self.nodes) != 1)} with {sum(node.cpus for node in self.nodes):g} CPUs"
        text += f" and {sum(node.gpus for node in self.nodes):g} GPUs"
        more = [
            f"{'any number of' if node.count == UNBOUNDED else node.count} nodes with {node.gpus:g} GPUs, {node.cpus:g} CPUs"
            for node in self.promised
        ]
        return f"{text}; its autoscaler may scale it to {', '.join(more)}" if more else text


def look_at_cluster(address: str) -> Surroundings:
    """Find the nodes of the cluster at `address`, in the form of RAY_ADDRESS. Raises BeelineError if it does not answer within
    seconds."""
    place = find_head(address)
    try:
        client = _raylet.GcsClient(address=place)
        alive, end = {}, time.monotonic() + TIMEOUT
        while not alive and time.monotonic() < end:  # a head that has just started does not list itself yet
            alive = client.get_all_node_info(timeout=TIMEOUT, state_filter=GcsNodeInfo.GcsNodeState.ALIVE)
            time.sleep(0 if alive else 0.2)
        about = get_cluster_metadata(client)
        key, space = _raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(), _raylet.GCS_AUTOSCALER_STATE_NAMESPACE.encode()
        config = client.internal_kv_get(key, namespace=space, timeout=TIMEOUT)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise BeelineError(f"the Ray cluster at {address} does not answer ({plain(error)})") from error
    if not alive:
        raise BeelineError(f"the head at {address} answers, but it has no node: it has just started, or is about to stop")
    theirs = f"Ray {about['ray_version']}, Python {about['python_version']}"
    ours = f"Ray {ray.__version__}, Python {platform.python_version()}"
    fix = "" if theirs == ours else f"The cluster has {theirs}: install these here, or submit the command as a job"
    return Surroundings(
        nodes=[_node(info.resources_total) for info in alive.values()],
        promised=promised(ClusterConfig.FromString(config)) if config else [],
        versions=f"{ours} here{'' if fix else ' and there'}",
        mismatch=fix,
    )


def promised(config: Any) -> list[Node]:
    """The largest number of each kind of node in an autoscaler's ClusterConfig. A negative number means no limit."""
    groups = [(group.resources, group.max_count) for group in config.node_group_configs if group.max_count]
    return [_node(resources, count if count > 0 else UNBOUNDED) for resources, count in groups]


def _node(resources: Any, count: int = 1) -> Node:
    """A node with Ray's `resources`, by name."""
    cpus, gpus = (float(resources[name]) if name in resources else 0.0 for name in ("CPU", "GPU"))
    return Node(cpus, gpus, count)
