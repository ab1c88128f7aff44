"""Run every stage of a recipe at full size for a few steps, shards and rows: finds failures, speeds and memory use.

    python cluster/rehearse.py cifar10 --workspace s3://bucket/cifar10
    python cluster/rehearse.py cifar10 --workspace runs/cifar10 --cpu --ranks 2 --weights random

Networks, ranks, precision, compilation, feature networks and storage are those of the recipe. All output goes to
<workspace>/rehearsal, a separate workspace that each rehearsal empties first. From the real workspace it reads only the teacher
and the weights. estimate.py takes its speeds from rehearsal/rehearsal.json.
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
from beeline.files.names import EVALUATION, STUDENTS, SUCCESS, TEACHER, maker_of_pairs
from beeline.machine import describe
from cluster.planning.nodes import Surroundings, look_at_cluster
from cluster.planning.readiness import needs, room
from cluster.planning.stages import stages
from cluster.planning.workspace import RECORD, REHEARSAL, Workspace
from cluster.rehearsal import substitutes
from cluster.rehearsal.memory import Memory
from cluster.rehearsal.outcome import Outcome, reason, text, with_figures
from cluster.rehearsal.shrink import CPU_BATCH, shrunk, verification
from cluster.steps import Step, check_recipe, evaluation, made_by, models, steps
from pipeline.command import run_command
from pipeline.runtime import ensure_ray
from pipeline.storage import Folder
from pipeline.training_log import STEP, read_log
from pipeline.verify_pairs import verify_pairs
from trainers import checkpoints


def rehearse(
    workspace: str,
    recipe: Annotated[Recipe, tyro.conf.arg(name="")],
    cpu: bool = False,
    ranks: int = 0,
    weights: Literal["pretrained", "random"] = "pretrained",
) -> None:
    """Try every stage of the recipe; settings of any stage can be overridden.

    Args:
        workspace: Local folder or s3://bucket/prefix. Only its folder rehearsal/ is written.
        cpu: Run without GPUs: gloo, fp32, no compilation, tiny batches.
        ranks: Training processes, instead of every training's workers.count; 0 keeps those.
        weights: "random" replaces pretrained networks missing in <workspace>/weights by random ones.
    """
    if ranks < 0:
        raise BeelineError(f"--ranks is {ranks}; expected a number of training processes, or 0 for those of the recipe")
    there, small = Workspace(workspace, recipe), shrunk(recipe, cpu=cpu, ranks=ranks)
    check_recipe(recipe)
    if there.trouble:
        raise BeelineError(there.trouble)
    here = there.place / REHEARSAL
    again = clear(here)
    print(f"rehearsal: {recipe.name} in {here}{', emptied first' if again else ''}", flush=True)
    if cpu:
        print(
            f"rehearsal: on CPUs: gloo, fp32, no compilation, {CPU_BATCH} images per batch and rank; no GPU speeds", flush=True
        )
    rehearsal = Rehearsal(there, here, small, mode="cpu" if cpu else "full")
    for step in all_steps(there, here, small, rehearsal.works, random=weights == "random"):
        rehearsal.attempt(step)
    rehearsal.finish()


def all_steps(there: Workspace, here: Folder, recipe: Recipe, works: Callable[[str], bool], *, random: bool) -> Iterator[Step]:
    """List the steps of run_pipeline.py, plus a check of the pairs and a resumed training. Students are measured together; only
    those that `works` confirms."""
    yield from substitutes.pretrained(there, here, recipe, random=random)
    main, given = recipe.main.trainings[0], substitutes.teacher(there, here)
    for step in steps(here.uri, recipe):
        if step.name == EVALUATION:
            schedules_of = models(recipe)
            students = {name: schedules for name, schedules in schedules_of.items() if name != TEACHER and works(made_by(name))}
            yield evaluation(here.uri, recipe, {TEACHER: schedules_of[TEACHER]}, f"{EVALUATION}/{TEACHER}")
            if students:
                yield evaluation(here.uri, recipe, students, f"{EVALUATION}/{STUDENTS}")
            continue
        yield given if given and step.name == given.name else step
        if maker := maker_of_pairs(step.name):
            check = partial(verify_pairs, here.uri, recipe.name, verification(recipe.pairs_of(maker)))
            yield Step(name=f"{step.name} (verified)", run=check, after=(step.name,))
        if step.name == main:
            yield Step(name=f"{main} (resumed)", run=partial(resume, here / main, step.run), after=(main,))


def resume(folder: Folder, train: Callable[[], Any]) -> str:
    """Resume training from the last checkpoint, as if the run had been killed after it. Returns whether the weights match."""
    saved, log, before = checkpoints.steps(folder), read_log(folder), folder.read(WEIGHTS)
    if not saved:
        raise BeelineError(f"{folder} has no checkpoint to resume from")
    folder.remove(SUCCESS)
    train()
    kept = [row for row in log if row[STEP] <= saved[-1]]
    if read_log(folder)[: len(kept)] != kept:
        raise BeelineError(f"{folder} was trained from the start, not from its checkpoint of step {saved[-1]}")
    same = folder.read(WEIGHTS) == before
    return f"from step {saved[-1]}, {'the same weights to the last bit' if same else 'not the same weights to the last bit'}"


class Rehearsal:
    """Results of the rehearsal so far; rehearsal.json is written from the first step on."""

    def __init__(self, there: Workspace, here: Folder, recipe: Recipe, *, mode: str) -> None:
        self.there, self.here, self.recipe = there, here, recipe
        self.rows: list[Outcome] = []
        how = "import" if there.teacher else "train"
        self.asked = needs(stages(recipe, Workspace(here.uri, recipe), how))
        self.about: dict[str, Any] = {"recipe": recipe.name, "mode": mode, "complete": False}
        self.about["machine"] = describe(torch.device("cpu"))
        self._write()
        ensure_ray()
        self.around = look_at_cluster(ray.get_runtime_context().gcs_address)
        self.about["machine"] = machine(self.around, max(need.gpus for need in self.asked))
        self.memory = Memory()

    def attempt(self, step: Step) -> None:
        """Run a step unless a step it depends on has failed; record the result and print its line."""
        missing = [name for name in step.after if not self.works(name)]
        trouble = f"not tried, because it needs {', '.join(missing)}" if missing else self._no_room(step.name)
        start, note = time.monotonic(), ""
        row = Outcome(stage=step.name, ok=not trouble, reason=trouble)
        if not trouble:
            self.memory.begin()
            try:
                note = step.run() or ""
            except Exception as error:  # the error becomes this stage's line; other stages still run
                cause = reason(error).replace(str(self.here / "weights"), str(self.there.place / "weights"))
                row = replace(row, ok=False, reason=cause)
            seconds, peak = time.monotonic() - start, self.memory.end()
            row = replace(row, seconds=round(seconds, 2), peak_mb=peak.process, gpu_mb=peak.gpu, note=note)
            if row.ok:
                row = with_figures(row, step.folders or (step.name,), Workspace(self.here.uri, self.recipe))
        self.rows.append(row)
        print(f"rehearsal: {text(row)}", flush=True)
        self._write()
        gc.collect()

    def works(self, stage: str) -> bool:
        """Return whether a stage has not failed so far."""
        return all(row.ok for row in self.rows if row.stage == stage)

    def _no_room(self, name: str) -> str:
        """Return why the cluster could never run the stage, or ""."""
        asked = [need for need in self.asked if name == need.stage or name.startswith(f"{need.stage}/")]
        lines = [line for need in asked if (line := room(need, self.around)).fix]
        return f"{lines[0].found}. {lines[0].fix}" if lines else ""

    def finish(self) -> None:
        """Print all lines. Raises BeelineError if a stage failed."""
        self.about["complete"] = True
        self._write()
        width = max(len(row.stage) for row in self.rows)
        print(f"\nrehearsal of {self.recipe.name}, {self.here}/{RECORD}", flush=True)
        for row in self.rows:
            print(text(row, width), flush=True)
        if replaced := self._substitutes():
            print(f"substitutes: {'; '.join(f'{stage}: {what}' for stage, what in replaced.items())}", flush=True)
        failed = [row.stage for row in self.rows if not row.ok]
        if failed:
            raise BeelineError(f"{len(failed)} of {len(self.rows)} stages do not work yet: {', '.join(failed)}")

    def _substitutes(self) -> dict[str, str]:
        return {row.stage: row.note for row in self.rows if row.note == substitutes.RANDOM}

    def _write(self) -> None:
        rows: Sequence[dict[str, Any]] = [dataclasses.asdict(row) for row in self.rows]
        self.here.write_json(RECORD, self.about | {"substitutes": self._substitutes(), "stages": rows})


def machine(around: Surroundings, gpus: float) -> dict[str, Any]:
    """Describe a machine of the cluster, one with GPUs if `gpus` are requested."""
    able = gpus > 0 and any(node.gpus > 0 for node in [*around.nodes, *around.promised])
    remote = ray.remote(num_cpus=0, num_gpus=min(1.0, gpus) if able else 0, max_calls=1)(describe)
    return ray.get(remote.options(name="describe").remote(torch.device("cuda" if able else "cpu")))


def clear(here: Folder) -> bool:
    """Remove an earlier rehearsal; return whether there was one. Raises BeelineError for any other content."""
    files, folders = here.sizes(), here.folders()
    if not files and not folders:
        return False
    record = here.read_json(RECORD)
    if not isinstance(record, dict) or "stages" not in record:
        raise BeelineError(
            f"{here} holds {', '.join([*folders, *files][:3])} but no {RECORD}, so no rehearsal made it; nothing was removed. "
            "Move it away"
        )
    if here.is_local:
        for path in Path(here.uri).iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != RECORD:  # removed last, because it marks the folder as a rehearsal
                path.unlink()
    else:
        _remove(here, keep=RECORD)
    return True


def _remove(folder: Folder, keep: str = "") -> None:
    for name in folder.folders():
        _remove(folder / name)
    for name in folder.sizes():
        if name != keep:
            folder.remove(name)


if __name__ == "__main__":
    run_command(rehearse)
