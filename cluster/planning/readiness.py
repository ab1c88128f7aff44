"""Check that a recipe can start: workspace, credentials, settings, weights, images, disk, machines. Nothing expensive runs.

Each check prints a line: "ok", or "FAILED" with a fix. With RAY_ADDRESS set, the cluster is checked, else this machine. The
checks do not start Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from beeline.checkpoint import CONFIG, SOLVER
from beeline.config import Recipe, to_dict
from beeline.errors import BeelineError, reading
from beeline.files.layout import check_layout
from beeline.files.names import pairs_folder
from cluster.planning.nodes import Need, Node, Surroundings, look_at_cluster
from cluster.planning.stages import StageCost, stages
from cluster.planning.workspace import Workspace
from cluster.steps import makers, needed_weights
from pipeline.runtime import logical_cpus
from pipeline.stage import differences
from pipeline.storage import Folder
from trainers.tracking import check_trackers

PATIENCE = 12.0  # seconds for the workspace to answer
SHARED = "every machine of the cluster must see it under this path"


@dataclasses.dataclass(frozen=True)
class Line:
    """A check, its result, and the fix ("" if the check passed)."""

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
    """Run every check. `there.trouble` is the result of `access`; `teacher` is "train" or "import". Raises BeelineError for
    settings that a stage refuses."""
    place, left = there.uri, stages(recipe, there, teacher)
    if there.trouble:
        lines = [Line("workspace", f"{place}: {there.trouble}", _cure(there.trouble, place))]
    else:
        note = f"; {SHARED}" if place.is_local and os.environ.get("RAY_ADDRESS") else ""
        lines = [Line("workspace", f"{place} can be written, listed, read and emptied{note}")]
        lines += [_progress(recipe, there), _settings(recipe, there), _weights(recipe, there), _teacher(recipe, there, teacher)]
        lines += [_images(recipe, there), *([_disk(place, left)] if place.is_local else [])]
    if trackers := list(dict.fromkeys(name for student in recipe.students.values() for name in student.trackers)):
        try:
            check_trackers(trackers)
            lines.append(Line("trackers", f"{', '.join(trackers)} are installed"))
        except BeelineError as error:
            lines.append(Line("trackers", str(error), "See the message"))
    return [*lines, *_machines(needs(left))]


def access(place: Folder) -> str:
    """Write, list, read and remove a small file. Returns the error, or "". Removes the folders that it created."""
    path = Path(place.uri)
    made = [folder for folder in (path, *path.parents) if not folder.exists()] if place.is_local else []  # the deepest first
    trouble: list[str] = []

    def attempt() -> None:
        name, data = f"ready-{uuid.uuid4().hex}", os.urandom(64)
        try:
            place.write(name, data)
            try:
                if name not in place.sizes():
                    trouble.append("a written file is not listed")
                elif place.read(name) != data:
                    trouble.append("a written file is read back with other bytes")
            finally:
                place.remove(name)
        except Exception as error:  # clients of object storage raise many types
            trouble.append(" ".join(_root(error).split()).rstrip("."))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        return f"no answer within {PATIENCE:.0f} s"
    for folder in made:
        with contextlib.suppress(OSError):  # another process may use it by now
            folder.rmdir()
    return "; ".join(trouble)


def _root(error: BaseException) -> str:
    """The root cause of an error, with its type."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    return str(error) if root is error else f"{type(root).__name__}: {root}"


def _cure(trouble: str, place: Folder) -> str:
    """The fix for a workspace that cannot be used."""
    if place.is_local:
        return "Set --workspace to a writable folder with free space"
    return next((cure for words, cure in CURES if any(word in trouble.lower() for word in words)), UNKNOWN).format(
        keys="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role of the machine",
        endpoint=os.environ.get("AWS_ENDPOINT_URL", "not set"),
    )


CURES = (  # words in the error of an object storage client, and the fix
    (("nocredentials", "locate credentials"), "No credentials were found: set {keys}"),
    (
        ("invalidaccesskey", "access key id", "signature", "expired", "token"),
        "The credentials are wrong or have expired: set {keys} again",
    ),
    (("nosuchbucket", "bucket does not exist", "filenotfound"), "The bucket does not exist: create it, or correct the name"),
    (
        ("denied", "forbidden", "403", "permission"),
        "Access is denied: the credentials need permission to list, get, put and delete objects of this bucket",
    ),
    (
        ("endpoint", "connect", "no answer", "timed out", "timeout"),
        "The endpoint does not answer: check AWS_ENDPOINT_URL ({endpoint}), region, network and proxy",
    ),
)
UNKNOWN = "Check the URI, AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and the credentials"


def _progress(recipe: Recipe, there: Workspace) -> Line:
    names = ["images", "probe", "teacher", "pairs", *(f"students/{lmm.name}" for lmm in recipe.students.values())]
    names += map(pairs_folder, makers(recipe))
    done = [name for name in [*names, f"sweeps/{recipe.sweep.name}"] if there.complete(name)]
    return Line("progress", f"already finished: {', '.join(done)}" if done else "nothing is finished yet")


def _settings(recipe: Recipe, there: Workspace) -> Line:
    """Check that existing plans have these settings; their stages refuse to continue with others."""
    wanted: dict[str, tuple[str, Any]] = {
        "images": ("images", recipe.images),
        "probe": ("probe", recipe.probe),
        **{pairs_folder(model): ("pairs", recipe.pairs_of(model)) for model in ("teacher", *makers(recipe))},
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
            known = settings.keys() | {field.name for field in dataclasses.fields(config)}  # also those left out as defaults
            made = {key: value for key, value in plan[section].items() if key in known}
            found += differences(made, settings, f"{folder}: {section}")
    if found:
        return Line(
            "settings", f"the workspace has other settings: {'; '.join(found)}", "Use those settings, or another --workspace"
        )
    return Line("settings", "match those in the workspace")


def _weights(recipe: Recipe, there: Workspace) -> Line:
    names = needed_weights(recipe)
    if not names:
        return Line("weights", "none are needed")
    place = there.place / "weights"
    missing = [name for name in names if not there.weights(name)]
    if not missing:
        return Line("weights", f"{', '.join(names)} are in {place}")
    where = str(place) if place.is_local else f"FOLDER, and copy FOLDER to {place}"
    fix = f"Fetch them on a machine with internet access: python -m beeline.weights fetch {' '.join(missing)} --out {where}"
    return Line("weights", f"{', '.join(missing)} are not in {place}", fix)


def _teacher(recipe: Recipe, there: Workspace, how: str) -> Line:
    place = there.place / "teacher"
    target = place if place.is_local else f"FOLDER, and copy FOLDER to {place}"
    by_hand = f"python -m beeline.edm_import FILE.pkl --out {target}"
    if not there.teacher:
        if how == "import":
            return Line("teacher", f"none in {place}", f"Import one with: {by_hand}")
        return Line("teacher", f"will be trained; to import a released one instead: {by_hand}")
    with reading(f"{place}/{CONFIG} does not describe a network", "make or copy the model again"):
        config = place.read_json(CONFIG)
        check_layout(config, {"network": {}})
    asked = {name: getattr(recipe.teacher.network, name) for name in ("img_resolution", "img_channels", "label_dim")}
    other = differences({name: config["network"].get(name) for name in asked}, asked)
    if other:
        fix = "Import or train one that fits, or change teacher.network"
        return Line("teacher", f"the one in {place} does not fit the recipe: {'; '.join(other)}", fix)
    if recipe.pairs.solver == "calibrated" and not there.levels:
        return Line("teacher", f"{place}/{SOLVER} is missing", f"Make it with: python -m beeline.calibrate {place}")
    return Line("teacher", f"imported from {there.imported}" if there.imported else f"in {place}")


def _images(recipe: Recipe, there: Workspace) -> Line:
    source = recipe.images.source
    if there.complete("images"):
        return Line("images", f"{there.images[0]:,} are in the workspace")
    if source == "digits":
        return Line("images", "scikit-learn's digits, built in")
    if os.path.exists(source) and os.access(source, os.R_OK):
        return Line("images", f"{source} is readable{f'; {SHARED}' if os.environ.get('RAY_ADDRESS') else ''}")
    return Line(
        "images", f"{source} does not exist, or cannot be read", "Set --images.source to a path (docs/your-own-data.md)"
    )


def _disk(place: Folder, left: Sequence[StageCost]) -> Line:
    folder = next(path for path in (Path(place.uri), *Path(place.uri).parents) if path.exists())
    needed = sum(stage.stored for stage in left) + max(
        stage.peak(stage.jobs[0].need.most if stage.jobs else 0) for stage in left
    )
    needed -= sum(file.stat().st_size for file in Path(place.uri).glob("**/pairs/part-*"))
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:,.1f} GB are free in {folder}, the remaining stages need {max(needed, 0.0) / 1e9:,.1f} GB"
    return Line("disk", text, "" if free > needed else "Free some space, or set --workspace to a larger disk")


def needs(left: Sequence[StageCost]) -> list[Need]:
    """The processes that stages request."""
    return list(dict.fromkeys(job.need for stage in left for job in stage.jobs))


def _machines(asked: Sequence[Need]) -> list[Line]:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            around = look_at_cluster(address)
        except BeelineError as error:
            return [Line("cluster", str(error), "See the message")]
        lines = [Line("cluster", f"{address}: {around}"), Line("versions", around.versions, around.mismatch)]
    else:
        gpus = torch.cuda.device_count()
        around = Surroundings(nodes=[Node(logical_cpus(), gpus)])
        lines = [Line("machine", f"this one, {os.cpu_count()} cores, {gpus} GPUs")]
    same: dict[tuple[float, ...], list[Need]] = {}
    for need in asked:
        same.setdefault((need.least, need.gpus, need.cpus), []).append(need)
    for group in same.values():  # stages with the same request share a line
        stage, option = (separator.join(dict.fromkeys(getattr(n, name) for n in group))
                         for name, separator in (("stage", ", "), ("option", " ")))  # fmt: skip
        lines += [line for line in [room(dataclasses.replace(group[0], stage=stage, option=option), around)] if line.fix]
    if asked and all(not line.fix for line in lines):
        most = max(asked, key=lambda need: need.gpus * need.most)
        wish = f"; {most.stage} could use up to {most.gpus * most.most:g} GPUs" if most.gpus else "; no stage requests GPUs"
        lines.append(Line("room", f"enough for every stage{wish}"))
    return lines


def room(need: Need, around: Surroundings) -> Line:
    """Check that the processes that must run at once fit on the nodes, or on those that an autoscaler may run."""
    now = sum(need.fitting(node) for node in around.nodes)
    later = sum(need.fitting(node) * node.count for node in around.promised)  # includes the running nodes
    each = f"{need.gpus:g} GPU and {need.cpus:g} CPU" if need.gpus else f"{need.cpus:g} CPU"
    if max(now, later) >= need.least:
        return Line(need.stage, f"{need.least} x {each} have room")
    found = f"{need.least} x {each} are requested at once; {around} has room for {max(now, later)}"
    return Line(need.stage, found, f"It would wait forever: add machines, or request less ({need.option})")
