"""What all stages share: a plan that says what is being made, and a marker that says it is complete.

Every stage owns a folder of the workspace. plan.json is written first and fixes what goes there; a different plan in the
same place is refused with the difference named, never mixed. `_SUCCESS` comes last and holds the time it took.
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
from beeline.files.names import EVALUATION, IMAGES, PAIRS, PROBE, STUDENTS, SWEEPS, TEACHER
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


def fingerprint(plan: Any) -> str:
    """SHA-256 of a plan: equal for equal plans, whatever the order of keys."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Where two plans differ, as "pairs.count: 5000 there, 2000 asked for"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)]
    return [] if old == new else [f"{at}: {old} there, {new} asked for"]


class Stage:
    """A stage's folder `name` in the workspace, and its plan (JSON-ready; config and digests of inputs)."""

    def __init__(self, workspace: Folder, name: str, plan: Mapping[str, Any]) -> None:
        self.name = name
        self.folder = workspace / name
        self.plan: dict[str, Any] = json.loads(json.dumps(plan))  # as it will be read back
        self._started = time.monotonic()

    def begin(self, *, more: bool = False, quiet: bool = False) -> bool:
        """Take the folder for this plan. True if work is left; False, with a line said unless `quiet`, if the stage is
        complete and there is no `more` to add to it.

        Raises BeelineError if the folder holds another plan's work, or cannot be written.
        """
        found = plan_in(self.folder, {})
        if found is None:
            if WEIGHTS in self.folder.sizes():
                raise BeelineError(
                    f"{self.folder} holds a model that this command did not make; it is left alone. "
                    "Use it as it is, move it away, or choose another --workspace"
                )
            self.folder.write_json(PLAN, self.plan)
        elif found != self.plan:
            changes = "; ".join(differences(found, self.plan))
            raise BeelineError(
                f"{self.folder} was made with other settings: {changes}. Nothing was changed. Use the settings that are "
                "there, choose another --workspace, or remove that folder to make it anew"
            )
        if not more and self.is_complete():
            if not quiet:
                print(f"{self.name}: already complete in {self.folder}", flush=True)
            return False
        return True

    def withdraw(self) -> None:
        """Take the plan back: nothing was kept that was made by it, and other settings may take the folder."""
        self.folder.remove(PLAN)

    def is_complete(self) -> bool:
        """Whether `_SUCCESS` is there and every file it lists has the size it had."""
        done = success_in(self.folder)
        if done is None:
            return False
        sizes = self.folder.sizes()
        return all(sizes.get(name) == size for name, size in done["files"].items())

    def finish(self, *, temporary: tuple[str, ...] = (), **facts: Any) -> None:
        """Write `_SUCCESS`: `facts`, the seconds since this stage was made and the sizes of its files, but for those whose
        names begin as `temporary` ones do."""
        sizes = self.folder.sizes().items()
        files = {name: size for name, size in sizes if name != SUCCESS and not name.startswith(temporary)}
        seconds = round(time.monotonic() - self._started, 1)
        self.folder.write_json(SUCCESS, {"seconds": seconds, **facts, "files": files})
        print(f"{self.name}: complete in {seconds:.0f} s", flush=True)


def require(workspace: Folder, name: str, recipe: str) -> dict[str, Any]:
    """The plan of a complete stage. Raises BeelineError naming the command that makes it, or remakes what is damaged."""
    folder = workspace / name
    plan, done = plan_in(folder, LAYOUTS.get(name, {})), success_in(folder)
    command = f"python {MADE_BY[name.split('/')[0]]} {recipe} --workspace {workspace}"
    if plan is None or done is None:
        raise BeelineError(f"{folder} is missing or not complete; make it with: {command}")
    sizes = folder.sizes()
    for file, size in done["files"].items():
        if sizes.get(file) != size:
            found = "is missing" if file not in sizes else f"has {sizes[file]} bytes"
            raise BeelineError(f"{folder}/{file} {found}, expected {size} bytes; mend it with: {command}")
    return plan


def check_fits(workspace: Folder, images: Mapping[str, Any], network: NetworkConfig | None, what: str) -> None:
    """Raise BeelineError unless `network` takes what images/ (of plan `images`) holds: resolution, channels, classes."""
    assert network is not None
    found, where = images["images"], workspace / IMAGES
    if (found["resolution"], found["channels"]) != (network.img_resolution, network.img_channels):
        raise BeelineError(
            f"{where} has {found['channels']} channels at {found['resolution']} pixels; {what} takes {network.img_channels} "
            f"at {network.img_resolution}. Make the two agree"
        )
    if network.label_dim not in (0, found["num_classes"]):
        raise BeelineError(
            f"{where} has {found['num_classes']} classes; {what}.label_dim is {network.label_dim}. "
            "Make the two agree, or set it to 0 for an unconditional model"
        )
