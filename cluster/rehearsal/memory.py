"""Peak memory of a stage's processes and of the GPUs, watched from outside, so that it is known even for stages that fail.
Linux only: process peaks come from /proc, GPU peaks from nvidia-smi."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

EVERY = 0.2  # seconds between samples
GPUS_EVERY = 5  # samples between two GPU samples: nvidia-smi takes about 50 ms
SMI = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")


@dataclasses.dataclass(frozen=True)
class Peak:
    """Peaks in MB: of the largest process, and of the fullest GPU (everything on it); None if unknown."""

    process: float | None
    gpu: float | None


class Watch:
    """Peaks on one node since `begin`, of the processes of one Ray job and, if it runs there, its driver."""

    def __init__(self, job: str, driver: int | None) -> None:
        self.mark = f"RAY_JOB_ID={job}".encode()
        self.ours: dict[int, bool] = {os.getpid(): False} | ({driver: True} if driver else {})
        self.process = self.gpu = 0.0
        self._lock = threading.Lock()
        threading.Thread(target=self._sample, daemon=True).start()

    def begin(self) -> None:
        """Reset all peaks."""
        with self._lock:
            self.process = self.gpu = 0.0
            for process in self._processes():
                with contextlib.suppress(OSError):
                    (process / "clear_refs").write_text("5")  # resets the kernel's own peak as well

    def end(self) -> tuple[float, float]:
        """Return MB of the largest process and the fullest GPU since `begin`; 0 if unknown."""
        with self._lock:
            self._look(gpus=True)
            return self.process, self.gpu

    def _sample(self) -> None:
        wait, count = threading.Event(), 0
        while not wait.wait(EVERY):
            count += 1
            with self._lock:
                self._look(gpus=count % GPUS_EVERY == 0)

    def _look(self, *, gpus: bool) -> None:
        for process in self._processes():
            with contextlib.suppress(OSError, IndexError, ValueError):
                line = (process / "status").read_text().split("VmHWM:")[1]
                self.process = max(self.process, int(line.split()[0]) / 1024)
        if gpus and shutil.which(SMI[0]):
            with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
                output = subprocess.run(SMI, capture_output=True, text=True, timeout=10, check=True).stdout
                self.gpu = max(self.gpu, *map(float, output.split()))

    def _processes(self) -> Iterator[Path]:
        """List the driver and the job's workers, which have the job's number in their environment."""
        running = {int(path.name): path for path in Path("/proc").iterdir() if path.name.isdigit()}
        self.ours = {pid: ours for pid, ours in self.ours.items() if pid in running}
        for pid, path in running.items():
            if pid not in self.ours:
                with contextlib.suppress(OSError):
                    self.ours[pid] = self.mark in (path / "environ").read_bytes().split(b"\0")
            if self.ours.get(pid):
                yield path


class Memory:
    """Memory watches on every node of the cluster that this process has joined."""

    def __init__(self) -> None:
        self._watches: dict[str, Any] = {}

    def begin(self) -> None:
        """Start watching a stage."""
        alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        for node in alive:
            if node not in self._watches:
                where = NodeAffinitySchedulingStrategy(node, soft=False)
                remote: Any = ray.remote(num_cpus=0)(Watch)
                me = ray.get_runtime_context()
                driver = os.getpid() if node == me.get_node_id() else None
                options = {"name": f"memory/{node[:8]}", "scheduling_strategy": where}
                self._watches[node] = remote.options(**options).remote(me.get_job_id(), driver)
        self._watches = {node: watch for node, watch in self._watches.items() if node in alive}
        self._ask("begin")

    def end(self) -> Peak:
        """Return the peaks of the stage. Nodes that have left do not report."""
        peaks_by_node = self._ask("end")
        process, gpu = (max((peaks[k] for peaks in peaks_by_node), default=0.0) for k in (0, 1))
        return Peak(round(process, 1) or None, round(gpu, 1) or None)

    def _ask(self, what: str) -> list[Any]:
        answers = []
        for node, watch in list(self._watches.items()):
            try:
                answers.append(ray.get(getattr(watch, what).remote(), timeout=30))
            except RayError:  # the watch was killed, possibly by lack of memory; the next stage gets a new one
                del self._watches[node]
        return answers
