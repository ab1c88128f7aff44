"""What a workspace cost: the seconds of its stages, the pairs' evaluations, and after how many images they are paid back.

A number's kind is part of it: seconds of the clock, seconds of actors, and seconds of a device are three things, and the last
are said only where the record names the device.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from beeline.errors import reading
from beeline.files.layout import check_layout
from beeline.objectives.lmm import DISTANCES
from evaluation.models import LINES, TEACHER, Model, phases_of
from evaluation.page.charts import Chart, Series, chart
from pipeline.manifest import read_manifest
from pipeline.records import LOG, SUCCESS, plan_in, success_in
from pipeline.storage import Folder


@dataclasses.dataclass(frozen=True)
class StageRow:
    """A stage as its _SUCCESS tells it."""

    name: str
    seconds: str
    facts: str


@dataclasses.dataclass(frozen=True)
class Training:
    """A training as its log tells it."""

    name: str
    about: str
    iterations: str
    images: str
    seconds: str
    rate: str
    waiting: str
    skipped: str


def stages(place: Folder, models: Sequence[Model]) -> list[StageRow]:
    """Every finished stage, in the order of the data."""
    students = [f"students/{name}" for name in (place / "students").folders()]
    sweeps = [f"sweeps/{name}" for name in (place / "sweeps").folders()]
    references = [f"evaluation/reference/{name}" for name in (place / "evaluation/reference").folders()]
    measured = [f"evaluation/{model.name}" for model in models]
    names = ["images", "probe", TEACHER, "pairs", *students, *sweeps, *references, "evaluation/held-out", *measured]
    found = []
    for name in names:
        done = success_in(place / name)
        if done:
            facts = {key: value for key, value in done.items() if key not in ("seconds", "files", "device_seconds")}
            text = ", ".join(f"{key.replace('_', ' ')} {_fact(value)}" for key, value in facts.items())
            found.append(StageRow(name, f"{done['seconds']:,.0f}", text))
    return found


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return "/".join(_fact(item) for item in value.values())
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclasses.dataclass(frozen=True)
class PairsCost:
    """What the pairs took. `seconds` is of actors, of a kind that `kind` names."""

    pairs: int
    evaluations: int
    each: int
    seconds: float
    kind: str
    where: str
    note: str

    def paid_back(self, nfe: int) -> int | None:
        """Images after which a student of `nfe` evaluations has saved as many as the pairs took; None if it saves none."""
        saved = self.each - nfe
        return -(-self.evaluations // saved) if saved > 0 else None

    def sentences(self, nfe: int) -> list[str]:
        """What it took and what it saves, for a student of `nfe` evaluations."""
        made = [
            f"{self.pairs:,} pairs of {self.each} evaluations: {self.evaluations:,} evaluations of the teacher{self._took}."
        ]
        saved = self.each - nfe
        if saved > 0:
            seconds = f", and {_seconds(self.seconds / saved)} {self.kind} of sampling" if self.seconds else ""
            made.append(
                f"A student of {nfe} evaluation{'s' * (nfe != 1)} saves {saved} of {self.each} per image: "
                f"{self.pairs / saved:,.1f} pairs for each evaluation saved{seconds}. The pairs are paid back after "
                f"{self.paid_back(nfe):,} images, counted in evaluations; training is not counted."
            )
        return [*made, self.note] if self.note else made

    @property
    def _took(self) -> str:
        return f", in {_seconds(self.seconds)} {self.kind}{self.where}" if self.seconds else ""


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def pairs_cost(place: Folder) -> PairsCost | None:
    """From pairs/, None where they are not finished."""
    done, plan = success_in(place / "pairs"), plan_in(place / "pairs", {"evaluations": 1})
    if not done or not plan:
        return None
    with reading(f"{place / 'pairs'}/{SUCCESS} is not as its stage writes it", "remove it and run the stage's command again"):
        check_layout(done, {"evaluations": 0, "pairs": 0, "shards": 0, "device_seconds?": {}})
        check_layout(list((done.get("device_seconds") or {}).values()), [float])
    rows = read_manifest(place / "pairs")
    known = [row for row in rows if row.get("sampling_seconds") is not None]
    seconds = sum(row["sampling_seconds"] for row in known)
    devices: Mapping[str, float] = done.get("device_seconds") or {}
    notes = []
    if devices:
        gpus = [name for name in devices if name != "CPU"]
        kind = "GPU-seconds" if gpus else "CPU-seconds"
        if gpus and len(gpus) < len(devices):
            kind = "device-seconds, of GPUs and CPUs,"
        seconds, where = sum(devices.values()), f" ({', '.join(gpus)})" if gpus else ""
    else:
        kind, where = "actor-seconds", ""
        if seconds:
            notes.append("Which device the actors had is not on record, so their seconds are of actors, not of CPUs or GPUs.")
        if known and len(known) < int(done["shards"]):
            notes.append(f"Of {done['shards']} shards the time of {len(known)} is known; the rest is not in the seconds.")
    evaluations = int(done["evaluations"])
    return PairsCost(int(done["pairs"]), evaluations, int(plan["evaluations"]), seconds, kind, where, " ".join(notes))


def trainings(place: Folder, models: Sequence[Model]) -> tuple[list[Training], list[tuple[str, Chart]]]:
    """Of the teacher and every student that has a log; and the curves of their losses, a chart for each kind of loss, which is
    named. Models that are measured have the colours they have elsewhere."""
    table: list[Training] = []
    curves: dict[str, list[Series]] = {}
    numbers = {model.name: model.number for model in models}
    for name in [TEACHER, *(f"students/{name}" for name in (place / "students").folders())]:
        number = numbers.setdefault(name, len(numbers))
        log = _log(place / name)
        if not log:
            continue
        title = name.removeprefix("students/")
        settings, done = plan_in(place / name, {}) or {}, success_in(place / name) or {}
        with reading(f"{place / name}/{LOG} is not readable", "remove it to leave its curves out"):
            table.append(_training(title, log, done, settings))
            losses = _losses(log, settings.get("student"))
        for kind, points in losses.items():
            steps, values = zip(*points, strict=True)
            curves.setdefault(kind, []).append(Series(name=title, number=number, x=steps, y=values, marked=False))
    charts = [
        (kind, chart(found, x="iteration", y="loss", alt=f"{kind} by iteration", log="y")) for kind, found in curves.items()
    ]
    return table, [(kind, drawn) for kind, drawn in charts if drawn is not None]


def _training(title: str, log: Sequence[Mapping[str, Any]], done: Mapping[str, Any], settings: Mapping[str, Any]) -> Training:
    seconds, last = 0.0, 0.0
    for row in log:  # "seconds" begin anew at every restart
        now = float(row.get("seconds", last))
        seconds, last = seconds + (now if now < last else now - last), now
    images, waits = done.get("images_seen"), [row["data_wait"] for row in log if "data_wait" in row]
    methods = dict.fromkeys(str(phase["objective"]["method"]) for phase in _phases(settings.get("student")))
    return Training(
        name=title,
        about=", ".join(method.rpartition(":")[2].removesuffix("Config") for method in methods),
        iterations=f"{log[-1]['step']:,}",
        images="—" if images is None else f"{images:,}",
        seconds=f"{seconds:,.0f}",
        rate="—" if not images or not seconds else f"{images / seconds:,.0f}",
        waiting=f"{100 * sum(waits) / len(waits):.2f} %" if waits else "—",
        skipped=f"{log[-1].get('skipped', 0):,}",
    )


def _losses(log: Sequence[Mapping[str, Any]], student: Mapping[str, Any] | None) -> dict[str, list[tuple[int, float]]]:
    """The objective's first figure by step, under a name that tells losses of different kinds apart."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in log:
        key = next((key for key in row if key not in ("step", "phase", "skipped", "grad_norm")), None)
        if key is None or not isinstance(row[key], int | float):
            continue
        kind = "EDM loss" if student is None else key
        lines = {} if student is None else _phases(student)[int(row.get("phase", 0))]["objective"]
        if lines.get("method") == LINES and key == "lines":
            size = f" at {lines['resize']}" if lines.get("resize") else ""
            kind = f"lines: {DISTANCES.get(lines['distance'], lines['distance'])}{size}"
        found.setdefault(kind, []).append((int(row["step"]), float(row[key])))
    return found


def _phases(student: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    return list(phases_of({"trained": student}).values())


def _log(folder: Folder) -> list[dict[str, Any]]:
    try:
        data = folder.read(LOG)
    except FileNotFoundError:
        return []
    with reading(f"{folder}/{LOG} is not readable", "remove it to leave its curves out"):
        rows = [json.loads(line) for line in data.splitlines()]
        check_layout(rows, [{"step": 0, "seconds?": float, "data_wait?": float, "skipped?": 0}])
        return rows
