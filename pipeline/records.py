"""plan.json and _SUCCESS as they are read: JSON of the layout that their stage writes, or one line that says what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from beeline.errors import reading
from beeline.files.layout import check_layout
from beeline.files.names import IMAGES, PAIRS, PLAN, SUCCESS
from pipeline.storage import Folder

FILES: dict[str, Any] = {"seconds": float, "files": {}}
# What the report reads of a _SUCCESS in addition.
PAIRS_DONE: dict[str, Any] = {"evaluations": 0, "pairs": 0, "shards": 0, "device_seconds?": {}}
TRAINING_DONE: dict[str, Any] = {"images_seen?": 0}
COST = "cost"
"""Key of what a student's training cost (trainers/cost.py) in its _SUCCESS."""
COST_LAYOUT: dict[str, Any] = {"training?": float, "phases": {}, "pairs?": 0, "inherited": {}}
# What other stages read of a plan.
LAYOUTS: dict[str, Any] = {
    IMAGES: {"images": {"count": 1, "num_classes": 0, "resolution": 1, "channels": 1, "shard_size": 1}},
    PAIRS: {
        "pairs": {"count": 1, "shard_size": 1, "num_steps": 1, "seed": 0, "dtype": str},
        "evaluations": 1,
        "num_classes": 0,
        "shape": [1],
        "sigmas": [float],
    },
}


def plan_in(folder: Folder, layout: Any) -> dict[str, Any] | None:
    """The plan in a stage's folder, None where there is none. Raises BeelineError for another layout (files/layout.py)."""
    try:
        data = folder.read(PLAN)
    except FileNotFoundError:
        return None
    fix = f"move {folder} away and make it again, or restore the file"
    with reading(f"{folder}/{PLAN} is not as its stage writes it", fix):
        plan = json.loads(data)
        check_layout(plan, layout)
        return plan


def cost_in(folder: Folder) -> dict[str, Any] | None:
    """Record of the training cost in a student's folder; None if its _SUCCESS has none. Raises BeelineError as `success_in`
    does."""
    cost = (success_in(folder, {f"{COST}?": COST_LAYOUT}) or {}).get(COST)
    if cost is None:
        return None
    with reading(f"{folder}/{SUCCESS} is not as its stage writes it", "remove it and run the stage's command again"):
        for name, evaluations in cost["phases"].items():
            check_layout({name: evaluations}, {f"{name}?": float}, "phases")
        for name, part in cost["inherited"].items():
            check_layout(part, {"training?": float, "pairs?": 0}, name)
    return cost


def evaluations_of(cost: Mapping[str, Any], phase: str) -> float | None:
    """Evaluations of the training up to and including `phase`, of all of it for any other name; None if they are unknown."""
    names = list(cost["phases"])
    counts = [cost["phases"][name] for name in (names[: names.index(phase) + 1] if phase in names else names)]
    return None if None in counts else sum(counts)


def success_in(folder: Folder, layout: Any = None) -> dict[str, Any] | None:
    """The content of a finished stage's _SUCCESS; None if it is missing. Raises BeelineError for another layout."""
    try:
        data = folder.read(SUCCESS)
    except FileNotFoundError:
        return None
    with reading(f"{folder}/{SUCCESS} is not as its stage writes it", "remove it and run the stage's command again"):
        done = json.loads(data)
        check_layout(done, FILES)
        check_layout(list(done["files"].values()), [0], "files")
        check_layout(done, layout or {})
        check_layout(list((done.get("device_seconds") or {}).values()), [float], "device_seconds")
        return done
