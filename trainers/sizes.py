"""The number of models that a training publishes, and of checkpoints that it keeps."""

from __future__ import annotations

from beeline.config import StudentConfig


def published(student: StudentConfig) -> int:
    """Models that a training publishes: after each phase, other averages than the first, the best validation."""
    return len(student.running) + len(student.ema_half_lives) - 1 + bool(student.validate_every)


def checkpoints_kept(iterations: int, every: int, keep: int) -> int:
    """Checkpoints that stay after `iterations` steps. The last step writes none: it publishes the model."""
    return min(keep, (iterations - 1) // every)
