"""Estimate the cost of a recipe: GPU-hours, wall time, storage and money of each stage. --check checks that all is ready.

    python cluster/estimate.py cifar10 --gpus 8 --gpu h200 --price 4.20
    python cluster/estimate.py cifar10 --gpus 8 --gpu h200 --pairs.count 200000 --teacher import
    python cluster/estimate.py cifar10 --workspace s3://bucket/cifar10 --check

Operations are counted by running the recipe's own code on tensors without data (beeline/counting.py). Speeds are measured in
the workspace or by a benchmark, or else assumed (planning/speeds.py); each names its source. Finished work in the workspace is
not counted again. Nothing is started. Only --check writes: a small file, which it removes.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import dataclasses
import functools
import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from beeline.config import Recipe
from beeline.errors import BeelineError
from beeline.settings import MAX_PROCESSES, MAX_THREADS, Amount, Range
from beeline.settings import check as check_value
from cluster.planning import speeds
from cluster.planning.readiness import access, check_all, report
from cluster.planning.speeds import CPU, IMAGES, Measured, Speed, Work
from cluster.planning.stages import Job, StageCost, stages
from cluster.planning.workspace import Workspace
from pipeline.command import run_command
from pipeline.progress import duration
from pipeline.storage import Folder
from trainers.student import check_phases

CORES_PER_GPU = 8  # assumed for other machines
Gpus = Annotated[int, Range(-1, MAX_PROCESSES)]
Cores = Annotated[int, Range(0, MAX_PROCESSES * MAX_THREADS)]
Utilisation = Annotated[float, Range(0, 1, without="low")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machines:
    """The available devices: `gpus` GPUs of kind `gpu` ("cpu" for none), and CPU cores."""

    gpu: str
    gpus: int
    cores: int

    def on_gpu(self, job: Job) -> bool:
        """Whether GPUs do a job."""
        return job.need.gpus > 0 and self.gpus > 0 and not job.on_core

    def units(self, job: Job) -> float:
        """Number of GPUs, or of cores, that work on a job."""
        need = job.need
        processes = min(need.most, job.parts or need.most)
        if self.on_gpu(job):
            return min(processes * need.gpus, self.gpus)
        if job.on_core and need.gpus and self.gpus:
            processes = min(processes, math.floor(self.gpus / need.gpus))
        return max(1, min(processes * (1 if job.on_core else need.threads), self.cores))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The cost of a stage on machines. Hours count reserved devices, even while a GPU waits for a CPU of the same process.
    `sources` maps each kind of work to its speed and its source."""

    stage: str
    work: str
    amount: int
    flops: float
    gpu_hours: float
    core_hours: float
    wall_hours: float
    stored_bytes: float
    passing_bytes: float
    memory_bytes: float
    money: float | None
    sources: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All rows, the total wall time, and notes. `held_money` is the price of all GPUs from start to end."""

    rows: list[Row]
    wall_hours: float
    held_money: float | None
    notes: list[str]

    def total(self, name: str) -> float:
        """The sum of a column."""
        return sum(getattr(row, name) or 0.0 for row in self.rows)


def plan(
    left: Sequence[StageCost], machines: Machines, *, measured: list[Measured], price: float = 0.0,
    utilisation: float = speeds.UTILISATION,
) -> Plan:  # fmt: skip
    """Plan the stages one after another on these machines. Stages that run side by side share them."""
    start, source = speeds.starting()
    speed_of = functools.partial(speeds.speed, measured=measured, utilisation=utilisation)
    rows, hours, notes = [], 0.0, [f"{start:.0f} s for each stage to start, {source}"]
    for together, group in itertools.groupby(left, key=lambda stage: stage.side_by_side):
        walls, shares = [], []
        for stage in group:
            row, share = _row(stage, machines, start, price, speed_of)
            rows.append(row)
            walls.append(row.wall_hours)
            shares.append(row.wall_hours * share)
            notes += _notes(stage, machines)
        hours += max(max(walls), sum(shares)) if together else sum(walls)
    held = hours * machines.gpus * price if price and machines.gpus else None
    return Plan(rows=rows, wall_hours=hours, held_money=held, notes=list(dict.fromkeys(notes)))


def _row(stage: StageCost, machines: Machines, start: float, price: float, speed_of: Callable[..., Speed]) -> tuple[Row, float]:
    """The row of a stage that takes `start` seconds to start, and the share of the machines that it can use."""
    gpu_seconds = core_seconds = flops = 0.0
    wall, share, sources, running = start * stage.starts, 1.0, {}, []
    for job in stage.jobs:
        need, on_gpu, units = job.need, machines.on_gpu(job), machines.units(job)
        operations, (rate, source) = job.count(), speed_of(job.task, machines.gpu if on_gpu else CPU)
        seconds = operations / rate
        # 5 parts on 2 processes take as long as 6.
        processes = max(1, round(units / (1 if job.on_core else need.gpus if on_gpu else need.threads)))
        running.append(processes)
        wait = seconds / units * (math.ceil(job.parts / processes) * processes / job.parts if job.parts else 1.0)
        wall += wait
        flops += operations if job.task != IMAGES else 0.0
        gpu_seconds += seconds if on_gpu else wait * min(machines.gpus, need.most * need.gpus) * job.on_core
        core_seconds += 0.0 if on_gpu else seconds
        share = min(share, units / (machines.gpus if on_gpu else machines.cores))
        sources[job.task.kind] = f"{_rate(rate, 'GPU' if on_gpu else 'core', job.task)}, {source}"
    row = Row(
        stage=stage.name, work=stage.work, amount=stage.amount, flops=flops, gpu_hours=gpu_seconds / 3600,
        core_hours=core_seconds / 3600, wall_hours=wall / 3600, stored_bytes=stage.stored,
        passing_bytes=stage.peak(running[0] if running else 0), memory_bytes=stage.memory,
        money=gpu_seconds / 3600 * price if price else None, sources=sources,
    )  # fmt: skip
    return row, share


def _rate(rate: float, unit: str, task: Work) -> str:
    if task == IMAGES:
        return f"{rate:,.0f} images/s per {unit}"
    figure = f"{rate / 1e12:,.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.0f} GFLOP/s"
    return f"{figure} per {unit} in {task.precision}"


def _notes(stage: StageCost, machines: Machines) -> list[str]:
    """The stage's own note, and one for processes that could never start."""
    asked = {job.need.least * job.need.gpus: job.need.option for job in stage.jobs if machines.on_gpu(job)}
    return [f"{stage.name}: {stage.note}"] * bool(stage.note) + [
        f"{stage.name} requests {gpus:g} GPUs at once, of {machines.gpus}: it would wait forever. The estimate assumes "
        f"{machines.gpus}; request less ({option})"
        for gpus, option in asked.items()
        if gpus > machines.gpus
    ]


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
    """Print what the recipe will cost; settings of any stage can be overridden.

    Args:
        workspace: Local folder or s3://bucket/prefix. Finished work there is not counted, and its measured speeds are used.
        gpu: Kind of GPU, or cpu. The default is the kind in this machine.
        gpus: Number of GPUs; -1 means 1.
        cores: CPU cores of all machines together. 0 means the cores of this machine, or 8 per GPU if --gpu is another kind.
        price: Price of a GPU-hour, in any currency; 0 leaves money out. Beeline has no price list.
        utilisation: Assumed share of a data sheet's peak, used without a measurement.
        teacher_from: Whether the teacher is imported or trained; "auto" trains it unless the workspace has an imported one.
        as_json: Print JSON instead of a table.
        check: Check that workspace, weights, disk and cluster are ready, without an estimate. Exit status 0 only if all are.
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
    made = plan(stages(recipe, there, how), machines, measured=there.measured(), price=price, utilisation=utilisation)
    print(as_text(made, recipe, machines, there) if not as_json else json.dumps(as_dict(made, recipe, machines), indent=2))


def as_dict(made: Plan, recipe: Recipe, machines: Machines) -> dict[str, Any]:
    """Convert the plan to JSON types."""
    total: dict[str, Any] = {name: made.total(name) for name in ("flops", "gpu_hours", "core_hours", "stored_bytes")}
    total |= {"wall_hours": made.wall_hours, "passing_bytes": max(row.passing_bytes for row in made.rows)}
    if made.held_money is not None:
        total |= {"money": made.total("money"), "money_if_held": made.held_money}
    rows = [{key: value for key, value in dataclasses.asdict(row).items() if value is not None} for row in made.rows]
    about = {"recipe": recipe.name, "machines": dataclasses.asdict(machines)}
    return about | {"stages": rows, "total": total, "notes": made.notes}


def as_text(made: Plan, recipe: Recipe, machines: Machines, there: Workspace) -> str:
    """Format the plan: a table, the sources of its speeds, and notes."""
    priced = made.held_money is not None
    numbers = ("PFLOP", "GPU-hours", "core-hours", "wall", "stored", "memory", *(["money"] if priced else []))
    columns = [Column(name, justify="right") for name in numbers]
    table = Table("stage", "work", *columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    names = ("flops", "gpu_hours", "core_hours", "stored_bytes", "passing_bytes", "money")
    total = Row(
        stage="total",
        work="",
        amount=0,
        wall_hours=made.wall_hours,
        memory_bytes=0.0,
        sources={},
        **{name: made.total(name) for name in names},
    )
    for row in [*made.rows, total]:
        cells = [
            *map(_number, (row.flops / 1e15, row.gpu_hours, row.core_hours)),
            _time(row.wall_hours),
            _bytes(row.stored_bytes),
            _bytes(row.memory_bytes),
        ]
        table.add_row(row.stage, row.work, *cells, *([_number(row.money or 0.0)] if priced else []))
    what = f"{machines.gpus} x {machines.gpu}" if machines.gpus else "CPU"
    lines = [f"{recipe.name} on {what}, {machines.cores} cores; workspace {there.uri}", "", *_lines(table)]
    sources: dict[str, list[str]] = {}
    for row in made.rows:
        for kind, source in row.sources.items():
            sources.setdefault(source, []).append(row.stage if len(row.sources) == 1 else f"{row.stage} ({kind})")
    lines += ["", "Speeds:", *(f"  {', '.join(names)}: {source}" for source, names in sources.items()), "", "Notes:"]
    notes, fullest = [*made.notes], max(made.rows, key=lambda row: row.passing_bytes)
    if fullest.passing_bytes:
        notes.append(
            f"while {fullest.stage} runs, the workspace needs {_bytes(fullest.passing_bytes)} in addition to the stored bytes"
        )
    notes.append("memory: of each training process, without activations, which grow with its micro-batch (accumulate)")
    notes.append("not counted: communication between machines, compiling, restarts, waiting for machines")
    if priced:
        held = _number(made.held_money or 0.0)
        notes.append(f"money counts GPUs only while a stage uses them; all GPUs from start to end cost {held}")
    if there.trouble:
        notes.append(f"the workspace could not be read; the estimate assumes that it is empty: {there.trouble}")
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def _lines(table: Table) -> list[str]:
    """Format the table as plain text, as wide as needed: a log must not wrap its rows."""
    console = Console(file=io.StringIO(), width=1000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def _number(value: float) -> str:
    if value == 0:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}" if value >= 1e-6 else "0"


def _time(hours: float) -> str:
    return duration(hours * 3600) if hours else "–"


def _bytes(value: float) -> str:
    return decimal(round(value)) if value else "–"


if __name__ == "__main__":
    run_command(estimate)
