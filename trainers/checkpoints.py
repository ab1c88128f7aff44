"""Checkpoints of training in <folder>/checkpoints/step-<n>/: a file for each entry of the state, index.json last.

They are written like everything else in a workspace, each file whole and with retries, local or on object storage; a folder
without index.json is one that was being written or removed. Nothing here knows who restarts a run, or how: a run goes on
from what it finds. Several files, since one PUT to S3 ends at 5 GB.
"""

from __future__ import annotations

import io
from typing import Any

import torch

from beeline.errors import BeelineError
from pipeline.storage import Folder

CHECKPOINTS, INDEX = "checkpoints", "index.json"
State = dict[str, Any]


def save(folder: Folder, step: int, state: State, *, keep: int) -> None:
    """Publish `state` (tensors and plain Python) as that of `step`, then remove all but the last `keep` checkpoints."""
    place = folder / CHECKPOINTS / name_of(step)
    sizes = {}
    for name, value in state.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        place.write(f"{name}.pt", buffer.getvalue())
        sizes[f"{name}.pt"] = len(buffer.getvalue())
    place.write_json(INDEX, {"step": step, "files": sizes})
    complete = steps(folder)
    for old in complete[: -max(keep, 1)]:
        remove(folder, old)


def load(folder: Folder, step: int) -> State:
    """The state of `step`. Raises BeelineError if it is not whole."""
    place = folder / CHECKPOINTS / name_of(step)
    try:
        index = place.read_json(INDEX)
        files = {name: place.read(name) for name in index["files"]}
        found = {name: len(data) for name, data in files.items()}
        if found != index["files"]:
            raise ValueError(f"found {found} bytes, expected {index['files']}")
        return {name.removesuffix(".pt"): torch.load(io.BytesIO(data), weights_only=True) for name, data in files.items()}
    except (FileNotFoundError, TypeError, KeyError, ValueError, RuntimeError) as error:
        raise BeelineError(f"{place} is damaged ({error}); remove it to go on from the one before") from error


def steps(folder: Folder) -> list[int]:
    """Steps of the complete checkpoints, in order."""
    names = (folder / CHECKPOINTS).folders()
    complete = [name for name in names if INDEX in (folder / CHECKPOINTS / name).sizes()]
    return sorted(int(name.removeprefix("step-")) for name in complete)


def remove(folder: Folder, step: int) -> None:
    """Remove a checkpoint, its index first."""
    place = folder / CHECKPOINTS / name_of(step)
    place.remove(INDEX)
    place.remove_all()


def name_of(step: int) -> str:
    """The checkpoint's folder."""
    return f"step-{step:08d}"
