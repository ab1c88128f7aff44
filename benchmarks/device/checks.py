"""Checks, the wording of their results, and comparisons of tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.utils
from torch.overrides import TorchFunctionMode

NONE = 1e-30  # limit for values that must be 0
COMPILING = 240.0  # time limit in seconds of a check that compiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Environment of the checks. `small`: tiny networks and batches, for tests. `folder`: for results that the estimate reads.
    `compiling`: whether to run checks of compiled code."""

    device: torch.device
    small: bool
    folder: str
    compiling: bool = True

    @property
    def gpu(self) -> bool:
        """Return whether the device is a GPU."""
        return self.device.type == "cuda"


class Skip(Exception):
    """Raised if a check does not apply here; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a check: `figure` is the measured value, `expected` its limit ("" for pure measurements)."""

    passed: bool
    figure: str
    expected: str = ""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Check:
    """A named check. Its process is ended after `limit` seconds."""

    name: str
    call: Callable[[], Outcome]
    limit: float = 120


Checks = Iterable[Check]


def at_most(value: float, limit: float, **details: Any) -> Outcome:
    """Pass if `value` is finite and at most `limit`."""
    passed = math.isfinite(value) and value <= limit
    return Outcome(passed=passed, figure=f"{value:.2g}", expected=f"at most {limit:.2g}", details={"value": value, **details})


def worst(values: Mapping[str, float], limits: Mapping[str, float]) -> Outcome:
    """Pass if each value is at most its limit. The figure is the value closest to, or furthest beyond, its limit."""
    name = max(values, key=lambda key: values[key] / limits[key] if math.isfinite(values[key]) else math.inf)
    passed = all(math.isfinite(value) and value <= limits[key] for key, value in values.items())
    figure, expected = f"{name} {values[name]:.2g}", f"at most {limits[name]:.2g}"
    return Outcome(passed=passed, figure=figure, expected=expected, details={"values": dict(values), "limits": dict(limits)})


def identical(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> Outcome:
    """Pass if all tensors have the same bits."""
    pairs = list(zip(found, wanted, strict=True))
    differing = sum(not torch.equal(a, b) for a, b in pairs)
    largest = max((float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    figure = "bit-identical" if not differing else f"{differing} of {len(pairs)} tensors differ, by up to {largest:.2g}"
    return Outcome(passed=not differing, figure=figure, expected="" if not differing else "the same bits")


def measured(figure: str, **details: Any) -> Outcome:
    """Return a measurement, which cannot fail."""
    return Outcome(passed=True, figure=figure, details=details)


def relative(found: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor]) -> float:
    """Compute |found - wanted| / |wanted| over all tensors together, in float64 on the CPU."""
    difference = total = 0.0
    for a, b in zip(found, wanted, strict=True):
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        difference += float((a - b).square().sum())
        total += float(b.square().sum())
    return math.sqrt(difference / total) if total else math.sqrt(difference)


def rms(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Compute the root mean square difference, in float64 on the CPU."""
    return float((found.detach().cpu().double() - wanted.detach().cpu().double()).square().mean().sqrt())


class SameDraws(TorchFunctionMode):
    """Context in which all random numbers come from one CPU generator, so that two devices draw the same."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.rand, torch.randn, torch.randint):
            device = kwargs.pop("device", None)
            return func(*args, **kwargs | {"generator": self._generator}).to(device or "cpu")
        return func(*args, **kwargs)


def set_flags(*, tf32: bool, deterministic: bool) -> None:
    """Change the flags of beeline.numerics, to measure their cost."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)


def start_compiling() -> None:
    """Forget compiled code and the compiler's counters."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiling_troubles() -> dict[str, float]:
    """Count the reasons why code was not compiled as a whole since `start_compiling`; all 0 without problems."""
    counters = torch._dynamo.utils.counters
    return {
        "graph breaks": float(sum(counters["graph_break"].values())),
        "CUDA graphs left out": float(counters["inductor"]["cudagraph_skips"]),
        "compiled nothing": float(not counters["stats"]["unique_graphs"]),
    }
