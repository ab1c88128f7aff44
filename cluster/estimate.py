"""What a recipe will cost before it is run: GPU-hours, wall time, storage and money of each stage; and whether all is ready.

    python cluster/estimate.py cifar10 --gpus 8 --gpu h200 --price 4.20
    python cluster/estimate.py cifar10 --gpus 8 --gpu h200 --pairs.count 200000 --teacher import
    python cluster/estimate.py cifar10 --workspace s3://bucket/cifar10 --check

Operations are counted by running the recipe's own code on tensors without data (planning/counting.py). Speeds are measured
where anybody has measured them, in the workspace first, and assumed where nobody has (planning/speeds.py); each says which.
What the workspace holds already is not counted again. Nothing is started, and nothing is written but the probe of --check.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from beeline.config import Recipe
from beeline.errors import BeelineError
from beeline.settings import MAX_PROCESSES, MAX_THREADS, Amount, Range
from beeline.settings import check as check_value
from cluster.planning import speeds
from cluster.planning.readiness import access, check_all, report
from cluster.planning.speeds import CPU, Measured, Speed
from cluster.planning.stages import Job, Stage, stages
from cluster.planning.workspace import Workspace
from pipeline.command import run_command
from pipeline.storage import Folder
from trainers.student import check_phases

CORES_PER_GPU = 8  # assumed of machines elsewhere
Gpus = Annotated[int, Range(-1, MAX_PROCESSES)]
Cores = Annotated[int, Range(0, MAX_PROCESSES * MAX_THREADS)]
Utilisation = Annotated[float, Range(0, 1, without="low")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machines:
    """What there is to compute with: `gpus` of kind `gpu`, and CPU cores."""

    gpu: str
    gpus: int
    cores: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A stage on machines. Hours are of devices that are taken, whether they compute or wait for the same process's CPU."""

    stage: str
    work: str
    amount: int
    flops: float
    gpu_hours: float
    core_hours: float
    wall_hours: float
    stored_bytes: float
    passing_bytes: float
    money: float | None
    sources: dict[str, str]
    """By kind of work: the speed, and where it is from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All rows, and what holds for all of them."""

    rows: list[Row]
    wall_hours: float
    held_money: float | None
    """With the GPUs paid for from start to end, rather than while stages take them."""
    notes: list[str]

    def total(self, name: str) -> float:
        """The sum of a column."""
        return sum(getattr(row, name) or 0.0 for row in self.rows)


def plan(
    found: Sequence[Stage], machines: Machines, *, measured: list[Measured], price: float = 0.0,
    utilisation: float = speeds.UTILISATION,
) -> Plan:  # fmt: skip
    """The stages one after another on these machines, students beside each other where there is room."""
    start, start_source = speeds.starting()
    rows, lanes, notes = [], _Lanes(), [f"{start:.0f} s for each stage to start, {start_source}"]
    for stage in found:
        gpu_hours = core_hours = wall = 0.0
        sources, share = {}, 1.0
        for job in stage.jobs:
            on_gpu = job.gpus > 0 and machines.gpu != CPU and not job.on_core
            units, asked = _units(job, machines, on_gpu)
            if job.gang and units < asked and on_gpu:
                notes.append(
                    f"{stage.name} asks for {asked:g} GPUs at once, of {machines.gpus}: it would wait for more for ever. "
                    f"Counted as if with {units:g}: set its workers.count"
                )
            seconds, text = _seconds(job, CPU if not on_gpu else machines.gpu, measured, utilisation)
            wait = seconds / units * _uneven(job, units)
            wall += wait
            taken = wait * min(machines.gpus, job.processes * job.gpus) if job.on_core and machines.gpu != CPU else seconds
            gpu_hours += taken / 3600 if on_gpu or (job.on_core and job.gpus and machines.gpu != CPU) else 0.0
            core_hours += 0.0 if on_gpu else seconds / 3600
            share = min(share, units / (machines.gpus if on_gpu else machines.cores))
            sources[job.task.kind if job.task else "images"] = text
        wall += start * stage.starts
        lanes.add(wall, share, beside=stage.side_by_side)
        notes += [f"{stage.name}: {stage.note}"] if stage.note and stage.amount else []
        rows.append(
            Row(
                stage=stage.name, work=stage.work, amount=stage.amount, flops=sum(job.flops for job in stage.jobs),
                gpu_hours=gpu_hours, core_hours=core_hours, wall_hours=wall / 3600,
                stored_bytes=stage.stored, passing_bytes=stage.passing,
                money=gpu_hours * price if price else None, sources=sources,
            )
        )  # fmt: skip
    hours = lanes.seconds() / 3600
    held = hours * machines.gpus * price if price and machines.gpu != CPU else None
    return Plan(rows=rows, wall_hours=hours, held_money=held, notes=list(dict.fromkeys(notes)))


class _Lanes:
    """Wall time of stages in turn; those beside each other share the machines, each on the share that it can use."""

    def __init__(self) -> None:
        self._done, self._lanes = 0.0, [0.0]

    def add(self, seconds: float, share: float, *, beside: bool) -> None:
        """A stage that takes `seconds` on `share` of the machines."""
        if not beside:
            self._done, self._lanes = self.seconds() + seconds, [0.0]
            return
        room = max(1, math.floor(1 / share + 1e-9))
        self._lanes = sorted(self._lanes + [0.0] * (room - len(self._lanes)))
        self._lanes[0] += seconds

    def seconds(self) -> float:
        """Until all are done."""
        return self._done + max(self._lanes)


def _units(job: Job, machines: Machines, on_gpu: bool) -> tuple[float, float]:
    """GPUs or cores that work on a job, and as many as it asks for."""
    if on_gpu:
        asked = job.processes * job.gpus
        return max(min(asked, machines.gpus), 1e-9), asked
    processes = job.processes if not job.on_core or not job.gpus or machines.gpu == CPU else min(
        job.processes, math.floor(machines.gpus / job.gpus)
    )  # fmt: skip
    asked = processes * (1 if job.on_core else job.threads)
    return max(1, min(asked, machines.cores)), asked


def _uneven(job: Job, units: float) -> float:
    """How much longer the last parts make it: 5 parts on 2 actors take as long as 6."""
    actors = max(1, round(units / (job.gpus or job.threads)))
    return -(-job.parts // actors) * actors / job.parts if job.parts else 1.0


def _seconds(job: Job, device: str, measured: list[Measured], utilisation: float) -> tuple[float, str]:
    """Of one unit of the device for all of a job, and the sentence about its speed."""
    if job.task is None:
        return job.seconds, job.source
    found: Speed = speeds.speed(job.task, device, measured=measured, utilisation=utilisation)
    unit = "core" if device == CPU or job.on_core else "GPU"
    figure = f"{found.flops / 1e12:,.0f} TFLOP/s" if found.flops >= 1e13 else f"{found.flops / 1e9:,.0f} GFLOP/s"
    return job.flops / found.flops, f"{figure} per {unit} in {job.task.precision}, {found.source}"


def estimate(
    workspace: str,
    recipe: Annotated[Recipe, tyro.conf.arg(name="")],
    gpu: str = "",
    gpus: Gpus = -1,
    cores: Cores = 0,
    price: Amount = 0.0,
    utilisation: Utilisation = speeds.UTILISATION,
    teacher_from: Annotated[Literal["auto", "import", "train"], tyro.conf.arg(name="teacher")] = "auto",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    check: bool = False,
) -> None:
    """Tell what the recipe will take; settings of any stage can be overridden.

    Args:
        workspace: Local folder or s3://bucket/prefix. What is finished there is not counted, what was measured there is used.
        gpu: Kind of GPU, or cpu; left out, what this machine has.
        gpus: How many; left out, 1.
        cores: CPU cores, of all machines together; 0 for those of this machine, or 8 with each GPU of others.
        price: Of a GPU-hour, in any currency; 0 leaves money out. No list of prices is kept here.
        utilisation: Share of a data sheet's peak that is assumed where nobody has measured.
        teacher_from: Whether the teacher is imported or trained; "auto" trains it unless an imported one is there.
        as_json: Print JSON instead of a table.
        check: Check instead that workspace, weights, disk and cluster are ready; exit status 0 only if they are.
    """
    for student in recipe.students.values():
        check_phases(student)
    check_value("--gpus", gpus, Gpus)
    check_value("--cores", cores, Cores)
    check_value("--price", price, Amount)
    check_value("--utilisation", utilisation, Utilisation)
    device = speeds.known(gpu) if gpu else speeds.here()
    gpus = 1 if gpus < 0 else gpus
    if gpus == 0 and device != CPU:
        raise BeelineError(f"--gpus 0 of kind {device}; for machines without GPUs give --gpu cpu")
    elsewhere = device not in (CPU, speeds.here())
    machines = Machines(
        gpu=device, gpus=gpus if device != CPU else 0, cores=cores or (CORES_PER_GPU * gpus if elsewhere else speeds.cores())
    )  # fmt: skip
    trouble = access(Folder(workspace)) if check else ""
    there = Workspace(workspace, recipe, trouble)
    how = teacher_from if teacher_from != "auto" else "import" if there.imported else "train"
    if check:
        report(check_all(recipe, there, how))
        return
    found = stages(recipe, there, how)
    made = plan(found, machines, measured=there.measured(), price=price, utilisation=utilisation)
    print(as_text(made, recipe, machines, there) if not as_json else json.dumps(as_dict(made, recipe, machines), indent=2))


def as_dict(made: Plan, recipe: Recipe, machines: Machines) -> dict[str, Any]:
    """The plan, JSON-ready."""
    names = ("flops", "gpu_hours", "core_hours", "stored_bytes")
    totals: dict[str, Any] = {name: made.total(name) for name in names} | {"wall_hours": made.wall_hours}
    totals["passing_bytes"] = max(row.passing_bytes for row in made.rows)
    if made.held_money is not None:
        totals |= {"money": made.total("money"), "money_if_held": made.held_money}
    rows = [dataclasses.asdict(row) for row in made.rows]
    for row in rows:
        if row["money"] is None:
            del row["money"]
    about = {"recipe": recipe.name, "machines": dataclasses.asdict(machines)}
    return about | {"stages": rows, "total": totals, "notes": made.notes}


def as_text(made: Plan, recipe: Recipe, machines: Machines, there: Workspace) -> str:
    """The plan as a table, then where its speeds are from, then notes."""
    priced = made.held_money is not None
    what = f"{machines.gpus} x {machines.gpu}" if machines.gpu != CPU else "CPU"
    head = ["stage", "work", "PFLOP", "GPU-hours", "core-hours", "wall", "stored", *(["money"] if priced else [])]
    table = [head]
    for row in made.rows:
        cells = [row.stage, row.work, _number(row.flops / 1e15), _number(row.gpu_hours), _number(row.core_hours)]
        cells += [_time(row.wall_hours), _bytes(row.stored_bytes)]
        table.append(cells + ([_number(row.money or 0.0)] if priced else []))
    sums = [_number(made.total("flops") / 1e15), *(_number(made.total(name)) for name in ("gpu_hours", "core_hours"))]
    total = ["total", "", *sums, _time(made.wall_hours), _bytes(made.total("stored_bytes"))]
    table.append(total + ([_number(made.total("money"))] if priced else []))
    widths = [max(len(line[k]) for line in table) for k in range(len(head))]
    lines = [f"{recipe.name} on {what}, {machines.cores} cores; workspace {there.place}", ""]
    for cells in table:
        shown = [f"{cell:{'<' if k < 2 else '>'}{width}}" for k, (cell, width) in enumerate(zip(cells, widths, strict=True))]
        lines.append("  ".join(shown).rstrip())
    lines += ["", "Speeds:"]
    for source, kinds in _grouped(made.rows).items():
        lines.append(f"  {', '.join(kinds)}: {source}")
    lines += ["", "Notes:"]
    fullest = max(made.rows, key=lambda row: row.passing_bytes)
    notes = [*made.notes]
    if fullest.passing_bytes:
        notes.append(f"while {fullest.stage} runs, the workspace holds {_bytes(fullest.passing_bytes)} more than is stored")
    notes += ["no loss is counted to communication between machines, nor to compiling, restarts or waiting for machines"]
    if priced:
        held = _number(made.held_money or 0.0)
        notes.append(f"money counts GPUs while a stage takes them; held from start to end they cost {held}")
    if there.trouble:
        notes.append(f"the workspace could not be read, and is taken to be empty: {there.trouble}")
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def _grouped(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Each sentence about a speed, and the stages and kinds of work that it is said of."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for kind, source in row.sources.items():
            name = row.stage if len(row.sources) == 1 else f"{row.stage} ({kind})"
            found.setdefault(source, []).append(name)
    return found


def _number(value: float) -> str:
    if value == 0:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}" if value >= 1e-6 else "0"


def _time(hours: float) -> str:
    if hours == 0:
        return "–"
    seconds = hours * 3600
    return f"{hours / 24:.1f} d" if hours >= 48 else f"{hours:.1f} h" if hours >= 2 else (
        f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
    )  # fmt: skip


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value / 1e3:.0f} kB" if value else "–"


if __name__ == "__main__":
    run_command(estimate)
