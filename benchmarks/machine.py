"""Tools shared by all benchmarks: description of the machine, its measured ceilings, fair timing, results as JSON."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from beeline.checkpoint import WEIGHTS
from beeline.config import to_dict
from beeline.denoiser import Denoiser
from beeline.machine import describe

__all__ = ["RESULTS", "ceilings", "describe", "describe_model", "synchronize", "timed", "write"]
RESULTS = Path(__file__).parent / "results"


def describe_model(model: Denoiser, folder: Path | None) -> dict[str, Any]:
    """Describe the network and its weights: by the SHA-256 of a folder's weights, or as random."""
    weights = "random" if folder is None else f"sha256 {hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()}"
    return {"network": to_dict(model.network_config), "weights": weights}


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    """Measure the median seconds of each call over `rounds` rounds. Each round runs every call once, so drift affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def ceilings(device: torch.device, dtypes: Mapping[str, torch.dtype], rounds: int = 5) -> dict[str, float]:
    """Measure the best FLOP/s by precision: the fastest of matrix products and 3x3 convolutions in the networks' shapes."""
    batch = 64 if device.type == "cuda" else 8
    best = {}
    for name, dtype in dtypes.items():
        square = 8192 if device.type == "cuda" else 1024
        a, b = (torch.randn(square, square, device=device, dtype=dtype) for _ in range(2))
        calls: dict[str, Callable[[], Any]] = {"matmul": lambda a=a, b=b: a @ b}
        work = {"matmul": 2.0 * square**3}
        for channels, side in ((256, 32), (256, 16), (256, 8)):
            x = torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            key = f"conv {channels} at {side}"
            calls[key] = lambda x=x, w=w: F.conv2d(x, w, padding=1)
            work[key] = 2.0 * batch * channels * channels * 9 * side * side
        with torch.inference_mode():
            seconds = timed(calls, device, rounds)
        best[name] = max(work[key] / seconds[key] for key in calls)
    return best


def write(name: str, result: Mapping[str, Any], out: Path | None) -> None:
    """Print the result and write it to `out` or results/<name>.json."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")
