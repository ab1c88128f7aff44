"""The steps of a recipe in order, each a call of a stage's own function: run_pipeline.py runs them, rehearse.py tries them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from beeline.config import LmmConfig, Recipe
from beeline.errors import BeelineError
from beeline.measuring import PROBES
from beeline.settings import Range, check
from evaluation.evaluate import measure
from evaluation.report import report
from evaluation.rows import parse_steps
from pipeline.gen_pairs import gen_pairs
from pipeline.ingest_images import ingest_images
from trainers.student import RECONSTRUCTION, all_needs, running
from trainers.sweep_lmm import check_sweep, sweep_lmm
from trainers.train_lmm import check_sides, check_student, train_lmm
from trainers.train_probe import train_probes
from trainers.train_teacher import check_teacher, train_teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One call. `after` are the steps whose results it reads."""

    name: str
    """The folder that it writes."""
    folders: tuple[str, ...] = ()
    """Those with a `_SUCCESS`, where they are others."""
    run: Callable[[], str | None]
    """Returns what there is to say beyond that it works."""
    after: tuple[str, ...] = ()
    side_by_side: bool = False
    """It may run at the same time as the steps before and after it that say so."""


def steps(workspace: str, recipe: Recipe) -> Iterator[Step]:
    """All of them."""
    name, main = recipe.name, recipe.students["lmm"]

    def step(folder: str, call: Callable[..., Any], *arguments: object, after: tuple[str, ...], beside: bool = False) -> Step:
        run = functools.partial(call, workspace, name, *arguments)
        return Step(name=folder, run=run, after=tuple(dict.fromkeys(after)), side_by_side=beside)

    yield step("images", ingest_images, recipe.images, after=())
    yield step("probe", train_probes, recipe.probe, after=("images",))
    yield step("teacher", train_teacher, recipe.teacher, after=("images",))
    yield step("pairs", gen_pairs, recipe.pairs, after=("teacher",))
    for lmm in recipe.students.values():
        yield step(f"students/{lmm.name}", train_lmm, lmm, after=_inputs(lmm), beside=lmm != main)
    after = ("images", "probe", "pairs", made_by(recipe.sweep.init))
    yield step(f"sweeps/{recipe.sweep.name}", sweep_lmm, recipe.sweep, main, recipe.evaluate, after=after)
    yield evaluation(workspace, recipe, models(recipe))
    yield Step(name="report", run=functools.partial(report, workspace, name))


def evaluation(workspace: str, recipe: Recipe, found: Mapping[str, tuple[str, ...]], name: str = "evaluation") -> Step:
    """The measurement of models, at these step schedules, by one pool."""
    probes = ("probe",) if set(recipe.evaluate.features) & PROBES.keys() else ()
    return Step(
        name=name,
        run=functools.partial(measure, workspace, recipe.name, recipe.evaluate, found),
        after=tuple(dict.fromkeys(("images", *probes, *map(made_by, found)))),
        folders=tuple(f"evaluation/{model}" for model in found),
    )


def check_recipe(recipe: Recipe) -> None:
    """Raise BeelineError for settings that a later stage would refuse, whatever the workspace holds."""
    images, network, main = recipe.images, recipe.teacher.network, recipe.students["lmm"]
    if (images.resolution, images.channels) != (network.img_resolution, network.img_channels):
        raise BeelineError(
            f"images has {images.channels} channels at {images.resolution} pixels, teacher.network {network.img_channels} at "
            f"{network.img_resolution}. Make the two agree"
        )
    check_teacher(recipe.teacher)
    for student in recipe.students.values():
        check_student(student)
        check_sides(student, images.resolution)
    check_sweep(recipe.sweep, main)
    for name, schedules in {"few_steps": recipe.few_steps, "evaluate.steps": recipe.evaluate.steps}.items():
        for text in schedules:
            check(f"the last step in {name}", parse_steps(text)[-1], Annotated[int, Range(0, main.num_steps - 1)])


def models(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """The models to measure, and the step schedules of each student: several where it has learned lines of all levels."""
    students = {f"students/{lmm.name}": _schedules(recipe, lmm) for lmm in recipe.students.values()}
    found = {"teacher": recipe.evaluate.steps} | students
    main = recipe.students["lmm"]
    if main.reconstruction.iterations:
        found[f"students/{main.name}/{RECONSTRUCTION}"] = recipe.few_steps
    return found


def _schedules(recipe: Recipe, student: LmmConfig) -> tuple[str, ...]:
    lines = student.objective == LmmConfig.objective and all(phase.steps is None for phase in running(student))
    return recipe.few_steps if lines else recipe.evaluate.steps


def _inputs(lmm: LmmConfig) -> tuple[str, ...]:
    """The steps whose results a student is trained on."""
    needs = all_needs(lmm)
    read = {"images": needs.images, "probe": "probe" in needs.features, "teacher": needs.teacher, "pairs": needs.pairs}
    return *(name for name, wanted in read.items() if wanted), made_by(lmm.init)


def made_by(model: str) -> str:
    """The step that makes the model in folder `model`: teacher, students/<name>, students/<name>/reconstruction."""
    return "/".join(model.split("/")[:2])
