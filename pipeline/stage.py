"""Stages: each has a plan of its result, and a marker for a complete result.

Every stage owns a folder of the workspace. plan.json is written first and fixes the content of the folder. A different plan in
the same folder is refused, with a list of the differences. `_SUCCESS` comes last and holds the time that the stage took.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from beeline.checkpoint import WEIGHTS
from beeline.config import NetworkConfig
from beeline.errors import BeelineError
from beeline.files.names import EVALUATION, IMAGES, PAIRS, PROBE, STUDENTS, SWEEPS, TEACHER, maker_of_pairs
from pipeline.records import LAYOUTS, PLAN, SUCCESS, plan_in, success_in
from pipeline.storage import Folder

MADE_BY = {
    IMAGES: "pipeline/ingest_images.py",
    PROBE: "trainers/train_probe.py",
    TEACHER: "trainers/train_teacher.py",
    PAIRS: "pipeline/gen_pairs.py",
    STUDENTS: "trainers/train_lmm.py",
    SWEEPS: "trainers/sweep_lmm.py",
    EVALUATION: "evaluation/evaluate.py",
}


def command_for(workspace: Folder, folder: str, recipe: str) -> str:
    """The command that makes the content of `folder`."""
    kind, *parts = folder.split("/")
    command = f"python {MADE_BY.get(kind, '...')} {recipe} --workspace {workspace}"
    maker = maker_of_pairs(folder)
    if maker not in (None, TEACHER):
        return f"python {MADE_BY[PAIRS]} {recipe} --workspace {workspace} --pairs.model {maker}"
    return f"{command} --student {parts[0]}" if kind == STUDENTS else command


def layout_of(folder: str) -> Any:
    """The layout of the plan in `folder`, as far as other stages read it."""
    return LAYOUTS[PAIRS] if maker_of_pairs(folder) else LAYOUTS.get(folder, {})


def fingerprint(plan: Any) -> str:
    """SHA-256 of a plan. It does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """The differences between two plans, as "pairs.count: 5000 there, 2000 asked for"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)]
    return [] if old == new else [f"{at}: {old} there, {new} asked for"]


class Stage:
    """A stage's folder `name` in the workspace, and its plan (config and digests of inputs, as JSON values)."""

    def __init__(self, workspace: Folder, name: str, plan: Mapping[str, Any]) -> None:
        self.workspace, self.name, self.folder = workspace, name, workspace / name
        self.plan: dict[str, Any] = json.loads(json.dumps(plan))  # in the form in which JSON is read back
        self._started = time.monotonic()

    def begin(self, *, more: bool = False, quiet: bool = False) -> bool:
        """Claim the folder for this plan. Returns whether work is left.

        No work is left if the stage is complete and there is no `more` to add; this prints a line unless `quiet`. Raises
        BeelineError if the folder holds the result of another plan, or cannot be written.
        """
        old = plan_in(self.folder, {})
        if old is None:
            if WEIGHTS in self.folder.sizes():
                raise BeelineError(
                    f"{self.folder} holds a model that this command did not make. Nothing was changed. "
                    "Use that model, move it away, or choose another --workspace"
                )
            self.folder.write_json(PLAN, self.plan)
        elif old != self.plan:
            changes = "; ".join(differences(old, self.plan))
            raise BeelineError(
                f"{self.folder} was made with other settings: {changes}. Nothing was changed. Use the old settings, choose "
                "another --workspace, or remove that folder to make it again"
            )
        if not more and self.is_complete():
            if not quiet:
                print(f"{self.name}: already complete in {self.folder}", flush=True)
            return False
        return True

    def withdraw(self) -> None:
        """Remove the plan of a stage that kept nothing, so that other settings may use the folder."""
        self.folder.remove(PLAN)

    def is_complete(self) -> bool:
        """Whether `_SUCCESS` exists and every file that it lists has the listed size."""
        done = success_in(self.folder)
        if done is None:
            return False
        sizes = self.folder.sizes()
        return all(sizes.get(name) == size for name, size in done["files"].items())

    def finish(self, *, temporary: tuple[str, ...] = (), **facts: Any) -> None:
        """Write `_SUCCESS`: `facts`, the seconds since this object was made, and the sizes of the stage's files.

        Files whose names start with one of the prefixes in `temporary` are not listed.
        """
        sizes = self.folder.sizes().items()
        files = {name: size for name, size in sizes if name != SUCCESS and not name.startswith(temporary)}
        seconds = round(time.monotonic() - self._started, 1)
        self.folder.write_json(SUCCESS, {"seconds": seconds, **facts, "files": files})
        print(f"{self.name}: complete in {seconds:.0f} s", flush=True)


def require(workspace: Folder, name: str, recipe: str) -> dict[str, Any]:
    """The plan of a complete stage. Raises BeelineError with the command that makes or repairs the stage if it is not."""
    folder = workspace / name
    plan, done = plan_in(folder, layout_of(name)), success_in(folder)
    command = command_for(workspace, name, recipe)
    if plan is None or done is None:
        raise BeelineError(f"{folder} is missing or not complete; make it with: {command}")
    sizes = folder.sizes()
    for file, size in done["files"].items():
        if sizes.get(file) != size:
            state = "is missing" if file not in sizes else f"has {sizes[file]} bytes"
            raise BeelineError(f"{folder}/{file} {state}, expected {size} bytes; repair it with: {command}")
    return plan


def check_fits(workspace: Folder, images: Mapping[str, Any], network: NetworkConfig | None, what: str) -> None:
    """Raise BeelineError unless `network` fits images/ (of plan `images`) in resolution, channels and classes."""
    assert network is not None
    data, where = images["images"], workspace / IMAGES
    if (data["resolution"], data["channels"]) != (network.img_resolution, network.img_channels):
        raise BeelineError(
            f"{where} has {data['channels']} channels at {data['resolution']} pixels; {what} takes {network.img_channels} "
            f"at {network.img_resolution}. Make the two agree"
        )
    if network.label_dim not in (0, data["num_classes"]):
        raise BeelineError(
            f"{where} has {data['num_classes']} classes; {what}.label_dim is {network.label_dim}. "
            "Make the two agree, or set it to 0 for an unconditional model"
        )
