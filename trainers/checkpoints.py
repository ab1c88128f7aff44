"""Checkpoints of a training in <folder>/checkpoints/step-<n>/: one file for each entry of the state, and index.json last.

Each file is written whole and with retries, to a local folder or to object storage. A folder without index.json is
incomplete: its checkpoint was being written or removed. The index holds the SHA-256 of every file, so that a checkpoint with
one wrong bit is refused. This module does not depend on how a run is restarted: a run continues from the checkpoints in its
folder. The state is in several files because one PUT to S3 is limited to 5 GB.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection
from typing import Any

import torch

from beeline.errors import BeelineError, StorageError
from beeline.files.names import CHECKPOINTS
from pipeline.storage import Folder

INDEX = "index.json"
State = dict[str, Any]


def save(folder: Folder, step: int, state: State, *, keep: int) -> None:
    """Publish `state` (tensors and plain Python) as the checkpoint of `step`, then remove all but the last `keep`."""
    place = folder / CHECKPOINTS / name_of(step)
    digests = {}
    for name, value in state.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        place.write(f"{name}.pt", buffer.getvalue())
        digests[f"{name}.pt"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    place.write_json(INDEX, {"step": step, "sha256": digests})
    complete = steps(folder)
    for old in complete[: -max(keep, 1)]:
        remove(folder, old)


def load(folder: Folder, step: int) -> State:
    """The state of `step`, with tensors in main memory. Raises BeelineError if it is not what was saved."""
    place = folder / CHECKPOINTS / name_of(step)
    try:
        index = place.read_json(INDEX)
        if index["step"] != step:
            raise ValueError(f"{INDEX} is of step {index['step']}, expected {step}")
        return {name.removesuffix(".pt"): _part(place, name, digest) for name, digest in index["sha256"].items()}
    except StorageError:
        raise
    except Exception as error:  # the type depends on the damage
        reason = error if str(error) else type(error).__name__
        raise BeelineError(f"{place} is damaged ({reason}); the checkpoint before it is used") from error


def _part(place: Folder, name: str, digest: str) -> Any:
    data = place.read(name)
    actual = hashlib.sha256(data).hexdigest()
    if actual != digest:
        raise ValueError(f"{name} has SHA-256 {actual[:12]}..., expected {str(digest)[:12]}...")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def newest(folder: Folder, refused: Collection[int] = ()) -> tuple[int, State] | None:
    """The newest intact checkpoint whose step is not in `refused`, or None. Prints a line for each damaged one."""
    for step in reversed(steps(folder)):
        if step not in refused:
            try:
                return step, load(folder, step)
            except StorageError:
                raise
            except BeelineError as error:
                print(f"{error}", flush=True)
    return None


def steps(folder: Folder) -> list[int]:
    """Steps of the complete checkpoints, in order. Ignores folders with other names."""
    numbers = [int(name.removeprefix("step-")) for name in (folder / CHECKPOINTS).folders() if _is_name(name)]
    return sorted(step for step in numbers if INDEX in (folder / CHECKPOINTS / name_of(step)).sizes())


def remove(folder: Folder, step: int) -> None:
    """Remove a checkpoint, its index first."""
    place = folder / CHECKPOINTS / name_of(step)
    place.remove(INDEX)
    place.remove_all()


def name_of(step: int) -> str:
    """Name of the folder of the checkpoint of `step`."""
    return f"step-{step:08d}"


def _is_name(name: str) -> bool:
    digits = name.removeprefix("step-")
    return digits.isascii() and digits.isdigit() and name == name_of(int(digits))
