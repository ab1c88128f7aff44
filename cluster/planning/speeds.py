"""Speeds of machines: measured in this workspace, measured by a benchmark, or assumed as a share of a data sheet's peak.

Measurements in the workspace, or in its rehearsal, come first. Then come benchmarks/results of the same kind of device, for the
network nearest in size. Without either, the speed is assumed. Each speed names its source.
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
from typing import Any, NamedTuple

import torch

from beeline import counting
from beeline.config import NetworkConfig, ProbeNetworkConfig, from_dict
from beeline.errors import BeelineError
from beeline.objectives import ObjectiveConfig
from beeline.objectives.edm import EDMConfig
from beeline.recipes import RECIPES

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
UTILISATION = 0.3
IMAGES_PER_CORE = 200.0  # per second, decoded and resized
CPU, ANY_GPU = "cpu", "gpu"
TRAINING = ("teacher", "reconstruction", "adversarial")


class Gpu(NamedTuple):
    """A kind of GPU: the data sheet's name and its dense peaks in TFLOP/s, `half` for bf16 and fp16."""

    sheet: str
    half: float
    fp32: float


GPUS = {  # keys are words in torch's name of the device
    "h200": Gpu("NVIDIA H200 SXM", 989, 67),
    "h100": Gpu("NVIDIA H100 SXM", 989, 67),
    "a100": Gpu("NVIDIA A100", 312, 19.5),
    "l40s": Gpu("NVIDIA L40S", 362, 91.6),
    "l4": Gpu("NVIDIA L4", 121, 30.3),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 165, 82.6),
}


class Speed(NamedTuple):
    """Operations per second of one GPU or one CPU core, and a description of the source."""

    rate: float
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A kind of work. Its operations are FLOPs, except for "images", where they are images."""

    kind: str
    """"sampling", "teacher", "reconstruction", "adversarial", "looking" (through measuring networks), "figures" or "images"."""
    size: float
    """FLOPs per evaluation of the denoiser. Speeds are taken from networks of similar size."""
    precision: str
    compiled: bool = False


IMAGES = Work(kind="images", size=1.0, precision="uint8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A measured speed."""

    task: Work
    rate: Callable[[], float]
    """Operations per second and GPU or core. May take seconds: it counts FLOPs."""
    source: str
    device: str
    """CPU, a name in GPUS, or ANY_GPU if the record does not name the kind."""
    ours: bool = True
    """Whether it was measured in the user's workspace, not by a benchmark."""

    @property
    def on_gpu(self) -> bool:
        """Whether the speed was measured on a GPU."""
        return self.device != CPU


def known(gpu: str) -> str:
    """The name of a kind of device, in lower case. Raises BeelineError, with the known names, for any other."""
    name = gpu.lower()
    if name not in (*GPUS, CPU):
        raise BeelineError(f"--gpu is {gpu!r}, which has no known speed; expected one of: {', '.join((*GPUS, CPU))}")
    return name


def here() -> str:
    """The kind of device of this machine, "cpu" without a GPU. Raises BeelineError for an unknown GPU."""
    if not torch.cuda.is_available():
        return CPU
    name = torch.cuda.get_device_name()
    return kind_of({"gpu": name}) or known(name)


def kind_of_phase(network: NetworkConfig, probe: ProbeNetworkConfig, objective: ObjectiveConfig) -> str:
    """The kind of work of a phase (speeds.py): "teacher", "adversarial" if it trains a critic, else "reconstruction"."""
    if isinstance(objective, EDMConfig):
        return "teacher"
    return "adversarial" if counting.phase_bytes(network, probe, objective)[0] else "reconstruction"


def speed(task: Work, device: str, *, measured: list[Measured], utilisation: float = UTILISATION) -> Speed:
    """The speed of `task` on one `device`, from the nearest measurement, or assumed. Raises BeelineError for a CPU without
    a measurement in the precision."""
    if task.kind == "figures":
        return _figures()
    devices = (device,) if device == CPU else (device, ANY_GPU)
    same = [m for m in [*measured, *benchmarks(device)] if m.device in devices and m.task.precision == task.precision]
    # Images per second are not FLOPs. On a GPU, speeds of measuring networks and of denoisers say nothing about each other.
    borrows = task.kind not in (("images",) if device == CPU else ("images", "looking"))
    candidates = [m for m in same if m.task.kind == task.kind or (borrows and m.task.kind not in ("images", "looking"))]
    if candidates:
        best = min(candidates, key=lambda m: _distance(m, task))
        note = "" if best.task.kind == task.kind else f"; measured for {best.task.kind}, also used here"
        return Speed(best.rate(), f"measured: {best.source}{note}")
    if task.kind == "images":
        return Speed(IMAGES_PER_CORE, "assumed")
    if device == CPU:
        raise BeelineError(f"no CPU speed in {task.precision} is in {RESULTS}; measure one: python -m benchmarks.sampling")
    gpu = GPUS[device]
    peak = gpu.half if task.precision in ("bf16", "fp16") else gpu.fp32
    source = f"assumed, not measured: {100 * utilisation:g} % of the data sheet's {peak:g} TFLOP/s dense {task.precision}"
    return Speed(utilisation * peak * 1e12, f"{source} ({gpu.sheet})")


def _distance(found: Measured, task: Work) -> tuple[Any, ...]:
    """Distance of a measurement from a task: the workspace's own first, then network size, kind and compilation."""
    orders = round(abs(math.log10(found.task.size / task.size)), 1)
    kinds = 0 if found.task.kind == task.kind else 1 if (found.task.kind in TRAINING) == (task.kind in TRAINING) else 2
    return not found.ours, orders, kinds, found.task.compiled != task.compiled


def benchmarks(device: str) -> list[Measured]:
    """Speeds of a kind of device in benchmarks/results."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        result = _result(path)
        rows = result.get("phases") or ({"sampling": result["policies"]} if "policies" in result else {})
        if "model" not in result or kind_of(result["machine"]) != device or not rows:
            continue
        network = from_dict(NetworkConfig, result["model"]["network"])
        size, units = counting.evaluation(network), 1 if device != CPU else int(result["machine"]["threads"])
        source = f"{_named(path)}, {where(result['machine'])}"
        for kind, policies in rows.items():
            for policy, row in policies.items():
                if policy == "plain":
                    continue
                task = Work(kind=kind, size=size, precision=policy.split()[0], compiled="compiled" in policy)
                rate = functools.partial(_rate, kind, row, network, units)
                found.append(Measured(task=task, rate=rate, source=source, device=device, ours=False))
    return found


def _rate(kind: str, row: Mapping[str, float], network: NetworkConfig, units: int) -> float:
    """FLOP/s of a row of a benchmark, per GPU or thread."""
    if kind == "sampling":
        return row["evaluations_per_s"] * counting.evaluation(network) / units
    recipe = RECIPES["cifar10"](0)  # the benchmark trains with this recipe's losses
    objective = recipe.main.phases[kind].objective
    return row["images_per_s"] * counting.phase_flops(network, recipe.probe.losses, objective) / units


def _result(path: Path) -> dict[str, Any]:
    """The JSON of a benchmark; {} if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return {}


def kind_of(machine: Mapping[str, Any]) -> str | None:
    """The kind of device in a machine's description (beeline/machine.py); None for a GPU without a known speed."""
    name = machine.get("gpu")
    if not name:
        return CPU
    words = re.findall(r"\w+", name.lower().replace("rtx ", "rtx"))
    return next((kind for kind in GPUS if kind in words), None)


def where(machine: Mapping[str, Any]) -> str:
    """The device of a speed, in words."""
    if machine.get("gpu"):
        return f"on one {machine['gpu']}"
    other = "" if machine["cpu"] in _cpu() else " (this machine has another)"
    return f"per thread, on {machine['threads']} of {machine['cpu']}{other}"


@functools.cache
def _cpu() -> str:
    """The names of this machine's CPUs, if the system reports them."""
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else platform.processor()


def _named(path: Path) -> str:
    return f"benchmarks/results/{path.name}"


def starting() -> tuple[float, str]:
    """Seconds from the start of a stage's command to its first result, without the work itself, and their source."""
    path = RESULTS / "pairs-startup.json"
    if not path.exists():
        return 15.0, "assumed"
    seconds = _result(path)["startup"][0]["seconds_to_the_first"]
    return float(seconds), f"measured: {_named(path)}, a fresh Ray on two cores"


def _figures() -> Speed:
    """Speed of distances and neighbourhoods: float64 products on one core, with any GPU."""
    found = [(path, _result(path)) for path in sorted(RESULTS.glob("sampling-cpu-*.json"))]
    rates = {_named(path): result["ceilings_tflops"]["fp32"] * 1e12 / result["machine"]["threads"] for path, result in found}
    best = max(rates, key=lambda name: rates[name])
    return Speed(rates[best] / 2, f"assumed: float64 at half of the fp32 ceiling of a core in {best}")


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
