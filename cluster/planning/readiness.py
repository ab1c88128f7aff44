"""Whether a recipe can start: workspace, credentials, settings, weights, images, disk, machines. Nothing expensive is run.

Each check is a line, "ok" or "FAILED" with what to do. RAY_ADDRESS says which cluster; without it the commands start a Ray of
their own, and this machine is looked at. No Ray is started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from beeline.checkpoint import SOLVER
from beeline.config import Recipe, to_dict
from beeline.errors import BeelineError
from cluster.planning.contents import needed_weights
from cluster.planning.nodes import Need, Node, Surroundings, alike, fitting, look_at_cluster, needs
from cluster.planning.stages import stages
from cluster.planning.workspace import Workspace
from pipeline.stage import differences
from pipeline.storage import Folder
from trainers.tracking import check_trackers

PATIENCE = 12.0  # seconds for the workspace to answer


@dataclasses.dataclass(frozen=True)
class Line:
    """What was looked at and found; `fix` is empty where it is as it should be."""

    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"FAILED  {self.what}: {self.found}. {self.fix}" if self.fix else f"ok      {self.what}: {self.found}"


def report(lines: Sequence[Line]) -> None:
    """Print the lines. Raises BeelineError if any failed."""
    failed = [line for line in lines if line.fix]
    for line in lines:
        print(line, flush=True)
    if failed:
        raise BeelineError(f"{len(failed)} of {len(lines)} checks failed: {', '.join(line.what for line in failed)}")


def check_all(recipe: Recipe, there: Workspace, teacher: str) -> list[Line]:
    """Every check. `there.trouble` is what `access` found; `teacher` is "train" or "import"."""
    place = there.place
    if there.trouble:
        lines = [Line("workspace", f"{place}: {there.trouble}", _cure(there.trouble, place))]
    else:
        shared = place.is_local and bool(os.environ.get("RAY_ADDRESS"))
        note = "; every machine of the cluster must see it under this path" if shared else ""
        lines = [Line("workspace", f"{place} can be written, listed, read and emptied{note}")]
        lines += [_progress(recipe, there), _settings(recipe, there), _weights(recipe, there), _teacher(recipe, there, teacher)]
        lines += [_images(recipe, there)]
        if place.is_local:
            lines.append(_disk(recipe, there, teacher))
    trackers = dict.fromkeys(name for lmm in recipe.students.values() for name in lmm.trackers)
    if trackers:
        lines.append(_tried("trackers", lambda: check_trackers(list(trackers)), f"{', '.join(trackers)} are installed"))
    return [*lines, *_machines(recipe, there, teacher)]


def access(place: Folder) -> str:
    """Write, list, read and remove a small file of a name of its own; what went wrong, or "". Folders made for it go."""
    made = _missing(Path(place.uri)) if place.is_local else []
    trouble: list[str] = []

    def attempt() -> None:
        name, data = f"ready-{uuid.uuid4().hex}", os.urandom(64)
        try:
            place.write(name, data)
            try:
                if name not in place.sizes():
                    trouble.append("a file that was written is not listed")
                elif place.read(name) != data:
                    trouble.append("a file that was written comes back with other bytes")
            finally:
                place.remove(name)
        except Exception as error:  # whatever a client of object storage raises is to be told, not to end the check
            trouble.append(" ".join(_root(error).split()).rstrip("."))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        return f"no answer within {PATIENCE:.0f} s"
    for folder in made:
        with contextlib.suppress(OSError):  # somebody else uses it by now
            folder.rmdir()
    return "; ".join(trouble)


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist, the deepest first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _root(error: BaseException) -> str:
    """What is at the bottom of an error, with its kind, where causes are given."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    return str(error) if root is error else f"{type(root).__name__}: {root}"


def _cure(trouble: str, place: Folder) -> str:
    """In plain words, what to do about a workspace that cannot be used."""
    found = trouble.lower()
    if place.is_local:
        return "Give --workspace a folder that may be written, with space left"
    keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role of the machine"
    if "nocredentials" in found or "locate credentials" in found:
        return f"There are no credentials: set {keys}"
    if any(word in found for word in ("invalidaccesskey", "access key id", "signature", "expired", "token")):
        return f"The credentials are wrong or have expired: set {keys} anew"
    if any(word in found for word in ("nosuchbucket", "bucket does not exist", "filenotfound")):
        return "There is no such bucket: make it, or mend the name"
    if any(word in found for word in ("denied", "forbidden", "403", "permission")):
        return "The credentials are not let in: check them, and that they may list, get, put and delete objects of this bucket"
    if any(word in found for word in ("endpoint", "connect", "no answer", "timed out", "timeout")):
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "not set")
        return f"Nobody answers: check AWS_ENDPOINT_URL ({endpoint}), region, network and proxy"
    return "Check the URI, AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and the credentials"


def _progress(recipe: Recipe, there: Workspace) -> Line:
    names = ["images", "probe", "teacher", "pairs", *(f"students/{lmm.name}" for lmm in recipe.students.values())]
    done = [name for name in [*names, f"sweeps/{recipe.sweep.name}"] if there.complete(name)]
    return Line("progress", f"finished already: {', '.join(done)}" if done else "nothing is finished yet")


def _settings(recipe: Recipe, there: Workspace) -> Line:
    """What is there must have been made with these settings, or its stage would refuse to go on."""
    wanted: dict[str, tuple[str, Any]] = {
        "images": ("images", recipe.images),
        "probe": ("probe", recipe.probe),
        "pairs": ("pairs", recipe.pairs),
        f"sweeps/{recipe.sweep.name}": ("sweep", recipe.sweep),
        **{f"students/{student.name}": ("student", student) for student in recipe.students.values()},
    }
    if not there.imported:
        wanted["teacher"] = ("teacher", recipe.teacher)
    found = []
    for folder, (section, config) in wanted.items():
        plan = there.plan(folder)
        if plan and isinstance(plan.get(section), dict):
            settings = to_dict(config, resources=False)
            made = {key: plan[section].get(key) for key in settings}
            found += differences(made, settings, f"{folder}: {section}")
    if found:
        return Line("settings", f"made with others: {'; '.join(found)}", "Use those that are there, or another --workspace")
    return Line("settings", "agree with those of what is there")


def _weights(recipe: Recipe, there: Workspace) -> Line:
    names = needed_weights(recipe)
    if not names:
        return Line("weights", "none are needed")
    place = there.place / "weights"
    missing = [name for name in names if not there.weights(name)]
    if not missing:
        return Line("weights", f"{', '.join(names)} are in {place}")
    where = str(place) if place.is_local else f"FOLDER, and copy FOLDER to {place}"
    fix = f"Fetch them, where there is internet, with: python -m beeline.weights fetch {' '.join(missing)} --out {where}"
    return Line("weights", f"{', '.join(missing)} are not in {place}", fix)


def _teacher(recipe: Recipe, there: Workspace, how: str) -> Line:
    network, place = recipe.teacher.network, there.place / "teacher"
    target = place if place.is_local else f"FOLDER, and copy FOLDER to {place}"
    by_hand = f"python -m beeline.edm_import FILE.pkl --out {target}"
    if not there.teacher:
        if how == "import":
            return Line("teacher", f"none in {place}", f"Import one with: {by_hand}")
        return Line("teacher", f"will be trained; a released one may be imported instead: {by_hand}")
    made = there.network
    asked = {name: getattr(network, name) for name in ("img_resolution", "img_channels", "label_dim")}
    other = differences({name: made.get(name) for name in asked}, asked)
    if other:
        fix = "Import or train one that fits, or change teacher.network"
        return Line("teacher", f"the one in {place} does not fit: {'; '.join(other)}", fix)
    if recipe.pairs.solver == "calibrated" and not there.calibrated:
        return Line("teacher", f"{place}/{SOLVER} is missing", f"Make it with: python -m beeline.calibrate {place}")
    return Line("teacher", f"imported from {there.imported}" if there.imported else f"in {place}")


def _images(recipe: Recipe, there: Workspace) -> Line:
    source = recipe.images.source
    if there.complete("images"):
        return Line("images", f"{there.images:,} are there")
    if source == "digits":
        return Line("images", "scikit-learn's digits, built in")
    if os.path.exists(source) and os.access(source, os.R_OK):
        where = "; every machine of the cluster must see it under this path" if os.environ.get("RAY_ADDRESS") else ""
        return Line("images", f"{source} is there{where}")
    return Line("images", f"{source} is not there, or may not be read", "Give --images.source a path (README: Your own images)")


def _disk(recipe: Recipe, there: Workspace, teacher: str) -> Line:
    folder = Path(there.place.uri)
    while not folder.exists():
        folder = folder.parent
    found = stages(recipe, there, teacher)
    needed = sum(stage.stored for stage in found) + max(stage.passing for stage in found)
    needed -= sum(file.stat().st_size for file in Path(there.place.uri, "pairs").glob("part-*"))
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:,.1f} GB are free in {folder}, {max(needed, 0.0) / 1e9:,.1f} GB are needed by what is left"
    return Line("disk", text, "" if free > needed else "Free some, or give --workspace a larger place")


def _tried(what: str, call: Callable[[], Any], found: str) -> Line:
    try:
        call()
    except BeelineError as error:
        return Line(what, str(error), "See the message")
    return Line(what, found)


def _machines(recipe: Recipe, there: Workspace, teacher: str) -> list[Line]:
    asked = list(needs(recipe, there, teacher))
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            around = look_at_cluster(address)
        except BeelineError as error:
            return [Line("cluster", str(error), "See the message")]
        lines = [Line("cluster", f"{address}: {around}"), Line("versions", around.versions, around.mismatch)]
    else:
        gpus = torch.cuda.device_count()
        cpus = max(4, os.cpu_count() or 1)  # as pipeline.runtime tells Ray
        around = Surroundings(nodes=[Node(cpus, gpus)])
        lines = [Line("machine", f"this one, {os.cpu_count()} cores, {gpus} GPUs")]
    lines += [line for need in alike(asked) if (line := room(need, around)).fix]
    if all(not line.fix for line in lines):
        most = max(asked, key=lambda need: need.gpus * need.most)
        wish = f"; {most.stage} could use up to {most.gpus * most.most:g} GPUs" if most.gpus else "; no stage asks for GPUs"
        lines.append(Line("room", f"for every stage{wish}"))
    return lines


def room(need: Need, around: Surroundings) -> Line:
    """Whether the processes that must run at once fit on the nodes, those included that an autoscaler may add."""
    fits = sum(fitting(need, node) for node in around.nodes)
    later = sum(fitting(need, node) * node.count for node in around.promised)
    each = f"{need.gpus:g} GPU and {need.cpus:g} CPU" if need.gpus else f"{need.cpus:g} CPU"
    room = max(fits, later)  # what runs already is among what the autoscaler may bring
    if room >= need.least:
        return Line(need.stage, f"{need.least} x {each} have room")
    found = f"{need.least} x {each} are asked for at once; {around} has room for {room}"
    return Line(need.stage, found, f"It would wait for ever: add machines, or ask for less ({need.option})")
