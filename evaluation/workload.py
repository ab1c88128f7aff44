"""Counts of the work left in a measurement, from its own rows and work items. Planning multiplies them by costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace

from beeline.sampling.few_step import FewStep
from evaluation.bench import HELD_OUT, Setup
from evaluation.evaluate import unpublished
from evaluation.jobs import HeldOut
from evaluation.reference import reference_folder
from evaluation.samplings import samplings_of
from pipeline.records import success_in
from pipeline.stage import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Counts of the work left; all 0 if nothing is left."""

    models: int
    rows: int
    shards: int
    """Work items that draw samples."""
    draws: int
    """Draws of all rows; metrics are computed for each."""
    samples: int
    """Samples of all draws. Every measuring network processes them."""
    evaluations: int
    """Network evaluations of samples, sheets, comparisons and held-out pairs."""
    networks: tuple[str, ...]
    """Measuring networks that have not processed the real images yet."""


def workload(setup: Setup, models: Mapping[str, tuple[FewStep | None, Sequence[str]]], *, levels: int | None) -> Workload:
    """Count the work left to measure `models`. It maps folders to few-step sampling (None for a teacher) and step schedules.
    `levels` is the number of levels of the teacher's calibrated solver. Raises BeelineError like `samplings_of`."""
    config, left = setup.config, []
    for name, (few_step, schedules) in models.items():
        samplings = samplings_of(few_step, replace(config, steps=tuple(schedules)), levels=levels)
        measurement = unpublished(Stage(setup.workspace, f"evaluation/{name}", {}), name, samplings, few_step)
        if measurement.samplings or success_in(measurement.stage.folder) is None:
            left.append(measurement)
    evaluations = sum(measurement.evaluations(setup) for measurement in left)
    if left and setup.pairs is not None and success_in(setup.workspace / HELD_OUT) is None:
        evaluations += HeldOut(config.held_out, setup.pairs["evaluations"]).evaluations
    networks = [name for name in config.features if left and success_in(setup.workspace / reference_folder(name)) is None]
    count = sum(len(measurement.samplings) for measurement in left)
    return Workload(
        models=len(left),
        rows=count,
        shards=sum(len(measurement.samples(setup)) for measurement in left),
        draws=count * config.draws,
        samples=count * config.draws * setup.count,
        evaluations=evaluations,
        networks=tuple(networks),
    )
