"""Every stage in order, as one job: images, probes, teacher, pairs, students, sweep, evaluation, report.

    python cluster/run_pipeline.py digits
    ray job submit --working-dir . -- python cluster/run_pipeline.py digits --workspace s3://bucket/prefix

Finished stages are skipped, interrupted ones continue.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import time
from typing import Annotated

import ray
import tyro

from beeline.config import LmmConfig, Recipe
from beeline.errors import BeelineError
from beeline.settings import Range, check
from evaluation.evaluate import measure
from evaluation.report import report
from evaluation.rows import parse_steps
from pipeline.command import run_command
from pipeline.gen_pairs import gen_pairs
from pipeline.ingest_images import ingest_images
from pipeline.runtime import ensure_ray
from pipeline.storage import Folder
from trainers.student import RECONSTRUCTION, running
from trainers.sweep_lmm import check_sweep, sweep_lmm
from trainers.train_lmm import check_sides, check_student, train_lmm
from trainers.train_probe import train_probes
from trainers.train_teacher import check_teacher, train_teacher


def run_pipeline(workspace: str, recipe: Annotated[Recipe, tyro.conf.arg(name="")]) -> None:
    """Run the recipe from real images to report.html; settings of any stage can be overridden.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    start, name, workspace = time.monotonic(), recipe.name, Folder(workspace).uri  # tasks run in folders of their own
    check_recipe(recipe)
    ensure_ray()
    ingest_images(workspace, name, recipe.images)
    train_probes(workspace, name, recipe.probe)
    train_teacher(workspace, name, recipe.teacher)
    gen_pairs(workspace, name, recipe.pairs)
    main = recipe.students["lmm"]
    train_lmm(workspace, name, main)
    train_together(workspace, name, [student for student in recipe.students.values() if student != main])
    sweep_lmm(workspace, name, recipe.sweep, main, recipe.evaluate)
    models = {
        "teacher": recipe.evaluate.steps,
        **{f"students/{key}": measured_at(recipe, student) for key, student in recipe.students.items()},
    }
    if main.reconstruction.iterations:
        models[f"students/lmm/{RECONSTRUCTION}"] = recipe.few_steps
    measure(workspace, name, recipe.evaluate, models)
    report(workspace, name)
    print(f"pipeline: complete in {time.monotonic() - start:.0f} s", flush=True)


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


def measured_at(recipe: Recipe, student: LmmConfig) -> tuple[str, ...]:
    """The step schedules at which a student is measured: several where lines of all levels are what it learned."""
    lines = student.objective == LmmConfig.objective and all(phase.steps is None for phase in running(student))
    return recipe.few_steps if lines else recipe.evaluate.steps


def train_together(workspace: str, recipe: str, students: list[LmmConfig]) -> None:
    """Train the ablations at the same time: each starts once the cluster has room for its workers."""
    remote = ray.remote(num_cpus=0)(train_lmm)
    ray.get([remote.options(name=f"students/{student.name}").remote(workspace, recipe, student) for student in students])


if __name__ == "__main__":
    run_command(run_pipeline)
