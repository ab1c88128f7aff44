"""Run every stage in order, as one job: images, probes, teacher, pairs, students, sweep, evaluation, report.

    python cluster/run_pipeline.py digits
    ray job submit --working-dir . -- python cluster/run_pipeline.py digits --workspace s3://bucket/prefix

Finished stages are skipped, interrupted ones continue.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import itertools
import time
from collections.abc import Sequence
from typing import Annotated

import ray
import tyro

from beeline.config import Recipe
from cluster.steps import Step, check_recipe, steps
from pipeline.command import run_command
from pipeline.runtime import ensure_ray
from pipeline.storage import Folder
from trainers.trials import can_vary

SPARE = 1  # steps that start up while others train


def run_pipeline(workspace: str, recipe: Annotated[Recipe, tyro.conf.arg(name="")]) -> None:
    """Run the recipe from real images to report.html; settings of any stage can be overridden.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    start, place = time.monotonic(), Folder(workspace).uri  # absolute, because tasks run in other folders
    check_recipe(recipe)
    if not can_vary(recipe.main):
        why = "is a set of students" if recipe.main.subsets > 1 else "does not use lines matching"
        print(f"sweeps/{recipe.sweep.name}: skipped, because {recipe.main.name!r} {why}", flush=True)
    ensure_ray()
    for side_by_side, group in itertools.groupby(steps(place, recipe), key=lambda step: step.side_by_side):
        if side_by_side:
            run_together(list(group))
        else:
            for step in group:
                step.run()
    print(f"pipeline: complete in {time.monotonic() - start:.0f} s", flush=True)


def run_together(group: Sequence[Step]) -> None:
    """Run steps in parallel, such as the ablations: each after the steps whose results it reads.

    A step is a process that waits until the cluster has room for its workers. Some more than the cluster has CPUs are enough:
    a cluster that grows then gets more of them.
    """
    waiting, running = {step.name: step for step in group}, dict[ray.ObjectRef[None], str]()
    while waiting or running:
        unfinished = {*waiting, *running.values()}
        ready = [step for step in waiting.values() if unfinished.isdisjoint(step.after)]
        for step in ready[: max(0, int(ray.cluster_resources().get("CPU", 0)) + SPARE - len(running))]:
            running[ray.remote(num_cpus=0)(_run).options(name=step.name).remote(step)] = step.name
            del waiting[step.name]
        for done in ray.wait(list(running))[0]:
            ray.get(done)
            del running[done]


def _run(step: Step) -> None:
    step.run()


if __name__ == "__main__":
    run_command(run_pipeline)
