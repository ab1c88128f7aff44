"""Rehearse a recipe: run every stage at full size for a few steps, shards and rows. Shows errors, speed and memory.

    python cluster/rehearse.py cifar10 --workspace s3://bucket/cifar10
    python cluster/rehearse.py cifar10 --workspace runs/cifar10 --cpu --ranks 2 --weights random

Networks, ranks, precision, compilation, feature networks and storage are those of the recipe. All results go to
<workspace>/rehearsal, a separate workspace that each rehearsal empties first. Only teacher and weights are read from the real
workspace. estimate.py takes its speeds from rehearsal/rehearsal.json.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import dataclasses
import gc
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import ray
import torch
import tyro

from beeline.checkpoint import WEIGHTS
from beeline.config import Recipe
from beeline.errors import BeelineError
from beeline.machine import describe
from cluster.planning.nodes import Surroundings, look_at_cluster, needs
from cluster.planning.readiness import room
from cluster.planning.workspace import RECORD, REHEARSAL, Workspace
from cluster.rehearsal import substitutes
from cluster.rehearsal.memory import Memory
from cluster.rehearsal.outcome import Outcome, reason, text, with_figures
from cluster.rehearsal.shrink import CPU_BATCH, shrunk, verification
from cluster.steps import Step, check_recipe, evaluation, made_by, models, steps
from pipeline.command import run_command
from pipeline.runtime import ensure_ray
from pipeline.stage import SUCCESS
from pipeline.storage import Folder
from pipeline.verify_pairs import verify_pairs
from trainers import checkpoints
from trainers.log import read_log


def rehearse(
    workspace: str,
    recipe: Annotated[Recipe, tyro.conf.arg(name="")],
    cpu: bool = False,
    ranks: int = 0,
    weights: Literal["pretrained", "random"] = "pretrained",
) -> None:
    """Rehearse every stage of the recipe; settings of any stage can be overridden.

    Args:
        workspace: Local folder or s3://bucket/prefix. Only its folder rehearsal/ is written.
        cpu: Run without GPUs: gloo between ranks, fp32, no compilation, tiny batches.
        ranks: Processes of every training, instead of its workers.count; 0 keeps that.
        weights: "random" uses random weights for pretrained networks that <workspace>/weights lacks.
    """
    if ranks < 0:
        raise BeelineError(f"--ranks is {ranks}; expected the number of training processes, or 0 for the recipe's own")
    real, small = Workspace(workspace, recipe), shrunk(recipe, cpu=cpu, ranks=ranks)
    check_recipe(recipe)
    if real.trouble:
        raise BeelineError(real.trouble)
    folder = real.place / REHEARSAL
    again = clear(folder)
    print(f"rehearsal: {recipe.name} in {folder}{', emptied first' if again else ''}", flush=True)
    if cpu:
        print(
            f"rehearsal: on CPUs: gloo, fp32, no compilation, {CPU_BATCH} images per batch and rank; not the speed of a GPU",
            flush=True,
        )
    rehearsal = Rehearsal(real, folder, small, mode="cpu" if cpu else "full")
    for step in all_steps(real, folder, small, rehearsal.works, random=weights == "random"):
        rehearsal.attempt(step)
    rehearsal.finish()


def all_steps(real: Workspace, folder: Folder, recipe: Recipe, works: Callable[[str], bool], *, random: bool) -> Iterator[Step]:
    """The steps of run_pipeline.py, a check of the pairs, and a resumed training.

    One step measures all students whose training has not failed, as `works(stage)` tells.
    """
    yield from substitutes.pretrained(real, folder, recipe, random=random)
    main, given = f"students/{recipe.main.name}", substitutes.teacher(real, folder)
    for step in steps(folder.uri, recipe):
        if step.name == "evaluation":
            measured = models(recipe)
            students = {name: schedules for name, schedules in measured.items() if name != "teacher" and works(made_by(name))}
            yield evaluation(folder.uri, recipe, {"teacher": measured["teacher"]}, "evaluation/teacher")
            if students:
                yield evaluation(folder.uri, recipe, students, "evaluation/students")
            continue
        yield given if given and step.name == given.name else step
        if step.name == "pairs":
            check = partial(verify_pairs, folder.uri, recipe.name, verification(recipe.pairs))
            yield Step(name="pairs (verified)", run=check, after=("pairs",))
        if step.name == main:
            yield Step(name=f"{main} (resumed)", run=partial(resume, folder / main, step.run), after=(main,))


def resume(folder: Folder, train: Callable[[], Any]) -> str:
    """Resume from the last checkpoint, as after a killed run. Returns a note that says whether the weights are the same."""
    saved, log, before = checkpoints.steps(folder), read_log(folder), folder.read(WEIGHTS)
    if not saved:
        raise BeelineError(f"{folder} has no checkpoint to go on from")
    folder.remove(SUCCESS)
    train()
    kept = [row for row in log if row["step"] <= saved[-1]]
    if read_log(folder)[: len(kept)] != kept:
        raise BeelineError(f"{folder} was trained from its start, not from its checkpoint of step {saved[-1]}")
    same = folder.read(WEIGHTS) == before
    return f"from step {saved[-1]}, {'the same weights to the last bit' if same else 'not the same weights to the last bit'}"


class Rehearsal:
    """The outcomes of all steps so far. Writes rehearsal.json at the start and after every step."""

    def __init__(self, real: Workspace, folder: Folder, recipe: Recipe, *, mode: str) -> None:
        self.real, self.folder, self.recipe = real, folder, recipe
        self.rows: list[Outcome] = []
        how = "import" if real.teacher else "train"
        self.needs = {need.stage: need for need in needs(recipe, Workspace(folder.uri, recipe), how)}
        self.about: dict[str, Any] = {"recipe": recipe.name, "mode": mode, "complete": False}
        self.about["machine"] = describe(torch.device("cpu"))
        self._write()
        ensure_ray()
        self.around = look_at_cluster(ray.get_runtime_context().gcs_address)
        self.about["machine"] = machine(self.around, max(need.gpus for need in self.needs.values()))
        self.memory = Memory()

    def attempt(self, step: Step) -> None:
        """Run a step unless one that it needs has failed. Record time and memory, and print its line."""
        missing = [name for name in step.after if not self.works(name)]
        trouble = f"not tried: needs {', '.join(missing)}" if missing else self._no_room(step.name)
        begun, note = time.monotonic(), ""
        row = Outcome(stage=step.name, ok=not trouble, reason=trouble)
        if not trouble:
            self.memory.begin()
            try:
                note = step.run() or ""
            except Exception as error:  # the error becomes the stage's line, and the other stages still run
                cause = reason(error).replace(str(self.folder / "weights"), str(self.real.place / "weights"))
                row = replace(row, ok=False, reason=cause)
            seconds, peak = time.monotonic() - begun, self.memory.end()
            row = replace(row, seconds=round(seconds, 2), peak_mb=peak.process, gpu_mb=peak.gpu, note=note)
            if row.ok:
                row = with_figures(row, step.folders or (step.name,), Workspace(self.folder.uri, self.recipe))
        self.rows.append(row)
        print(f"rehearsal: {text(row)}", flush=True)
        self._write()
        gc.collect()

    def works(self, stage: str) -> bool:
        """Whether no attempt of the stage has failed so far."""
        return all(row.ok for row in self.rows if row.stage == stage)

    def _no_room(self, name: str) -> str:
        """The reason why the cluster can never run the stage, or ""."""
        need = next((need for stage, need in self.needs.items() if name == stage or name.startswith(f"{stage}/")), None)
        line = room(need, self.around) if need else None
        return f"{line.found}. {line.fix}" if line and line.fix else ""

    def finish(self) -> None:
        """Print all lines. Raises BeelineError if a stage failed."""
        self.about["complete"] = True
        self._write()
        width = max(len(row.stage) for row in self.rows)
        print(f"\nrehearsal of {self.recipe.name}, {self.folder}/{RECORD}", flush=True)
        for row in self.rows:
            print(text(row, width), flush=True)
        if stand_ins := self._substitutes():
            print(f"stand-ins: {'; '.join(f'{stage}: {note}' for stage, note in stand_ins.items())}", flush=True)
        failed = [row.stage for row in self.rows if not row.ok]
        if failed:
            raise BeelineError(f"{len(failed)} of {len(self.rows)} stages do not work yet: {', '.join(failed)}")

    def _substitutes(self) -> dict[str, str]:
        return {row.stage: row.note for row in self.rows if row.note == substitutes.RANDOM}

    def _write(self) -> None:
        rows: Sequence[dict[str, Any]] = [dataclasses.asdict(row) for row in self.rows]
        self.folder.write_json(RECORD, self.about | {"substitutes": self._substitutes(), "stages": rows})


def machine(around: Surroundings, gpus: float) -> dict[str, Any]:
    """Description of a machine of the cluster. It has GPUs if the recipe needs them (`gpus` above 0) and any machine does."""
    use_gpu = gpus > 0 and any(node.gpus > 0 for node in [*around.nodes, *around.promised])
    remote = ray.remote(num_cpus=0, num_gpus=min(1.0, gpus) if use_gpu else 0, max_calls=1)(describe)
    return ray.get(remote.options(name="describe").remote(torch.device("cuda" if use_gpu else "cpu")))


def clear(folder: Folder) -> bool:
    """Empty the folder of an earlier rehearsal. Returns whether there was one. Raises BeelineError for other contents."""
    files, folders = folder.sizes(), folder.folders()
    if not files and not folders:
        return False
    record = folder.read_json(RECORD)
    if not isinstance(record, dict) or "stages" not in record:
        raise BeelineError(
            f"{folder} holds {', '.join([*folders, *files][:3])} and no {RECORD}: no rehearsal made it, and nothing was "
            "removed. Move it away"
        )
    if folder.is_local:
        for path in Path(folder.uri).iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != RECORD:  # it marks the folder as a rehearsal's until all is removed
                path.unlink()
    else:
        _remove(folder, keep=RECORD)
    return True


def _remove(folder: Folder, keep: str = "") -> None:
    for name in folder.folders():
        _remove(folder / name)
    for name in folder.sizes():
        if name != keep:
            folder.remove(name)


if __name__ == "__main__":
    run_command(rehearse)
