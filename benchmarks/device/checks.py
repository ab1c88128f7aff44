"""What a check is, how its result is worded, and how tensors are compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.utils
from torch.overrides import TorchFunctionMode

NONE = 1e-30  # a limit for what has to be 0
COMPILING = 240.0  # seconds that a check may take which compiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Where the checks run. `small`: tiny networks and batches, for tests. `folder`: where results for the estimate go.
    `compiling`: whether checks of compiled code are wanted."""

    device: torch.device
    small: bool
    folder: str
    compiling: bool = True

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"


class Skip(Exception):
    """A check does not apply here; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a check: `figure` is what was found, `expected` what it should be ("" where it is a measurement alone)."""

    passed: bool
    figure: str
    expected: str = ""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Check:
    """A named check. It may run for `limit` seconds before its process is ended."""

    name: str
    call: Callable[[], Outcome]
    limit: float = 120


Checks = Iterable[Check]


def at_most(value: float, limit: float, **details: Any) -> Outcome:
    """Passed where `value` is finite and at most `limit`."""
    passed = math.isfinite(value) and value <= limit
    return Outcome(passed=passed, figure=f"{value:.2g}", expected=f"at most {limit:.2g}", details={"value": value, **details})


def worst(values: Mapping[str, float], limits: Mapping[str, float]) -> Outcome:
    """Passed where each value is at most its limit. The figure is that of the value which is nearest to its limit, or past."""
    name = max(values, key=lambda key: values[key] / limits[key] if math.isfinite(values[key]) else math.inf)
    passed = all(math.isfinite(value) and value <= limits[key] for key, value in values.items())
    figure, expected = f"{name} {values[name]:.2g}", f"at most {limits[name]:.2g}"
    return Outcome(passed=passed, figure=figure, expected=expected, details={"values": dict(values), "limits": dict(limits)})


def identical(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> Outcome:
    """Passed where all tensors have the same bits."""
    pairs = list(zip(found, wanted, strict=True))
    differing = sum(not torch.equal(a, b) for a, b in pairs)
    largest = max((float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    figure = "bit-identical" if not differing else f"{differing} of {len(pairs)} tensors differ, by up to {largest:.2g}"
    return Outcome(passed=not differing, figure=figure, expected="" if not differing else "the same bits")


def measured(figure: str, **details: Any) -> Outcome:
    """A measurement, which cannot fail."""
    return Outcome(passed=True, figure=figure, details=details)


def relative(found: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor]) -> float:
    """|found - wanted| / |wanted| over all tensors together, in float64 on the CPU."""
    difference = total = 0.0
    for a, b in zip(found, wanted, strict=True):
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        difference += float((a - b).square().sum())
        total += float(b.square().sum())
    return math.sqrt(difference / total) if total else math.sqrt(difference)


def rms(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square difference, in float64 on the CPU."""
    return float((found.detach().cpu().double() - wanted.detach().cpu().double()).square().mean().sqrt())


class SameDraws(TorchFunctionMode):
    """Inside it random numbers come from one generator on the CPU, whatever device asks: two devices then draw the same."""

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
    """Change what beeline.numerics sets, to measure what it costs."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)


def start_compiling() -> None:
    """Forget compiled code and what its compilation counted."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiling_troubles() -> dict[str, float]:
    """What kept code from being compiled as a whole since `start_compiling`: all 0 if nothing did."""
    counters = torch._dynamo.utils.counters
    return {
        "graph breaks": float(sum(counters["graph_break"].values())),
        "CUDA graphs left out": float(counters["inductor"]["cudagraph_skips"]),
        "compiled nothing": float(not counters["stats"]["unique_graphs"]),
    }
