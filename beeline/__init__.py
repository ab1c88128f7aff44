"""Beeline: Lines Matching Models, from an EDM diffusion teacher to a one- or two-step generator.

This package is the mathematics: PyTorch and NumPy, no Ray, no object storage, no GPU assumed.
"""

from beeline.checkpoint import load
from beeline.errors import BeelineError
from beeline.samplers import generate

__all__ = ["BeelineError", "generate", "load"]
