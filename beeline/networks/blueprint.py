"""A network's tensors by name and shape, without values, to compare files with before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Shapes = Mapping[str, tuple[int, ...]]
# Initial weights need no values here, and normal ones would import torch._dynamo on the meta device, which takes a second.
FILLS = {"normal_", "uniform_", "zero_", "fill_", "mul_", "add_", "div_", "erfinv_", "clamp_"}
DRAWS = {"randn", "rand"}


class _Unfilled(TorchFunctionMode):
    """Leaves tensors uninitialised."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in FILLS:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if name in DRAWS else func)(*args, **kwargs)


def shapes_of(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the state dict of the module that `make` builds. It is built on the meta device, without memory for
    weights and without random numbers."""
    with torch.device("meta"), _Unfilled():
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


def mismatch(found: Shapes, expected: Shapes) -> str:
    """Describe briefly how the tensors of a file differ from those of a network; "" if they match."""
    for problem, names in (("are missing", expected.keys() - found.keys()), ("are unexpected", found.keys() - expected.keys())):
        if names:
            return f"{len(names):,} tensors {problem}, {min(names)} for example"
    other = next((name for name, shape in found.items() if shape != expected[name]), None)
    return f"{other} has shape {found[other]}, expected {expected[other]}" if other else ""
