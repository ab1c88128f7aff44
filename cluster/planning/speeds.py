"""How fast machines compute, and who says so: this workspace, a benchmark of ours, or a share of a data sheet's peak.

What was measured in the workspace, or in its rehearsal, comes first, then benchmarks/results of the same kind of device, of the
network that is nearest in size. Only where there is neither is a speed assumed, and then it says that it is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from beeline.config import NetworkConfig, from_dict
from beeline.errors import BeelineError
from beeline.recipes import RECIPES
from cluster.planning import counting

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
UTILISATION = 0.3
CPU = "cpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU as its vendor's data sheet gives it: peak TFLOP/s without sparsity."""

    sheet: str
    pattern: str
    """A regular expression of its name as torch tells it."""
    half: float
    """bf16 and fp16, summed in float32."""
    fp32: float


GPUS: dict[str, Gpu] = {
    "h200": Gpu(sheet="NVIDIA H200 SXM", pattern=r"\bH200\b", half=989, fp32=67),
    "h100": Gpu(sheet="NVIDIA H100 SXM", pattern=r"\bH100\b", half=989, fp32=67),
    "a100": Gpu(sheet="NVIDIA A100", pattern=r"\bA100\b", half=312, fp32=19.5),
    "l40s": Gpu(sheet="NVIDIA L40S", pattern=r"\bL40S\b", half=362, fp32=91.6),
    "l4": Gpu(sheet="NVIDIA L4", pattern=r"\bL4\b", half=121, fp32=30.3),
    "rtx4090": Gpu(sheet="NVIDIA GeForce RTX 4090", pattern=r"\bRTX 4090\b", half=165, fp32=82.6),
}


@dataclasses.dataclass(frozen=True)
class Speed:
    """FLOP/s of one GPU, or of one core of a CPU; `source` is the sentence that says where it is from."""

    flops: float
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be computed: which networks, in which precision. `size`: FLOPs per evaluation of the denoiser."""

    kind: str
    """"sampling", "teacher", "reconstruction", "adversarial", "looking" (through measuring networks) or "figures"."""
    size: float
    precision: str
    compiled: bool = False

    @property
    def trains(self) -> bool:
        """Whether it is forward and backward."""
        return self.kind in ("teacher", "reconstruction", "adversarial")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A throughput that was measured. `rate` gives FLOP/s per unit; counting what it takes may take seconds."""

    task: Task
    rate: Callable[[], float]
    source: str
    ours: bool
    """In the user's workspace, rather than by a benchmark."""
    on_gpu: bool
    device: str = ""
    """The kind of device; "" where it is not on record."""


def known(gpu: str) -> str:
    """The name of a kind of device. Raises BeelineError, with the known ones, for any other."""
    name = gpu.lower()
    if name not in (*GPUS, CPU):
        raise BeelineError(f"--gpu is {gpu!r}, of which no speed is known; expected one of: {', '.join((*GPUS, CPU))}")
    return name


def here() -> str:
    """The kind of device of this machine: "cpu" where it has no GPU. Raises BeelineError for a GPU that is not known."""
    if not torch.cuda.is_available():
        return CPU
    name = torch.cuda.get_device_name()
    return kind_of({"gpu": name}) or known(name)


def speed(task: Task, device: str, *, measured: list[Measured], utilisation: float = UTILISATION) -> Speed:
    """Of `task` on one `device`, from the measurement that is nearest to it, or assumed."""
    if task.kind == "figures":
        return _figures()
    alike = [m for m in measured if m.on_gpu == (device != CPU) and m.device in ("", device)] + benchmarks(device)
    strict = task.kind == "looking" and device != CPU  # measuring networks say nothing about denoisers, nor these of them
    kinds = [m for m in alike if m.task.kind == task.kind or not (strict or m.task.kind == "looking")]
    candidates = [m for m in kinds if m.task.precision == task.precision]
    if candidates:
        best = min(candidates, key=lambda m: _distance(m, task))
        note = "" if best.task.kind == task.kind else f"; of {best.task.kind}, taken for this too"
        return Speed(best.rate(), f"measured: {best.source}{note}")
    if device == CPU:
        raise BeelineError(f"no speed of a CPU in {task.precision} is in {RESULTS}; measure: python -m benchmarks.sampling")
    gpu = GPUS[device]
    peak = gpu.half if task.precision in ("bf16", "fp16") else gpu.fp32
    said = f"assumed, not measured: {100 * utilisation:g} % of the data sheet's {peak:g} TFLOP/s dense {task.precision}"
    return Speed(utilisation * peak * 1e12, f"{said} ({gpu.sheet})")


def _distance(found: Measured, task: Task) -> tuple[Any, ...]:
    """How far a measurement is from a task: the workspace's first, then the size of the network, then what it did with it."""
    orders = round(abs(math.log10(found.task.size / task.size)), 1)
    kinds = 0 if found.task.kind == task.kind else 1 if found.task.trains == task.trains else 2
    return not found.ours, orders, kinds, found.task.compiled != task.compiled


def benchmarks(device: str) -> list[Measured]:
    """What benchmarks/results tell of a kind of device."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError:
            continue
        if "model" not in result or kind_of(result["machine"]) != device:
            continue
        if "policies" in result:
            found += _of_sampling(path, result)
        elif "phases" in result:
            found += _of_training(path, result)
    return found


def kind_of(machine: Mapping[str, Any]) -> str | None:
    """The kind of device that a machine's description names, None for a GPU of which no speed is known."""
    name = machine.get("gpu")
    if not name:
        return CPU
    return next((key for key, gpu in GPUS.items() if re.search(gpu.pattern, name)), None)


def _of_sampling(path: Path, result: dict[str, Any]) -> list[Measured]:
    flops, units, place = result["gflop_per_evaluation"] * 1e9, _units(result["machine"]), where(result["machine"])
    made, gpu = [], bool(result["machine"].get("gpu"))
    for policy, row in result["policies"].items():
        if policy != "plain":
            task = Task(kind="sampling", size=flops, precision=policy.split()[0], compiled="compiled" in policy)
            rate = row["evaluations_per_s"] * flops / units
            made.append(
                Measured(task=task, rate=lambda rate=rate: rate, source=f"{_named(path)}, {place}", ours=False, on_gpu=gpu)
            )
    return made


def _of_training(path: Path, result: dict[str, Any]) -> list[Measured]:
    network = from_dict(NetworkConfig, result["model"]["network"])
    size, units, place = counting.evaluation(network), _units(result["machine"]), where(result["machine"])
    recipe = RECIPES["cifar10"](0)  # whose losses the benchmark trains with
    phases = recipe.main.phases
    made, gpu = [], bool(result["machine"].get("gpu"))
    for phase, rows in result["phases"].items():
        for policy, row in rows.items():
            if policy == "plain":
                continue

            def rate(phase: str = phase, images: float = row["images_per_s"]) -> float:
                return images * counting.of_phase(network, recipe.probe.losses, phases[phase].objective).flops / units

            task = Task(kind=phase, size=size, precision=policy.split()[0], compiled="compiled" in policy)
            made.append(
                Measured(task=task, rate=functools.cache(rate), source=f"{_named(path)}, {place}", ours=False, on_gpu=gpu)
            )
    return made


def _units(machine: dict[str, Any]) -> int:
    return 1 if machine.get("gpu") else int(machine["threads"])


def where(machine: Mapping[str, Any]) -> str:
    """What a speed holds for, in words."""
    if machine.get("gpu"):
        return f"on one {machine['gpu']}"
    other = "" if machine["cpu"] in _cpu() else " (this machine has another)"
    return f"per thread, on {machine['threads']} of {machine['cpu']}{other}"


@functools.cache
def _cpu() -> str:
    """The names of this machine's CPUs, where the system tells them."""
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else platform.processor()


def _named(path: Path) -> str:
    return f"benchmarks/results/{path.name}"


@functools.cache
def starting() -> tuple[float, str]:
    """Seconds from a stage's start to its first result beyond the work itself, and the source."""
    path = RESULTS / "pairs-startup.json"
    if not path.exists():
        return 15.0, "assumed"
    rows = json.loads(path.read_text())["startup"]
    return float(rows[0]["seconds_to_the_first"]), f"measured: {_named(path)}, a fresh Ray on two cores"


@functools.cache
def _figures() -> Speed:
    """Distances and neighbourhoods: float64 products on one core, whatever the GPU."""
    best, source = 0.0, ""
    for path in sorted(RESULTS.glob("sampling-cpu-*.json")):
        result = json.loads(path.read_text())
        rate = result["ceilings_tflops"]["fp32"] * 1e12 / result["machine"]["threads"]
        if rate > best:
            best, source = rate, _named(path)
    return Speed(best / 2, f"assumed: float64 at half of the fp32 ceiling of a core in {source}")


def cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
