"""Bytes of what a training writes: models that it publishes, and checkpoints."""

from __future__ import annotations

from torch import nn

from beeline.config import StudentConfig

FLOAT = 4  # bytes


def state_bytes(module: nn.Module) -> int:
    """Bytes of a module's state: parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def learner_bytes(module: nn.Module | None) -> int:
    """Bytes in a checkpoint of a network that learns: its state, and Adam's two moments of each trained parameter. 0 for
    None."""
    if module is None:
        return 0
    return state_bytes(module) + 2 * FLOAT * sum(part.numel() for part in module.parameters() if part.requires_grad)


def published(student: StudentConfig) -> int:
    """Models that a training publishes: after each phase, other averages than the first, the best validation."""
    return len(student.running) + len(student.ema_half_lives) - 1 + bool(student.validate_every)


def checkpoints_kept(iterations: int, every: int, keep: int) -> int:
    """Checkpoints that stay after `iterations` steps. The last step writes none: it publishes the model."""
    return min(keep, (iterations - 1) // every)
