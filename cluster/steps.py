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
from beeline.files.names import EVALUATION, IMAGES, PAIRS, PROBE, SWEEPS, TEACHER, pairs_folder
from beeline.sampling.few_step import FewStep, parse_steps, write_steps
from beeline.settings import Range, check
from evaluation.evaluate import measure
from evaluation.report import report
from pipeline.gen_pairs import gen_pairs
from pipeline.ingest_images import ingest_images
from trainers.student import check_subsets
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
    """Whether the step may run in parallel with neighbouring steps that allow it too, except those in its `after`."""


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
    left = makers(recipe)
    for student in recipe.students.values():
        if student.pairs in left:
            left.remove(student.pairs)
            pairs, maker = recipe.pairs_of(student.pairs), made_by(student.pairs)
            yield step(pairs_folder(student.pairs), gen_pairs, pairs, after=(maker,), parallel=True)
        parts = student.trainings if student.subsets > 1 else ()
        for number, folder in enumerate(parts):
            yield step(folder, train_lmm, student, number, after=_inputs(student), parallel=student != main)
        after = parts or _inputs(student)
        yield step(student_folder(student.name), train_lmm, student, after=after, parallel=student != main)
    after = (IMAGES, PROBE, pairs_folder(main.pairs), made_by(recipe.sweep.init))
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


def makers(recipe: Recipe) -> list[str]:
    """The models other than the teacher whose pairs students train on (reflow), each once."""
    wanted = [student.pairs for student in recipe.students.values() if student.running and student.needs().pairs]
    return [model for model in dict.fromkeys(wanted) if model != TEACHER]


def check_recipe(recipe: Recipe) -> None:
    """Raise BeelineError for settings that a later stage would refuse, whatever the workspace holds."""
    images, network = recipe.images, recipe.teacher.network
    if (images.resolution, images.channels) != (network.img_resolution, network.img_channels):
        raise BeelineError(
            f"images has {images.channels} channels at {images.resolution} pixels, but teacher.network has "
            f"{network.img_channels} at {network.img_resolution}. Make the two agree"
        )
    check_teacher(recipe.teacher)
    _check_order(recipe)
    for student in recipe.students.values():
        check_student(student)
        check_resolution(student, images.resolution)
        check_subsets(student, network.label_dim)
    if can_vary(recipe.main):
        check_sweep(recipe.sweep, recipe.main)
    for folder, phase in _students(recipe).items():
        sampling = phase.objective.sampling()
        if sampling is not None and sampling.trained_steps is None:
            _check_schedules(folder, sampling, recipe.few_steps)


def _check_schedules(folder: str, sampling: FewStep, schedules: tuple[str, ...]) -> None:
    """Raise BeelineError for schedules of `few_steps` that a student trained on all levels does not have."""
    below = Annotated[int, Range(0, sampling.num_steps - 1)]
    for steps in map(parse_steps, schedules):
        for step in steps:
            if isinstance(step, int):
                check("the last step in few_steps", step, below)
        try:
            sampling.check(steps)
        except BeelineError as error:
            raise BeelineError(f"few_steps of {folder}: {error}") from error


def _check_order(recipe: Recipe) -> None:
    """Raise BeelineError for a student that needs a later student or starts from a set of students, or needs pairs of one that
    cannot make any."""
    folders = [student_folder(name) for name in recipe.students]
    sets = {model for student in recipe.students.values() if student.subsets > 1 for model in student.models()}
    for number, student in enumerate(recipe.students.values()):
        if student.start in sets:
            raise BeelineError(
                f"student {student.name!r} starts from {student.start}, which is a set of students, one for each subset of the "
                "classes; a student starts from one network. Choose another --student.init"
            )
        for model in (student.start, student.pairs, *student.needs().models):
            if made_by(model) in folders[number:]:
                raise BeelineError(
                    f"student {student.name!r} needs {model}, which the recipe does not train before it; change their order"
                )
    for model in makers(recipe):
        phase = next((s.models()[model] for s in recipe.students.values() if model in s.models()), None)
        sampling = None if phase is None else phase.objective.sampling()
        if sampling is not None:
            sampling.check_solver()


def models(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Return the models to measure, and the step schedules of each student. Teachers ignore theirs."""
    students = {folder: _schedules(recipe, phase.objective.sampling()) for folder, phase in _students(recipe).items()}
    return {TEACHER: recipe.evaluate.steps} | students


def _students(recipe: Recipe) -> dict[str, PhaseConfig]:
    """Return the students' published models by folder, each with the phase that made it."""
    return {folder: phase for student in recipe.students.values() for folder, phase in student.models().items()}


def needed_weights(recipe: Recipe) -> list[str]:
    """The pretrained networks of losses, discriminators and measurements, in the order of their first use."""
    trials = trials_of(recipe.sweep, recipe.main) if can_vary(recipe.main) else {}
    names = [name for student in (*recipe.students.values(), *trials.values()) for name in student.needs().features]
    names += [*recipe.evaluate.features, *([recipe.sweep.features] if trials else [])]
    return [name for name in dict.fromkeys(map(weights_of, names)) if name not in PROBES]


def _schedules(recipe: Recipe, sampling: FewStep | None) -> tuple[str, ...]:
    """Return the step schedules to measure a student at: all of `few_steps` if it was trained on all levels, otherwise those
    of `few_steps` and `evaluate.steps` that use trained steps alone, and all its trained steps unless there are many.

    Students without few-step sampling (None) use `evaluate.nfe`, like teachers, and ignore the result.
    """
    if sampling is None:
        return recipe.evaluate.steps
    if sampling.trained_steps is None:
        return recipe.few_steps
    schedules = dict.fromkeys((*recipe.few_steps, *recipe.evaluate.steps))
    fitting = [text for text in schedules if _fits(sampling, text)]
    own = write_steps(sampling.trained_steps)
    return tuple(dict.fromkeys([*fitting, *[own] * (len(sampling.trained_steps) <= MAX_TRAINED or not fitting)]))


def _fits(sampling: FewStep, schedule: str) -> bool:
    """Whether a student may be sampled at a schedule."""
    try:
        return bool(sampling.check(parse_steps(schedule)))
    except BeelineError:
        return False


def _inputs(student: StudentConfig) -> tuple[str, ...]:
    """Return the steps whose results the training of a student reads."""
    needs = student.needs()
    read = {IMAGES: needs.image_folder, PROBE: "probe" in needs.features, pairs_folder(student.pairs): needs.pairs}
    return (*(name for name, wanted in read.items() if wanted), *map(made_by, (*needs.models, student.start)))


def made_by(model: str) -> str:
    """Return the step that makes the model in folder `model`: teacher, students/<name>, students/<name>/reconstruction."""
    return "/".join(model.split("/")[:2])
