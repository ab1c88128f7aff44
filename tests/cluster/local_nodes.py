"""A provider for Ray's autoscaler whose machines are raylets on this machine: separate processes with separate loopback
addresses, by which the autoscaler distinguishes them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

HEAD = "127.0.0.1"


class LocalNodes(NodeProvider):
    """Nodes by their address. `provider_config`: "address" of the head, and a "folder" for a log and a file with the process id
    of each node, so that a test can kill one."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._lock, self._started = threading.RLock(), 0
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._tags: dict[str, dict[str, str]] = {
            HEAD: {
                TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
                TAG_RAY_USER_NODE_TYPE: "head",
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
        }

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self._lock:
            for node, process in list(self._processes.items()):
                if process.poll() is not None:  # its machine is gone
                    del self._processes[node], self._tags[node]
            return [node for node, tags in self._tags.items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        return node_id in self._tags

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self._tags

    def node_tags(self, node_id: str) -> dict[str, str]:
        return self._tags[node_id]

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self._tags[node_id].update(tags)

    def external_ip(self, node_id: str) -> str:
        return node_id

    def internal_ip(self, node_id: str) -> str:
        return node_id

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        raise AssertionError("the autoscaler knows what resources a node has")

    def create_node_with_resources_and_labels(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int, resources: dict[str, float], labels: dict[str, str]
    ) -> None:
        folder = Path(self.provider_config["folder"])
        for _ in range(count):
            with self._lock:
                self._started += 1
                node = f"127.0.0.{self._started + 1}"
            command = [
                str(Path(sys.executable).parent / "ray"), "start", "--block", f"--address={self.provider_config['address']}",
                f"--node-ip-address={node}", f"--num-cpus={int(resources['CPU'])}", "--object-store-memory=80000000",
                "--disable-usage-stats", "--dashboard-agent-listen-port=0",
            ]  # fmt: skip
            environment = os.environ | {"RAY_CLOUD_INSTANCE_ID": node, "RAY_NODE_TYPE_NAME": tags[TAG_RAY_USER_NODE_TYPE]}
            environment.pop("RAY_ADDRESS", None)
            with open(folder / f"{node}.log", "wb") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            (folder / f"{node}.json").write_text(json.dumps({"pid": process.pid}))
            # One after the other: nodes that start at the same time on one machine take each other's sockets.
            while process.poll() is None and "Ray runtime started" not in (folder / f"{node}.log").read_text():
                time.sleep(0.1)
            with self._lock:
                self._processes[node] = process
                self._tags[node] = dict(tags) | {TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}

    def terminate_node(self, node_id: str) -> None:
        with self._lock:
            process = self._processes.pop(node_id, None)
            self._tags.pop(node_id, None)
        if process is not None:
            process.send_signal(signal.SIGTERM)

    def safe_to_scale(self) -> bool:
        return True
