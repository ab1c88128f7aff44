"""Beeline: Lines Matching Models, from an EDM diffusion teacher to a one- or two-step generator.

This package holds the mathematics. It uses PyTorch and NumPy, but no Ray and no object storage, and needs no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from beeline.errors import BeelineError

if TYPE_CHECKING:
    from beeline.checkpoint import load
    from beeline.sampling import generate

__all__ = ["BeelineError", "generate", "load"]


def __getattr__(name: str) -> Any:
    """Import `load` and `generate` on first use: importing PyTorch takes seconds, and a command must handle Ctrl-C before
    that."""
    if name == "load":
        from beeline.checkpoint import load

        return load
    if name == "generate":
        from beeline.sampling import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
