"""Steps of a recipe in order, each a call of a stage's function. run_pipeline.py runs them, rehearse.py tries them, and
estimate.py follows their order."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from beeline.config import PhaseConfig, Recipe, StudentConfig
from beeline.config.student import student_folder
from beeline.errors import BeelineError
from beeline.features.backbones import weights_of
from beeline.features.measuring import PROBES
from beeline.files.names import EVALUATION, IMAGES, PAIRS, PROBE, SWEEPS, TEACHER
from beeline.sampling.few_step import parse_steps
from beeline.settings import Range, check
from evaluation.evaluate import measure
from evaluation.report import report
from pipeline.gen_pairs import gen_pairs
from pipeline.ingest_images import ingest_images
from trainers.sweep_lmm import check_sweep, sweep_lmm
from trainers.train_lmm import check_resolution, check_student, train_lmm
from trainers.train_probe import train_probes
from trainers.train_teacher import check_teacher, train_teacher
from trainers.trials import can_vary, trials_of

MAX_TRAINED = 16  # steps of a schedule that is measured because a student was trained on it: it is part of a file's name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One call of a stage. `after` lists the steps whose results it reads."""

    name: str
    """The folder that the step writes."""
    folders: tuple[str, ...] = ()
    """Folders with a `_SUCCESS`, if they differ from `name`."""
    run: Callable[[], str | None]
    """Runs the step; returns a note for the report, or None."""
    after: tuple[str, ...] = ()
    side_by_side: bool = False
    """Whether the step may run in parallel with neighbouring steps that allow it too."""


def steps(workspace: str, recipe: Recipe) -> Iterator[Step]:
    """List all steps of a recipe."""
    name, main = recipe.name, recipe.main

    def step(folder: str, call: Callable[..., Any], *arguments: object, after: tuple[str, ...], parallel: bool = False) -> Step:
        run = functools.partial(call, workspace, name, *arguments)
        return Step(name=folder, run=run, after=tuple(dict.fromkeys(after)), side_by_side=parallel)

    yield step(IMAGES, ingest_images, recipe.images, after=())
    yield step(PROBE, train_probes, recipe.probe, after=(IMAGES,))
    yield step(TEACHER, train_teacher, recipe.teacher, after=(IMAGES,))
    yield step(PAIRS, gen_pairs, recipe.pairs, after=(TEACHER,))
    for student in recipe.students.values():
        yield step(student_folder(student.name), train_lmm, student, after=_inputs(student), parallel=student != main)
    after = (IMAGES, PROBE, PAIRS, made_by(recipe.sweep.init))
    if can_vary(main):
        yield step(f"{SWEEPS}/{recipe.sweep.name}", sweep_lmm, recipe.sweep, main, recipe.evaluate, after=after)
    yield evaluation(workspace, recipe, models(recipe))
    yield Step(name="report", run=functools.partial(report, workspace, name))


def evaluation(workspace: str, recipe: Recipe, schedules: Mapping[str, tuple[str, ...]], name: str = EVALUATION) -> Step:
    """Build the step that measures models at these step schedules, in one pool."""
    probes = (PROBE,) if set(recipe.evaluate.features) & PROBES.keys() else ()
    return Step(
        name=name,
        run=functools.partial(measure, workspace, recipe.name, recipe.evaluate, schedules),
        after=tuple(dict.fromkeys((IMAGES, *probes, *map(made_by, schedules)))),
        folders=tuple(f"{EVALUATION}/{model}" for model in schedules),
    )


def check_recipe(recipe: Recipe) -> None:
    """Raise BeelineError for settings that a later stage would refuse, whatever the workspace holds."""
    images, network = recipe.images, recipe.teacher.network
    if (images.resolution, images.channels) != (network.img_resolution, network.img_channels):
        raise BeelineError(
            f"images has {images.channels} channels at {images.resolution} pixels, but teacher.network has "
            f"{network.img_channels} at {network.img_resolution}. Make the two agree"
        )
    check_teacher(recipe.teacher)
    for student in recipe.students.values():
        check_student(student)
        check_resolution(student, images.resolution)
    if can_vary(recipe.main):
        check_sweep(recipe.sweep, recipe.main)
    for name, schedules in {"few_steps": recipe.few_steps, "evaluate.steps": recipe.evaluate.steps}.items():
        for student in recipe.students.values():
            for phase in student.models().values():
                sampling = phase.objective.sampling()
                if sampling is not None and name == ("evaluate.steps" if sampling.trained_steps else "few_steps"):
                    below = Annotated[int, Range(0, sampling.num_steps - 1)]
                    for text in schedules:
                        check(f"the last step in {name}", max(i for i in parse_steps(text) if isinstance(i, int)), below)


def models(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Return the models to measure, and the step schedules of each student: several if it accepts any level."""
    students = [model for student in recipe.students.values() for model in student.models().items()]
    return {TEACHER: recipe.evaluate.steps} | {folder: _schedules(recipe, phase) for folder, phase in students}


def needed_weights(recipe: Recipe) -> list[str]:
    """The pretrained networks of losses, discriminators and measurements, in the order of their first use."""
    trials = trials_of(recipe.sweep, recipe.main) if can_vary(recipe.main) else {}
    names = [name for student in (*recipe.students.values(), *trials.values()) for name in student.needs().features]
    names += [*recipe.evaluate.features, *([recipe.sweep.features] if trials else [])]
    return [name for name in dict.fromkeys(map(weights_of, names)) if name not in PROBES]


def _schedules(recipe: Recipe, phase: PhaseConfig) -> tuple[str, ...]:
    """Step schedules to measure. A student of single levels is also measured at all of them, unless there are many."""
    sampling = phase.objective.sampling()
    if sampling is not None and sampling.trained_steps is None:
        return recipe.few_steps
    trained = () if sampling is None else sampling.trained_steps or ()
    own = [",".join(map(str, trained))] if 0 < len(trained) <= MAX_TRAINED else []
    return tuple(dict.fromkeys((*recipe.evaluate.steps, *own)))


def _inputs(student: StudentConfig) -> tuple[str, ...]:
    """Return the steps whose results the training of a student reads."""
    needs = student.needs()
    read = {IMAGES: needs.images, PROBE: "probe" in needs.features, PAIRS: needs.pairs}
    return (*(name for name, wanted in read.items() if wanted), *map(made_by, (*needs.models, student.start)))


def made_by(model: str) -> str:
    """Return the step that makes the model in folder `model`: teacher, students/<name>, students/<name>/reconstruction."""
    return "/".join(model.split("/")[:2])
